"""A trainer of one rank in this process, without Ray: for the miniature world, and for benchmarks of what is learnt."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.distributed.device_mesh import DeviceMesh

from rlhf.data.work import Work
from rlhf.diffusion.objectives import Objective
from rlhf.errors import Refused
from rlhf.loops.train import Duty, Source, train
from rlhf.models import load_family
from rlhf.models.trainable import Full, Trainable
from rlhf.runs.folder import RunFolder
from rlhf.runs.tracking import FileTracker
from rlhf.shards import distributed
from rlhf.tables import ModelTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainerConfig

Curve = list[tuple[int, float]]
"""(step, what was measured)."""
COLORS = ("tab:green", "tab:gray", "tab:red", "tab:blue")
FULL = Trainable(parts=(Full(),))
Handed = tuple[Any, Sequence[Any]]
"""What a source hands the rank for a step: the `handed` and `values` of `Work.batches`."""


def refuse_small(name: str, value: int, least: int) -> None:
    """Raise Refused for an argument below `least`."""
    if value < least:
        raise Refused(f"{name} = {value}: give {least} or more")


@contextmanager
def one_rank() -> Iterator[DeviceMesh]:
    """The mesh of this process alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these matrices are too small to share
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=600)
    try:
        yield mesh
    finally:
        distributed.stop()
        torch.set_num_threads(threads)


def trainer_table(*, batch: int, learning_rate: float, steps: int) -> TrainerConfig:
    return TrainerConfig(
        train_batch_size=batch,
        gradient_accumulation_steps=1,
        learning_rate=learning_rate,
        max_train_steps=steps,
        gradient_checkpointing="none",
        weight_decay=0.0,
    )


class OneRank:
    """`rlhf.loops.train.Trainer` in this process, which evaluates held-out examples too."""

    def __init__(
        self,
        model: ModelTable,
        config: TrainerConfig,
        objective: Objective,
        work: Work,
        mesh: DeviceMesh,
        seed: int,
        trainable: Trainable = FULL,
    ):
        family = load_family(model)
        self.trainer = Trainer(
            family=family, config=config, trainable=trainable, objective=objective, mesh=mesh, seed=seed
        )
        self._work = work
        work.open(family)

    def step(self, step: int, handed: Sequence[Handed] | None) -> dict[str, float]:
        work, values = handed[0] if handed else (None, ())
        scalars = self.trainer.step(self._work.batches(step, 0, work, values))
        return {f"train/{name}": value for name, value in scalars.items()}

    def held_out(self, name: str) -> float:
        return self.trainer.evaluate(self._work.held_out(0))[name]

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def restore(self, folder: Path) -> None:
        self.trainer.restore(folder)

    def export(self, folder: Path) -> None:
        kind = self.trainer.trainable.folder(self.trainer.family)
        self.trainer.export(folder / kind)
        if self.trainer.ema:
            self.trainer.export(folder / f"ema_{kind}", which="ema")


class NothingHanded:
    """The driver's half of work that the rank finds itself: `actors.sources.OfflineSource` without Ray."""

    def take(self, step: int) -> None:
        return None

    def metrics(self) -> dict[str, float]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None: ...


def train_in(
    run: RunFolder,
    source: Source,
    trainer: OneRank,
    duties: Sequence[Duty] = (),
    *,
    measure: Callable[[], Any] = lambda: None,
    every: int = 0,
) -> list[tuple[int, Any]]:
    """The loop in a claimed folder, which it releases. Returns what was measured every so many steps, from the start to the end.

    Raises: Refused where the last step is none of them.
    """
    steps = trainer.trainer.config.max_train_steps
    if every and steps % every:
        raise Refused(
            f"measured every {every} steps, {steps} steps end without a measurement: give a multiple of {every}"
        )
    curve: list[tuple[int, Any]] = []
    measuring = Duty(every=every, do=lambda step: curve.append((step, measure())), at_start=every > 0)
    tracker = FileTracker(run.path)
    try:
        train(steps, run, source, trainer, tracker, [*duties, measuring])
    finally:
        tracker.close()
        run.release()
    return curve


def warmth(images: Iterable[np.ndarray], prompts: object = None, items: object = None) -> list[float]:
    """Mean red − mean blue of uint8 (…, 3) pictures, −1 … 1. Also a judge."""
    means = [image.reshape(-1, 3).mean(axis=0) / 255 for image in images]
    return [float(mean[0] - mean[2]) for mean in means]


def plot(curves: Mapping[Any, Sequence[Curve]], out: Path, *, legend: str, measure: str, title: str) -> None:
    """A PNG. `legend` says what tells the runs apart, `measure` what the curves show."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for color, (way, runs) in zip(COLORS, curves.items(), strict=False):
        for number, run in enumerate(runs):
            axes.plot(*zip(*run, strict=True), color=color, label=None if number else way)
    axes.set(xlabel="step", ylabel=measure, title=title)
    axes.legend(title=legend)
    figure.savefig(out, dpi=120, bbox_inches="tight")
