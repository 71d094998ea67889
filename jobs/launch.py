"""How a run starts and goes on: cluster, folder, placement, disk, in this order and once for every job that trains.

Also here: beginning again after lost ranks, and a stop that is told in one line.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash
from ray import serve

from actors import placement
from actors.placement import Role
from actors.trainer import TrainerLost
from jobs.cluster import cluster, dashboard, free_resources
from rlhf.runs.folder import RunFolder
from rlhf.section import ClusterConfig
from rlhf.tables import RunConfig
from serve_apps import deploy

TRAINER_REBUILDS = 3
"""Times that a lost trainer group is rebuilt without a new commit in between before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs of the machines."""

    roles: Sequence[Role]
    checkpoint_bytes: float
    export_bytes: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run that may write into its folder."""

    folder: RunFolder
    name: str
    """Unique in the cluster, also beside a run of the same name in another run.dir; the same again on a resume."""
    stack: ExitStack
    """What is to be undone when the run ends, whatever happened."""


def dry_run(run: RunConfig, plan: Plan, config: ClusterConfig) -> None:
    """Print what each role needs against what is free, and the disk space. Raises NotEnoughResources. Starts nothing."""
    free = free_resources(config)
    say(placement.table(plan.roles, free))
    check_disk(run, plan)
    placement.check(plan.roles, free)


@contextmanager
def launch(
    run: RunConfig, plan: Plan, config: ClusterConfig, recipe: str, before: Callable[[], None] = lambda: None
) -> Iterator[Started]:
    """Connect to the cluster or start one, claim the run's folder, and refuse what does not fit.

    recipe: the resolved configuration, which the folder keeps; before: checks that need the cluster and not the folder.
    Raises Refused.
    """
    with cluster(config, namespace=run.name), ExitStack() as stack:
        before()
        folder = RunFolder.claim(run.dir, run.name, recipe, run.resume)
        stack.callback(folder.release)
        say(f"run folder: {folder.path}{' (resumed)' if folder.resumed else ''}; dashboard: {dashboard()}")
        name = f"{run.name}-{folder.path.name}-{xxhash.xxh3_64_hexdigest(str(folder.path).encode())[:6]}"
        check_placement(plan.roles, config, name)
        placement.check_shared("run.dir", folder.path)
        check_disk(run, plan, folder.path)
        yield Started(folder=folder, name=name, stack=stack)


def check_placement(roles: Sequence[Role], config: ClusterConfig, name: str) -> None:
    """Refuse, with a table, a run that does not fit; judges that an earlier start left running are not counted twice."""
    judges = {role.judge for role in roles if role.judge}
    running = serve.status().applications if judges else {}
    orphans = {judge for judge in judges if deploy.app_name(name, judge) in running}
    needed = [role for role in roles if role.judge not in orphans]
    free = free_resources(config)
    say(placement.table(needed, free))
    placement.check(needed, free)


def check_disk(run: RunConfig, plan: Plan, folder: Path | None = None) -> None:
    """Print what checkpoints and exports need, less what the run's `folder` has of them. Raises NotEnoughResources."""
    existing = next(p for p in (Path(run.dir), *Path(run.dir).parents) if p.exists())
    disk = shutil.disk_usage(existing).free
    exports = 1 + (plan.steps // run.export_every if run.export_every else 0)
    need = plan.checkpoint_bytes * (run.keep_checkpoints + 1) + plan.export_bytes * exports
    there = [file for kind in ("checkpoint_*", "exports") for file in folder.glob(f"{kind}/**/*")] if folder else []
    need = max(0, need - sum(file.stat().st_size for file in there if file.is_file()))
    say(
        f"disk: {need / 2**30:.2f} GiB for {run.keep_checkpoints} + 1 checkpoints and {exports} exports in "
        f"{run.dir}{', less those that are there' if there else ''}; {disk / 2**30:.2f} GiB free"
    )
    if need > disk:
        raise placement.NotEnoughResources(
            f"run.dir = {run.dir!r} has too little space; lower run.keep_checkpoints, export less often "
            "(run.export_every), or point it elsewhere"
        )


def train_until_done(folder: RunFolder, attempt: Callable[[ExitStack], None]) -> None:
    """`attempt` goes on from the last commit to the end; it is called again when trainer ranks were lost.

    What it puts on the stack is undone when it ends, however it ends.
    """
    rebuilds, committed = 0, folder.last_committed()
    while True:
        folder.move_uncommitted_to_discarded(folder.last_committed())
        try:
            with ExitStack() as stack:
                return attempt(stack)
        except TrainerLost as error:
            rebuilds = rebuilds + 1 if folder.last_committed() == committed else 1
            committed = folder.last_committed()
            if rebuilds > TRAINER_REBUILDS:
                raise
            print(f"trainer lost ({error}); going on from step {committed or 0}", file=sys.stderr, flush=True)


def guarded(job: Callable[[], None], goes_on: str = "from the last checkpoint") -> Callable[[], None]:
    """A job whose stop by signal is told in one line that also says from where it `goes_on`."""

    def guarded_job() -> None:
        try:
            job()
        except KeyboardInterrupt:  # SIGTERM too, as Stopped
            print(f"stopped; the same command goes on {goes_on}", file=sys.stderr)
            sys.exit(130)

    return guarded_job


def say(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)
