"""The training loop: take work, step, log, then whatever is due.

`source` and `trainer` are whatever has the methods below: Ray actors in a run (`actors/`), objects of one process in tests. The
loop holds references, scores and counters; no tensor ever lands here. A step is one optimizer update; row and file number s
belong to the s-th update.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.runs.folder import RunFolder


class Source(Protocol):
    """The driver's half of a source of work; the worker's half is `rlhf.data.work`."""

    def take(self, step: int) -> Sequence[Any] | None:
        """For the update after `step` updates, what each rank is handed; None: ranks find their work themselves."""

    def metrics(self) -> Mapping[str, float]:
        """Scalars since the last call."""

    def snapshot(self) -> Mapping[str, Any]:
        """What a resume needs, JSON-able."""

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """Go on after `step` updates from a snapshot; None: from the start. The trainer is restored already."""


class Trainer(Protocol):
    def step(self, step: int, handed: Sequence[Any] | None) -> dict[str, float]: ...
    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> int: ...
    def export(self, folder: Path) -> None: ...


class Tracker(Protocol):
    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What is done after every so many steps."""

    every: int
    """0: never."""
    do: Callable[[int], None]
    """Gets the number of steps done."""
    at_start: bool = False
    """Also before the first step of a run, with 0."""

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


def train(
    steps: int, run: RunFolder, source: Source, trainer: Trainer, tracker: Tracker, duties: Sequence[Duty]
) -> None:
    """Run from the last committed step to `steps`, then export into final/. Duties that are due are done in their order."""
    step = resume(run, source, trainer)
    if step == 0:
        for duty in duties:
            if duty.at_start:
                duty.do(0)
    while step < steps:
        handed = source.take(step)
        step += 1
        tracker.log(step, {**trainer.step(step, handed), **source.metrics()})
        for duty in duties:
            if duty.due(step):
                duty.do(step)
    trainer.export(run.begin_final())
    run.finish()


def resume(run: RunFolder, source: Source, trainer: Trainer) -> int:
    """Restore the last committed step, if there is one, and return it."""
    step, saved = run.last_committed(), None
    if step is not None:
        state = run.checkpoint_path(step) / "state"
        trainer.restore(state)
        saved = json.loads((state / "source.json").read_text())
    source.restore(step or 0, saved)
    return step or 0


def commit(run: RunFolder, source: Source, trainer: Trainer, keep: int) -> Callable[[int], None]:
    """The duty that writes everything a resume needs, then the marker that makes it count, then removes what is older."""

    def do(step: int) -> None:
        folder = run.begin_checkpoint(step)
        trainer.save(folder / "state")
        (folder / "state" / "source.json").write_text(json.dumps(source.snapshot()))
        run.commit(step)
        run.prune(keep)

    return do


def export(run: RunFolder, trainer: Trainer) -> Callable[[int], None]:
    """The duty that exports loadable weights, which stay. It comes before `commit`, so that a resume cannot miss them."""

    def do(step: int) -> None:
        trainer.export(run.begin_export(step))
        run.finish_export(step)

    return do
