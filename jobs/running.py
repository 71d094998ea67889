"""What jobs that can go on share: beginning again after lost ranks, room on the disk, names, and a stop in one line."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import xxhash

from actors import placement
from actors.trainer import TrainerLost
from rlhf.offline_config import TrainingConfig
from rlhf.runs.folder import RunFolder

TRAINER_REBUILDS = 3
"""Times that a lost trainer group is rebuilt without a new commit in between before the run gives up."""


def unique_name(config: TrainingConfig, folder: RunFolder) -> str:
    """Unique in the cluster, also beside a run of the same name in another run.dir; the same again on a resume."""
    return f"{config.run.name}-{folder.path.name}-{xxhash.xxh3_64_hexdigest(str(folder.path).encode())[:6]}"


def check_disk(config: TrainingConfig, run: Path | None = None) -> None:
    """Print what checkpoints and exports need, less what the folder `run` has of them. Raises NotEnoughResources."""
    settings = config.run
    folder = next(p for p in (Path(settings.dir), *Path(settings.dir).parents) if p.exists())
    disk = shutil.disk_usage(folder).free
    exports = 1 + (config.trainer.max_train_steps // settings.export_every if settings.export_every else 0)
    need = (
        placement.checkpoint_bytes(config) * (settings.keep_checkpoints + 1) + placement.export_bytes(config) * exports
    )
    there = [file for kind in ("checkpoint_*", "exports") for file in run.glob(f"{kind}/**/*")] if run else []
    need = max(0, need - sum(file.stat().st_size for file in there if file.is_file()))
    print(
        f"disk: {need / 2**30:.2f} GiB for {settings.keep_checkpoints} + 1 checkpoints and {exports} exports in "
        f"{settings.dir}{', less those that are there' if there else ''}; {disk / 2**30:.2f} GiB free"
    )
    if need > disk:
        raise placement.NotEnoughResources(
            f"run.dir = {settings.dir!r} has too little space; lower run.keep_checkpoints, export less often "
            "(run.export_every), or point it elsewhere"
        )


def train_until_done(folder: RunFolder, train: Callable[[], None]) -> None:
    """`train()` goes on from the last commit to the end; it is called again when trainer ranks were lost."""
    rebuilds, committed = 0, folder.last_committed()
    while True:
        folder.move_uncommitted_to_discarded(folder.last_committed())
        try:
            return train()
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
