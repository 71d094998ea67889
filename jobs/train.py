"""Preference tuning (Diffusion-DPO) or SFT on examples that are already there, for any family.

    python -m jobs.train --config jobs/configs/offline_dpo_sd15.toml [--section.key VALUE …] [--dry-run]

Checks every row, lets a judge relabel the pairs if `data.choice_model` names one, encodes what the cache lacks, starts the
trainer ranks, and runs the loop of `rlhf.loops.train`. The same command goes on where a stopped run left off.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup

from actors import checks, placement
from actors.feedback import write_record
from actors.reporting import Reporter
from actors.sources import Feed, OfflineSource
from actors.trainer import RankSetup, TrainerGroup
from actors.validation import Validation, sampling_of
from jobs.cli import GOES_ON, parse, resolved_toml, run_main, say
from jobs.encoding import encode_missing, warn_of_unread
from jobs.example_sets import (
    ExampleSet,
    ExampleSets,
    read_example_sets,
    refuse_other_examples,
    refuse_too_few,
    tasks_of,
    wanted,
)
from jobs.feedback import Labelled, relabel_by_judge
from jobs.fit import check_cards
from jobs.launch import Plan, Started, cluster, dry_run, launch, train_until_done
from jobs.recipes import TrainRecipe
from rlhf.data.prompts import read_prompts
from rlhf.data.sampler import encodings_for_sampling
from rlhf.data.sizes import sizes_of
from rlhf.data.stream import PairStream
from rlhf.data.work import IndexedExamples, OfflineWork
from rlhf.diffusion.objectives import DPO, SFT, Objective
from rlhf.diffusion.process import RectifiedFlow, with_times
from rlhf.errors import Refused
from rlhf.loops.train import Duty, saving, train
from rlhf.models import load_family
from rlhf.models.checks import check_model, check_sampling
from rlhf.models.lora_files import check_layout
from rlhf.models.trainable import load_trainable
from rlhf.runs.wandb_run import check_report_to
from rlhf.training.optimizers import check_optimizer
from rlhf.training_tables import TrainerConfig
from rlhf.types import REFERENCE, Encoding, Prompt
from serve_apps import deploy


def main() -> None:
    recipe, is_dry = parse(TrainRecipe, description=__doc__ or "")
    if is_dry:
        say(resolved_toml(recipe))
        say(batch_in_words(recipe.trainer))
        check_model(recipe.model, weights=False)
        check_cards(recipe, plan(recipe).roles, objective(recipe))
        check(recipe)
        examples = read_example_sets(recipe, objective(recipe).roles, partial(checks.in_threads, say))
        say(examples.report())
        validation_prompts(recipe)
        recipe = ended_by_epochs(recipe, examples)
        dry_run(recipe.run, plan(recipe), recipe.cluster, resolved_toml(recipe))
    else:
        say(f"results: {run(recipe)}")


def check(recipe: TrainRecipe) -> None:
    """What can be refused before the rows are read. Raises Refused."""
    family = check_model(recipe.model)
    load_trainable(recipe.trainable, family).begun(family)
    for layout in recipe.run.lora_layouts:
        check_layout(family, layout, "run.lora_layouts")
    with_times(family.process, recipe.trainer.timesteps, recipe.trainer.timestep_shift)
    weighting = recipe.trainer.timestep_weighting
    if weighting != "none" and not isinstance(family.process, RectifiedFlow):
        raise Refused(
            f"trainer.timestep_weighting = {weighting!r} is of flow matching, not of a {type(family.process).__name__}: "
            "leave it out"
        )
    check_optimizer(recipe.trainer.optimizer)
    check_report_to(recipe.tracking.report_to)
    deploy.check_sources(recipe.judges, recipe.serve, recipe.judge_names)


def validation_prompts(recipe: TrainRecipe) -> tuple[Prompt, ...]:
    """What pictures are made of while the run trains. Raises Refused."""
    table, family = recipe.validation, load_family(recipe.model)
    if table.path is None:
        return ()
    sized = sizes_of(recipe.model, recipe.data.buckets)[0]
    found = read_prompts(table.path, "crop", sized, key="validation.path", source_counts=family.source_counts)
    check_sampling(family, table)
    return found.prompts[: table.max_prompts]


def encodings(recipe: TrainRecipe, examples: ExampleSets, shown: Sequence[Prompt]) -> Iterator[Encoding]:
    """All that is encoded before training. shown: `validation_prompts`."""
    family, sampling = load_family(recipe.model), sampling_of(recipe.validation)
    yield from wanted(recipe, objective(recipe).roles, examples)
    yield from (encoding for prompt in shown for encoding in encodings_for_sampling(family, prompt, sampling))


def fill_cache(recipe: TrainRecipe, examples: ExampleSets, shown: Sequence[Prompt]) -> None:
    """Encode what the cache lacks, and warn of what the encoders do not read of captions. Ray must be initialised."""
    cache, needed, what = examples.cache, encodings(recipe, examples, shown), "captions and pictures"
    manifest = encode_missing(recipe.model, recipe.preprocess, cache, needed, what, say)
    captions = chain.from_iterable(found.prompts() for found in examples.named().values())
    warn_of_unread(load_family(recipe.model), cache, manifest, captions, say)


def ended_by_epochs(recipe: TrainRecipe, examples: ExampleSets) -> TrainRecipe:
    """The recipe with as many updates as `trainer.epochs` takes, if that is less. The last update may begin another epoch."""
    trainer = recipe.trainer
    if trainer.epochs is None:
        return recipe
    place, size = examples.training.place, trainer.train_batch_size
    count = examples.training.count if place.shares is None else int(place.drawn().sum())
    stream = PairStream(
        block_sizes=(count,), data=recipe.data, seed=0, batch_size=size, buckets=place.buckets, shares=place.shares
    )
    repeated = f" ({stream.epoch - count} repeated to fill batches)" if stream.epoch > count else ""
    steps = math.ceil(trainer.epochs * stream.epoch / trainer.pairs_per_step)
    most = f"trainer.max_train_steps = {trainer.max_train_steps}"
    say(f"{trainer.epochs} epochs of {count} examples{repeated} are {steps} updates; {most}")
    fewer = trainer.model_copy(update={"max_train_steps": min(steps, trainer.max_train_steps)})
    return recipe.model_copy(update={"trainer": fewer})


def objective(recipe: TrainRecipe) -> Objective:
    if recipe.objective == "sft":
        return SFT(weighting=recipe.trainer.timestep_weighting)
    return DPO(beta=recipe.dpo.beta)


def plan(recipe: TrainRecipe) -> Plan:
    """What the run needs beside its driver. A judge that relabels is gone when training starts."""
    family = load_family(recipe.model)
    trainable = load_trainable(recipe.trainable, family)
    sizes, counts = placement.ModelSizes(family), trainable.counts(family, objective(recipe).sides)
    roles = [
        placement.trainer_role(sizes, recipe.trainer, counts),
        placement.encoder_role(sizes, recipe.preprocess, before=recipe.data.latents == "cached"),
        *placement.judge_roles(recipe.judges, recipe.judge_names, before=True),
    ]
    return Plan(roles=roles, trainer=recipe.trainer, counts=counts)


def run(recipe: TrainRecipe) -> Path:
    """Run (or resume) to the end; returns the run's folder."""
    check(recipe)
    needed, roles = plan(recipe), objective(recipe).roles
    check_cards(recipe, needed.roles, objective(recipe))
    with ExitStack() as stack:
        stack.enter_context(cluster(recipe.cluster, namespace=recipe.run.name))  # the check needs it, and no folder yet
        shown = validation_prompts(recipe)
        examples = read_example_sets(recipe, roles, partial(checks.on_cluster, recipe.preprocess, say))
        say(examples.report())
        recipe = ended_by_epochs(recipe, examples)
        started = stack.enter_context(launch(recipe.run, needed, recipe.cluster, resolved_toml(recipe)))
        say(batch_in_words(recipe.trainer))
        folder, labelled = started.folder, Labelled(examples=examples)
        if judge := recipe.data.choice_model:
            labelled = relabel_by_judge(recipe.judges, recipe.serve, judge, examples, started.name, say)
            examples = labelled.examples.bucketed(load_family(recipe.model), recipe.data)  # other winners, other sizes
            if examples.evaluation:
                refuse_too_few(recipe, examples.evaluation)
        refuse_other_examples(examples, folder, recipe.trainer.train_batch_size)
        if examples.left_out():
            (folder.path / "left_out.txt").write_text(examples.left_out() + "\n", encoding="utf-8")
        for name, answer in labelled.records.items():
            write_record(folder.path / name, *answer)
        fill_cache(recipe, examples, shown)
        group = placement.reserve(needed.roles[:1])
        started.stack.callback(ray.util.remove_placement_group, group)
        train_until_done(folder, partial(train_once, recipe, started, examples, shown, labelled.swapped, group))
        return folder.path


def train_once(
    recipe: TrainRecipe,
    started: Started,
    examples: ExampleSets,
    shown: Sequence[Prompt],
    about_data: Mapping[str, float],
    group: PlacementGroup,
    stack: ExitStack,
) -> None:
    """The loop on a trainer group of its own, from the last commit to the end; `about_data` is logged before the first step."""
    folder, run, learns = started.folder, recipe.run, objective(recipe)
    tracker = Reporter(folder.path, recipe.trainer.max_train_steps, folder.last_committed(), recipe.tracking)
    if about_data and folder.last_committed() is None:
        tracker.log(0, about_data)
    source = OfflineSource(start_feed(recipe, examples, learns, stack), contributed(recipe, examples.training))
    setup = RankSetup(
        model=recipe.model,
        trainer=recipe.trainer,
        trainable=load_trainable(recipe.trainable, load_family(recipe.model)),
        objective=learns,
        work=OfflineWork(
            recipe.trainer,
            recipe.data,
            recipe.eval,
            examples.cache,
            examples.training.place,
            examples.evaluation.place if examples.evaluation else None,
            roles=learns.roles,
            seed=run.seed,
        ),
        run=run,
        fence=folder.fence,
    )
    trainer = TrainerGroup(setup, group)
    stack.callback(trainer.kill)

    def evaluate(step: int) -> None:
        tracker.log(step, trainer.evaluate())

    validate = Validation(recipe.model, recipe.validation, shown, examples.cache, trainer, tracker, run.seed)
    refresh_every = recipe.dpo.reference_refresh_every if REFERENCE in learns.sides else 0
    duties = [
        Duty(every=refresh_every, do=lambda step: trainer.refresh(REFERENCE)),
        *([Duty(every=recipe.eval.every, do=evaluate, at_start=True)] if examples.evaluation else []),
        *([Duty(every=recipe.validation.every, do=validate, at_start=True)] if shown else []),
        *saving(run, folder, source, trainer),
    ]
    train(recipe.trainer.max_train_steps, folder, source, trainer, tracker, duties)
    tracker.close()


def contributed(recipe: TrainRecipe, training: ExampleSet) -> Callable[[int], dict[str, float]]:
    """By update, how many examples are of each data set of a mixture: data/NAME."""
    data, trainer = recipe.data, recipe.trainer
    if not data.task_weights:
        return lambda step: {}
    tasks = tasks_of(training, Path(data.path))
    plain = {task: re.sub(r"[^a-z0-9_]", "_", task.lower()) for task in sorted(set(tasks))}
    alike = Counter(plain.values())
    numbered = {task: name if alike[name] == 1 else f"{name}_{i}" for i, (task, name) in enumerate(plain.items())}
    names, stream = [numbered[task] for task in tasks], stream_of(recipe, training)

    def count(step: int) -> dict[str, float]:
        visits = [visit for rank in range(trainer.ranks) for visit in stream.of_rank(trainer, step, rank)]
        found = Counter(names[visit.row] for visit in visits)
        return {f"data/{name}": float(found[name]) for name in sorted(set(names))}

    return count


def stream_of(recipe: TrainRecipe, training: ExampleSet) -> PairStream:
    """The stream that the ranks see."""
    place = training.place
    assert training.index is not None
    return PairStream(
        block_sizes=training.index.sizes * len(place.sizes),
        data=recipe.data,
        seed=recipe.run.seed,
        batch_size=recipe.trainer.train_batch_size,
        buckets=place.buckets,
        shares=place.shares,
        caption_dropout=place.caption_dropout,
    )


def start_feed(recipe: TrainRecipe, examples: ExampleSets, learns: Objective, stack: ExitStack) -> Feed | None:
    """Encoders beside the trainer, where latents are made on the fly."""
    training = examples.training
    if recipe.data.latents != "on_the_fly" or training.index is None:
        return None
    indexed = IndexedExamples(load_family(recipe.model), training.place.path, training.place.sizes, learns.roles)
    stream = stream_of(recipe, training)
    feed = Feed(recipe.model, recipe.preprocess, recipe.trainer, indexed, stream, recipe.data.shuffle_blocks)
    stack.callback(feed.close)
    return feed


def batch_in_words(trainer: TrainerConfig) -> str:
    """How many examples an update takes, and at which rate."""
    return (
        f"{trainer.pairs_per_step} pairs a step = {trainer.ranks} ranks × {trainer.train_batch_size} a micro-batch × "
        f"{trainer.gradient_accumulation_steps} accumulated; learning rate {trainer.scaled_learning_rate:.3g}"
        f"{f' = {trainer.learning_rate:g} × {trainer.pairs_per_step}' if trainer.scale_lr else ''}"
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
