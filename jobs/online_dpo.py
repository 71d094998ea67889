"""Online DPO on a folder of product photos: the main job.

    python -m jobs.online_dpo --config jobs/configs/online_dpo_hps_ctr.toml [--section.key VALUE …] [--dry-run]

Checks configuration and data, encodes what the cache lacks, deploys the judges, starts samplers and trainer ranks, and
runs the loop of `rlhf.algorithms.online_dpo`. The same command goes on where a stopped run left off.
"""

import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import ray
import xxhash
from ray import serve

from actors import placement
from actors.encoders import EncodingFailed
from actors.health import SamplerLost, StaleWeights, Stalled
from actors.judges import Judges, JudgesLost, reward_text
from actors.reporting import Reporter
from actors.rollouts import Rollouts
from actors.trainer_group import TrainerGroup, TrainerLost
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import Stopped, cluster, dashboard, free_resources
from jobs.preprocess import Data, preprocess, prompts_of, read_data
from rlhf.algorithms.online_dpo import online_dpo
from rlhf.algorithms.rollout import JudgeUnreliable, NothingPasses
from rlhf.config import OnlineDPOConfig
from rlhf.data.cache import CacheError
from rlhf.data.prompts import PromptStream
from rlhf.data.schema import BadInput
from rlhf.run_folder import Fenced, RunFolder, RunInUse
from rlhf.trainer import NonFiniteLoss
from rlhf.types import Prompt
from serve_apps import deploy

TRAINER_REBUILDS = 3
"""Times that a lost trainer group is rebuilt without a new commit in between before the run gives up."""

STOPS = (
    BadInput,
    CacheError,
    EncodingFailed,
    Fenced,
    FileNotFoundError,
    JudgesLost,
    JudgeUnreliable,
    NonFiniteLoss,
    NothingPasses,
    RunInUse,
    SamplerLost,
    Stalled,
    StaleWeights,
    TrainerLost,
    ValueError,
    deploy.DeployError,
    placement.NotEnoughResources,
)
"""Ends of a run that a user can mend from the message alone."""


def main() -> None:
    arguments = parse(OnlineDPOConfig, description=__doc__ or "")
    config = arguments.config
    data = read_data(config)
    if data.left_out():
        print(data.left_out(), flush=True)
    if arguments.dry_run:
        dry_run(config, data)
    else:
        print(f"results: {run(config, data)}")


def dry_run(config: OnlineDPOConfig, data: Data) -> None:
    """Print the resolved recipe and the placement table; raise where the run would be refused. Starts nothing."""
    print(resolved_toml(config))
    check_texts(config, prompts_of(config, data.all))
    deploy.check_sources(config.judges, config.judge_names)
    needed, free = placement.roles(config), free_resources(config.cluster)
    print(placement.table(needed, free))
    state = placement.checkpoint_bytes(config)
    folder = next(p for p in (Path(config.run.dir), *Path(config.run.dir).parents) if p.exists())
    disk = shutil.disk_usage(folder).free
    need = state * (config.run.keep_checkpoints + 1)
    print(
        f"disk: {need / 2**30:.2f} GiB for {config.run.keep_checkpoints} + 1 checkpoints in {config.run.dir}, "
        f"{disk / 2**30:.2f} GiB free"
    )
    placement.check(needed, free)
    if need > disk:
        raise placement.NotEnoughResources(
            f"run.dir = {config.run.dir!r} has too little space; lower run.keep_checkpoints or point it elsewhere"
        )


def check_texts(config: OnlineDPOConfig, prompts: list[Prompt]) -> None:
    """Every prompt must give the rewards that read one a text. Raises ValueError for the first that does not."""
    if any(config.judges[name].reads_prompt for name in config.reward.names):
        for prompt in prompts:
            reward_text(prompt, config.reward.hps.empty_prompt)


def run(config: OnlineDPOConfig, data: Data) -> Path:
    """Run (or resume) to the end; returns the run's folder."""
    deploy.check_sources(config.judges, config.judge_names)
    check_texts(config, prompts_of(config, data.all))
    with cluster(config.cluster, namespace=config.run.name), ExitStack() as stack:
        folder = RunFolder.claim(config.run.dir, config.run.name, resolved_toml(config), config.run.resume)
        stack.callback(folder.release)
        print(
            f"run folder: {folder.path}{' (resumed)' if folder.resumed else ''}; dashboard: {dashboard()}", flush=True
        )
        # Unique in the cluster, also beside a run of the same name in another run.dir; the same again on a resume.
        name = f"{config.run.name}-{folder.path.name}-{xxhash.xxh3_64_hexdigest(str(folder.path).encode())[:6]}"
        if data.left_out():
            (folder.path / "left_out.txt").write_text(data.left_out() + "\n", encoding="utf-8")
        check_placement(config, name)
        placement.check_shared(folder.path)
        prompts = preprocess(config, data.all, lambda line: print(line, flush=True))
        train, held_out = prompts[: len(data.train.rows)], prompts[len(data.train.rows) :]
        group = placement.reserve(config)
        stack.callback(ray.util.remove_placement_group, group)
        stack.callback(deploy.undeploy, name, config.judge_names)
        judges_up = deploy.start(
            config.judges, config.serve, config.judge_names, name
        )  # after the group: judges take what trainer and samplers leave

        def new_judges() -> ray.actor.ActorHandle:
            actor = ray.remote(Judges).options(num_cpus=placement.JUDGES_CPUS, max_concurrency=1000)
            return actor.remote(config, judges_up.apps)

        deploy.wait(judges_up, config.judges.deploy_timeout_s)
        addresses = deploy.addresses(config.judges, config.judge_names, judges_up)
        print(f"judges: {', '.join(addresses.values())}", flush=True)
        rollouts = Rollouts(config, PromptStream(train, config.run.seed), new_judges, group)
        stack.callback(rollouts.close)
        held_out = held_out[: config.eval.max_prompts]

        def new_trainer() -> TrainerGroup:
            return TrainerGroup(config, folder.fence, group, meanwhile=rollouts.pump)

        train_until_done(config, folder, rollouts, held_out, new_trainer)
        return folder.path


def check_placement(config: OnlineDPOConfig, name: str) -> None:
    """Refuse, with a table, a run that does not fit; judges that an earlier start left running are not counted twice."""
    ours = config.judges.to_deploy(config.judge_names)
    running = serve.status().applications if ours else {}
    orphans = {f"judge {judge}" for judge in ours if deploy.app_name(name, judge) in running}
    needed = [role for role in placement.roles(config) if role.name not in orphans]
    free = free_resources(config.cluster)
    print(placement.table(needed, free), flush=True)
    placement.check(needed, free)


def train_until_done(
    config: OnlineDPOConfig,
    folder: RunFolder,
    rollouts: Rollouts,
    held_out: list[Prompt],
    new_trainer: Callable[[], TrainerGroup],
) -> None:
    """The loop, begun again from the last commit when trainer ranks are lost."""
    rebuilds, committed = 0, folder.last_committed()
    while True:
        folder.move_uncommitted_to_discarded(folder.last_committed())
        with ExitStack() as stack:
            tracker = Reporter(folder.path, config, folder.last_committed())
            try:
                trainer = new_trainer()
                stack.callback(trainer.kill)
                online_dpo(config, folder, rollouts, trainer, tracker, held_out)
                tracker.close()
                return
            except TrainerLost as error:
                rebuilds = rebuilds + 1 if folder.last_committed() == committed else 1
                committed = folder.last_committed()
                if rebuilds > TRAINER_REBUILDS:
                    raise
                print(f"trainer lost ({error}); going on from step {committed or 0}", file=sys.stderr, flush=True)


def guarded(job: Callable[[], None]) -> Callable[[], None]:
    """A job whose stop by signal is told in one line."""

    def guarded_job() -> None:
        try:
            job()
        except (KeyboardInterrupt, Stopped):
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)

    return guarded_job


if __name__ == "__main__":
    run_main(guarded(main), *STOPS)
