"""Online DPO on a folder of product photos: the main job.

    python -m jobs.online_dpo --config jobs/configs/online_dpo_hps_ctr.toml [--section.key VALUE …] [--dry-run]

Checks configuration and data, encodes what the cache lacks, deploys the judges, starts samplers and trainer ranks, and
runs the loop of `rlhf.loops.train`. The same command goes on where a stopped run left off.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import placement
from actors.fleet import Fleet
from actors.judging import Judging, Waiting
from actors.reporting import Reporter
from actors.rollouts import Rollouts
from actors.sampler import Sampler
from actors.sources import OnlineSource
from actors.trainer import RankSetup, TrainerGroup
from jobs.cli import GOES_ON, parse, resolved_toml, run_main, say
from jobs.fit import check_cards
from jobs.launch import Plan, Started, dry_run, launch, train_until_done
from jobs.preprocess import Data, preprocess, read_data
from jobs.recipes import OnlineDPORecipe
from rlhf.data.batches import check_buckets
from rlhf.data.cache import EncodingCache
from rlhf.data.prompts import PromptStream
from rlhf.data.work import OnlineWork
from rlhf.diffusion.objectives import DPO
from rlhf.diffusion.process import with_times
from rlhf.loops.train import Duty, evaluation, saving, train
from rlhf.models import load_family
from rlhf.models.checks import check_model, check_sampling
from rlhf.models.lora_files import check_layout
from rlhf.models.trainable import load_trainable
from rlhf.rewards.questions import check_prompts
from rlhf.runs.wandb_run import check_report_to
from rlhf.training.optimizers import check_optimizer
from rlhf.types import REFERENCE, Prompt
from serve_apps import deploy


def main() -> None:
    recipe, is_dry = parse(OnlineDPORecipe, description=__doc__ or "")
    if is_dry:
        say(resolved_toml(recipe))
        check_model(recipe.model, weights=False)
        check_cards(recipe, plan(recipe).roles, DPO(beta=recipe.dpo.beta))
    data = read_data(recipe.data, recipe.eval, recipe.model)
    if data.left_out:
        say(data.left_out)
    if is_dry:
        check(recipe, data)
        dry_run(recipe.run, plan(recipe), recipe.cluster, resolved_toml(recipe))
    else:
        say(f"results: {run(recipe, data)}")


def check(recipe: OnlineDPORecipe, data: Data) -> None:
    """What can be refused before anything starts. Raises Refused."""
    family = load_family(recipe.model)
    load_trainable(recipe.trainable, family).begun(family)
    for layout in recipe.run.lora_layouts:
        check_layout(family, layout, "run.lora_layouts")
    with_times(family.process, recipe.trainer.timesteps, recipe.trainer.timestep_shift)
    check_optimizer(recipe.trainer.optimizer)
    check_report_to(recipe.tracking.report_to)
    check_sampling(family, recipe.sampling)
    check_buckets(family, data.training, recipe.trainer.train_batch_size)
    check_buckets(family, data.held_out, batch_size=1)
    check_prompts(recipe.judges, recipe.reward, recipe.data, data.all)
    deploy.check_sources(recipe.judges, recipe.serve, recipe.judge_names)


def plan(recipe: OnlineDPORecipe) -> Plan:
    """What the run needs beside its driver."""
    family = load_family(recipe.model)
    sizes, counts = placement.ModelSizes(family), load_trainable(recipe.trainable, family).counts(family, DPO.sides)
    roles = [
        placement.trainer_role(sizes, recipe.trainer, counts),
        placement.sampler_role(sizes, recipe.samplers, encodes=False),
        placement.encoder_role(sizes, recipe.preprocess, before=True),
        placement.judging_role(),
        *placement.judge_roles(recipe.judges, recipe.judge_names),
    ]
    return Plan(roles=roles, trainer=recipe.trainer, counts=counts)


def run(recipe: OnlineDPORecipe, data: Data) -> Path:
    """Run (or resume) to the end; returns the run's folder."""
    check(recipe, data)
    needed = plan(recipe)
    check_cards(recipe, needed.roles, DPO(beta=recipe.dpo.beta))
    with launch(recipe.run, needed, recipe.cluster, resolved_toml(recipe)) as started:
        if data.left_out:
            (started.folder.path / "left_out.txt").write_text(data.left_out + "\n", encoding="utf-8")
        cache = preprocess(recipe.model, recipe.sampling, recipe.preprocess, recipe.data.cache, data.all, say)
        group = placement.reserve(needed.roles[:2])  # trainer ranks, then samplers
        started.stack.callback(ray.util.remove_placement_group, group)
        rollouts = start_rollouts(recipe, started, data, cache, group)
        started.stack.callback(rollouts.close)
        held_out = data.held_out[: recipe.eval.max_prompts]
        train_until_done(started.folder, partial(train_once, recipe, started, held_out, cache, group, rollouts))
        return started.folder.path


def start_rollouts(
    recipe: OnlineDPORecipe, started: Started, data: Data, cache: EncodingCache, group: PlacementGroup
) -> Rollouts:
    """Deploy the judges and start the samplers, in what the trainer's ranks leave of the placement group."""
    samplers, judges, reward = recipe.samplers, recipe.judges, recipe.reward
    family = load_family(recipe.model)
    trainable, device = load_trainable(recipe.trainable, family), "cuda" if samplers.num_gpus else "cpu"
    started.stack.callback(deploy.undeploy, started.name, recipe.judge_names)
    judges_up = deploy.deploy(judges, recipe.serve, recipe.judge_names, started.name)

    def new_sampler(index: int) -> ray.actor.ActorHandle:
        bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=recipe.trainer.ranks + index)
        actor: Any = ray.remote(Sampler).options(
            num_cpus=samplers.num_cpus,
            num_gpus=samplers.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=bundle,
        )
        return actor.remote(recipe.model, recipe.sampling, device, trainable=trainable, cache=cache)

    say(f"judges: {', '.join(deploy.addresses(judges, recipe.judge_names, judges_up).values())}")
    waiting: Waiting = {}
    return Rollouts(
        recipe.rollout,
        recipe.sampling,
        reward,
        judges,
        recipe.trainer,
        seed=recipe.run.seed,
        prompts=PromptStream(data.training, recipe.run.seed),
        family=family,
        fleet=Fleet(new_sampler, samplers, waiting),
        judging=Judging(
            judges,
            reward.names,
            judges_up.apps,
            waiting,
            ask_filter=judges.filter.enabled,
            empty_prompt=reward.empty_prompt,
            max_restarts=samplers.max_restarts,
        ),
    )


def train_once(
    recipe: OnlineDPORecipe,
    started: Started,
    held_out: Sequence[Prompt],
    cache: EncodingCache,
    group: PlacementGroup,
    rollouts: Rollouts,
    stack: ExitStack,
) -> None:
    """The loop on a trainer group of its own, from the last commit to the end."""
    folder, run, trainer_table = started.folder, recipe.run, recipe.trainer
    tracker = Reporter(folder.path, trainer_table.max_train_steps, folder.last_committed(), recipe.tracking)
    setup = RankSetup(
        model=recipe.model,
        trainer=trainer_table,
        trainable=load_trainable(recipe.trainable, load_family(recipe.model)),
        objective=DPO(beta=recipe.dpo.beta),
        work=OnlineWork(
            trainer_table, cache, folder.path / "pairs", folder.fence, seed=run.seed, save_latents=run.save_latents
        ),
        run=run,
        fence=folder.fence,
    )
    trainer = TrainerGroup(setup, group, meanwhile=rollouts.pump)
    stack.callback(trainer.kill)
    source = OnlineSource(rollouts, trainer.publish, trainer_table.pairs_per_rank)
    evaluate = evaluation(
        held_out,
        rollouts,
        tracker,
        source.publish,
        rewards=recipe.reward.names,
        variants=recipe.eval.seeds,
        seed=run.seed,
        ema=trainer_table.ema_decay is not None,
    )
    duties = [
        Duty(every=run.sample_every, do=lambda step: tracker.pairs(step, source.pairs)),
        Duty(every=recipe.dpo.reference_refresh_every, do=lambda step: trainer.refresh(REFERENCE)),
        Duty(every=recipe.rollout.publish_every, do=lambda step: source.publish("policy", step)),
        *([Duty(every=recipe.eval.every, do=evaluate, at_start=True)] if held_out else []),
        *saving(run, folder, source, trainer),
    ]
    train(trainer_table.max_train_steps, folder, source, trainer, tracker, duties)
    tracker.close()


if __name__ == "__main__":
    run_main(main, GOES_ON)
