"""What the training loop is given by the benchmarks of learning: a trainer of one rank in this process, without Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.work import Work
from rlhf.loops.train import Duty, Source, train
from rlhf.runs.folder import RunFolder
from rlhf.runs.tracking import FileTracker
from rlhf.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What a source hands the rank for a step."""

    work: Any = None
    values: Sequence[Any] = ()


class OneRank:
    """`rlhf.loops.train.Trainer`, and the evaluation of what the work holds out."""

    def __init__(self, trainer: Trainer, work: Work):
        self.trainer, self._work = trainer, work
        work.open(trainer.family)

    def step(self, step: int, handed: Sequence[Handed] | None) -> dict[str, float]:
        given = handed[0] if handed else Handed()
        scalars = self.trainer.step(self._work.batches(step, 0, given.work, given.values))
        return {f"train/{name}": value for name, value in scalars.items()}

    def evaluate(self) -> dict[str, float]:
        return self.trainer.evaluate(self._work.held_out(0))

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def restore(self, folder: Path) -> int:
        self.trainer.restore(folder)
        return self.trainer.steps

    def export(self, folder: Path) -> None:
        self.trainer.export(folder / self.trainer.trainable.folder(self.trainer.family))


def train_in(run: RunFolder, steps: int, source: Source, trainer: OneRank, duties: Sequence[Duty]) -> Path:
    """The loop in a claimed folder, which it releases; returns the folder of the final weights."""
    tracker = FileTracker(run.path)
    try:
        train(steps, run, source, trainer, tracker, duties)
    finally:
        tracker.close()
        run.release()
    return run.path / "final"
