"""Offline preference tuning: the loop. Which pairs an update trains on follows from its number, so a step is the whole state.

`trainer` is whatever has the methods below: Ray actors in a run (`actors/offline_trainer.py`), objects of one process in
tests. A step is one optimizer update; row and file number s belong to the s-th update.
"""

from pathlib import Path
from typing import Protocol

from rlhf.loops.online_dpo import Exporter, due, export
from rlhf.offline_config import OfflineDPOConfig
from rlhf.runs.folder import RunFolder


class Trainer(Exporter, Protocol):
    def step(self, step: int) -> dict[str, float]: ...
    def evaluate(self) -> dict[str, float]: ...
    def refresh_reference(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> int: ...


class Tracker(Protocol):
    def log(self, step: int, scalars: dict[str, float]) -> None: ...


def offline_dpo(config: OfflineDPOConfig, run: RunFolder, trainer: Trainer, tracker: Tracker) -> None:
    """Run from the last committed step to `trainer.max_train_steps`, then export into final/."""
    step = resume(run, trainer)
    if step == 0:
        evaluate(0, trainer, tracker)
    while step < config.trainer.max_train_steps:
        step += 1
        tracker.log(step, trainer.step(step))
        if due(step, config.dpo.reference_refresh_every) and config.objective == "dpo":
            trainer.refresh_reference()
        if due(step, config.eval.every):
            evaluate(step, trainer, tracker)
        if due(step, config.run.export_every):
            export(run, step, trainer)
        if due(step, config.run.save_every):
            commit(config, run, step, trainer)
    trainer.export(run.begin_final())
    run.finish()


def resume(run: RunFolder, trainer: Trainer) -> int:
    """Restore the last committed step, if any, and return it."""
    step = run.last_committed()
    if step is not None:
        trainer.restore(run.checkpoint_path(step) / "state")
    return step or 0


def evaluate(step: int, trainer: Trainer, tracker: Tracker) -> None:
    """Loss and implicit accuracy on held-out pairs, always at the same noise; nothing where there are none."""
    scalars = trainer.evaluate()
    if scalars:
        tracker.log(step, scalars)


def commit(config: OfflineDPOConfig, run: RunFolder, step: int, trainer: Trainer) -> None:
    """Write everything a resume needs, then the marker that makes it count, then remove what is older."""
    folder = run.begin_checkpoint(step)
    trainer.save(folder / "state")
    run.commit(step)
    run.prune(config.run.keep_checkpoints)
