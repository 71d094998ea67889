"""How jobs start: a Ray cluster of their own, on loopback, or a running one, and a stop that leaves nothing behind.

And how a run starts and goes on: cluster, folder, placement, disk, in this order and once for every job that trains; then
beginning again after lost ranks.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil
import ray
import torch
import xxhash
from ray import serve

from actors import placement
from actors.placement import Role
from actors.trainer import TrainerLost
from jobs import ray_start
from jobs.cli import say
from rlhf.models.trainable import Counts
from rlhf.runs.folder import RunFolder, check_place
from rlhf.section import ClusterConfig
from rlhf.tables import RunConfig
from rlhf.training_tables import TrainerConfig
from serve_apps import deploy

SETTLES_S = 5
TRAINER_REBUILDS = 3
"""Times that a lost trainer group is rebuilt without a new commit in between before the run gives up."""


def address(config: ClusterConfig) -> str:
    """`cluster.address`, else RAY_ADDRESS, else "local": a cluster of the job's own."""
    return config.address or os.environ.get("RAY_ADDRESS") or ray_start.LOCAL


@contextmanager
def cluster(config: ClusterConfig, namespace: str) -> Iterator[None]:
    """Connect to the configured cluster, or start one; disconnect or end it on the way out, whatever happened.

    Within the block SIGTERM (`ray job stop`, a scheduler) unwinds as Ctrl-C does, the only thing that Ray's waits let through,
    so that `finally` clauses run within the seconds before SIGKILL.
    """
    if ray.is_initialized():  # a job inside another, as in the demo: the outer one's cluster
        yield
        return
    target = address(config)
    # Workers import the project by its installed (editable) name; PYTHONPATH also serves a plain checkout, and modules of
    # the user's that a recipe names (judges.python).
    places = [str(Path(__file__).resolve().parents[1]), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(":")]
    environment = {"env_vars": {"PYTHONPATH": ":".join(filter(None, places)), "HF_HUB_OFFLINE": "1"}}
    sizes = {"num_cpus": config.num_cpus, "object_store_memory": config.object_store_memory}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray_start.start(target, sizes, namespace=namespace, runtime_env=environment)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # after init, whose handler ends the process at once
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def dashboard() -> str | None:
    """The address of the running cluster's dashboard, if it has one."""
    url = ray._private.worker.global_worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None


def free_resources(config: ClusterConfig) -> dict[str, float]:
    """What a job could reserve now: of the connected cluster, or of this machine where the job would start its own."""
    if ray.is_initialized():
        return ray.available_resources()
    if address(config) != ray_start.LOCAL:
        with cluster(config, "dry-run"):
            return ray.available_resources()
    ray_start.check(ray_start.LOCAL)
    ray_start.check_store(config.object_store_memory)
    return {
        "CPU": float(config.num_cpus or os.cpu_count() or 1),
        "GPU": float(torch.cuda.device_count()),
        "memory": float(psutil.virtual_memory().available),
    }


def settled(roles: Sequence[Role], config: ClusterConfig) -> dict[str, float]:
    """What is free, as soon as it is enough for the roles: Ray counts what a task took for a moment after its end, and the check
    of the examples has only just ended. SETTLES_S later whatever is free.
    """
    ends = monotonic() + SETTLES_S
    while True:
        free = free_resources(config)
        try:
            placement.check(roles, free)
            return free
        except placement.NotEnoughResources:
            if monotonic() > ends:
                return free
        sleep(0.1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs of the machines."""

    roles: Sequence[Role]
    trainer: TrainerConfig
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run that may write into its folder."""

    folder: RunFolder
    name: str
    """Unique in the cluster, also beside a run of the same name in another run.dir; the same again on a resume."""
    stack: ExitStack
    """What is to be undone when the run ends, whatever happened."""


def dry_run(run: RunConfig, plan: Plan, config: ClusterConfig, recipe: str) -> None:
    """Print whether a run would be resumed, what each role needs against what is free, and the disk space. Starts nothing.

    recipe: the resolved configuration. Raises Refused.
    """
    say(RunFolder.foreseen(run.dir, run.name, recipe, run.resume))
    free = free_resources(config)
    say(placement.table(plan.roles, free))
    check_disk(run, plan)
    placement.check(plan.roles, free)


@contextmanager
def launch(run: RunConfig, plan: Plan, config: ClusterConfig, recipe: str) -> Iterator[Started]:
    """Connect to the cluster or start one, claim the run's folder, and refuse what does not fit.

    recipe: the resolved configuration, which the folder keeps. Raises Refused.
    """
    with cluster(config, namespace=run.name), ExitStack() as stack:
        folder = RunFolder.claim(run.dir, run.name, recipe, run.resume)
        stack.callback(folder.release)
        say(f"run folder: {folder.path}{' (resumed)' if folder.resumed else ''}; dashboard: {dashboard()}")
        name = f"{run.name}-{folder.path.name}-{xxhash.xxh3_64_hexdigest(str(folder.path).encode())[:6]}"
        running = serve.status().applications if any(role.judge for role in plan.roles) else {}
        # Not the judges that an earlier start of this run left behind.
        needed = [role for role in plan.roles if not (role.judge and deploy.app_name(name, role.judge) in running)]
        free = settled(needed, config)
        say(placement.table(needed, free))
        placement.check(needed, free)
        placement.check_shared("run.dir", folder.path)
        check_disk(run, plan, folder.path)
        yield Started(folder=folder, name=name, stack=stack)


def check_disk(run: RunConfig, plan: Plan, folder: Path | None = None) -> None:
    """Print what checkpoints and exports need, less what the run's `folder` has of them. Raises Refused."""
    check_place(Path(run.dir), "run.dir")
    disk = shutil.disk_usage(next(p for p in (Path(run.dir), *Path(run.dir).parents) if p.exists())).free
    exports = 1 + (plan.trainer.max_train_steps // run.export_every if run.export_every else 0)
    need = placement.checkpoint_bytes(plan.trainer, plan.counts) * (run.keep_checkpoints + 1)
    need += placement.export_bytes(plan.trainer, plan.counts, run.export_dtype) * exports
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
