"""The trainer actor group: N ranks of one `rlhf.training.trainer.Trainer`, driven together by a `RankGroup`.

What a rank trains on is its `Work`'s business (`rlhf.data.work`); what it is handed for a step comes from the driver's half of
the source (`sources.py`). When one rank fails, all are killed and `TrainerLost` is raised: the caller builds a new group, which
restores the last committed checkpoint.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup

from actors.publication import Publication, PublishedBuffer, put
from actors.ranks import FETCH_TIMEOUT_S, Rank, RankGroup, RankLost
from rlhf.data.work import Work
from rlhf.diffusion.objectives import Objective
from rlhf.models import load_family
from rlhf.models.trainable import Trainable
from rlhf.runs.folder import Fence
from rlhf.shards import distributed
from rlhf.tables import ModelTable, TrainerConfig
from rlhf.training.trainer import Trainer


class TrainerLost(RankLost):
    """A rank died or hung; the group is gone and training goes on from the last committed checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What the driver hands one rank for a step."""

    work: Any = None
    references: tuple[ray.ObjectRef, ...] = ()
    """Fetched in the rank: `Work.batches` gets what they stand for."""


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What every rank is made of."""

    model: ModelTable
    trainer: TrainerConfig
    trainable: Trainable
    objective: Objective
    work: Work
    fence: Fence
    seed: int
    export_dtype: str


class TrainerWorker(Rank):
    """One rank. Each public method is called on every rank at once."""

    def __init__(self, rank: int, setup: RankSetup):
        self.rank, self._setup = rank, setup

    def join(self, host: str, port: int) -> str:
        """Join the process group, load this rank's shard and open its work. Returns the host's name."""
        setup = self._setup
        mesh = distributed.start(
            rank=self.rank,
            world=setup.trainer.ranks,
            store=self.rendezvous(host, port),
            device="cuda" if setup.trainer.num_gpus else "cpu",
            timeout_s=setup.trainer.timeout_s,
        )
        family = load_family(setup.model)
        self.trainer = Trainer(
            family=family,
            config=setup.trainer,
            trainable=setup.trainable,
            objective=setup.objective,
            mesh=mesh,
            seed=setup.seed,
        )
        setup.work.open(family)
        return socket.gethostname()

    def step(self, step: int, handed: Handed) -> dict[str, float]:
        """One optimizer update on this rank's work."""
        values = ray.get(list(handed.references), timeout=FETCH_TIMEOUT_S)
        return self.trainer.step(self._setup.work.batches(step, self.rank, handed.work, values))

    def evaluate(self) -> dict[str, float]:
        """The objective on this rank's share of what is held out."""
        return self.trainer.evaluate(self._setup.work.held_out(self.rank))

    def publish(self, side: str) -> list[PublishedBuffer]:
        self._setup.fence.check()
        return put(self.trainer.shards(side))

    def refresh(self, side: str, decay: float) -> None:
        self.trainer.refresh(side, decay)

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def restore(self, folder: Path) -> int:
        self.trainer.restore(folder)
        return self.trainer.steps

    def export(self, folder: Path) -> None:
        """`transformer/` and `ema_transformer/` (of a LoRA `lora/` and `ema_lora/`, and so on) inside `folder`."""
        dtype = getattr(torch, self._setup.export_dtype)
        kind = self.trainer.trainable.folder(self.trainer.family)
        self.trainer.export(folder / kind, dtype=dtype)
        if self.trainer.ema:
            self.trainer.export(folder / f"ema_{kind}", which="ema", dtype=dtype)


class TrainerGroup:
    """The ranks, as the driver sees them. Every method runs on all ranks and returns when all have answered."""

    def __init__(self, setup: RankSetup, placement: PlacementGroup, meanwhile: Callable[[], None] = lambda: None):
        """`meanwhile` is called again and again while ranks work, so that rollouts go on."""
        trainer = setup.trainer
        self._publish_s: float | None = None
        self._group = RankGroup(
            TrainerWorker,
            lambda rank: (rank, setup),
            ranks=trainer.ranks,
            num_cpus=trainer.num_cpus,
            num_gpus=trainer.num_gpus,
            placement=placement,
            timeout_s=trainer.timeout_s,
            meanwhile=meanwhile,
            name="trainer rank",
            lost=TrainerLost,
        )

    def step(self, step: int, handed: Sequence[Handed] | None) -> dict[str, float]:
        """One optimizer update: `train/…` scalars over all ranks, the seconds of this step and of the last publish."""
        started = monotonic()
        scalars = self._group.all("step", lambda rank: (step, handed[rank] if handed else Handed()))[0]
        seconds = {"time/train": monotonic() - started}
        if self._publish_s is not None:
            seconds["time/publish"] = self._publish_s
        return {f"train/{name}": value for name, value in scalars.items()} | seconds

    def evaluate(self) -> dict[str, float]:
        """`eval/…` scalars of the objective on what is held out."""
        return {f"eval/{name}": value for name, value in self._group.all("evaluate")[0].items()}

    def publish(self, version: int, side: str = "policy") -> Publication:
        """`policy` or `ema` weights of all ranks in the object store."""
        started = monotonic()
        buffers = self._group.all("publish", lambda rank: (side,))
        self._publish_s = monotonic() - started
        return Publication(version=version, buffers=tuple(buffer for rank in buffers for buffer in rank))

    def refresh(self, side: str, decay: float = 0.0) -> None:
        """side ← decay · side + (1 − decay) · policy."""
        self._group.all("refresh", lambda rank: (side, decay))

    def save(self, folder: Path) -> None:
        """The exact training state, by rows of whole tensors."""
        self._group.all("save", lambda rank: (folder,))

    def restore(self, folder: Path) -> int:
        """Read what `save` wrote; returns the number of steps done."""
        return self._group.all("restore", lambda rank: (folder,))[0]

    def export(self, folder: Path) -> None:
        """Weights that diffusers loads."""
        self._group.all("export", lambda rank: (folder,))

    def kill(self) -> None:
        self._group.kill()
