"""The trainer actor group: N ranks of one `rlhf.training.trainer.Trainer`, driven together by a `RankGroup`.

What a rank trains on is its worker's business: `online_trainer.py` has pairs handed to it as references, `offline_trainer.py`
finds its own. When one rank fails, all are killed and `TrainerLost` is raised: the caller builds a new group, which restores
the last committed checkpoint.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch
from ray.util.placement_group import PlacementGroup

from actors.publication import Publication, PublishedBuffer, put
from actors.ranks import Rank, RankGroup, RankLost
from rlhf.data.cache import ConditionCache
from rlhf.diffusion.objectives import Objective
from rlhf.models.family import Family
from rlhf.offline_config import TrainingConfig
from rlhf.runs.folder import Fence
from rlhf.shards import distributed
from rlhf.training.trainer import Trainer


class TrainerLost(RankLost):
    """A rank died or hung; the group is gone and training goes on from the last committed checkpoint."""


class TrainerWorker(Rank):
    """One rank. Each public method is called on every rank at once; `step` and `objective` are a kind's own."""

    def __init__(self, rank: int, config: TrainingConfig, fence: Fence):
        self.rank, self.config, self.fence = rank, config, fence

    def objective(self) -> Objective:
        raise NotImplementedError

    def family(self) -> Family:
        raise NotImplementedError

    def join(self, host: str, port: int) -> str:
        """Join the process group and load this rank's shard. Returns the host's name."""
        trainer = self.config.trainer
        mesh = distributed.start(
            rank=self.rank,
            world=trainer.ranks,
            store=self.rendezvous(host, port),
            device="cuda" if trainer.num_gpus else "cpu",
            timeout_s=trainer.timeout_s,
        )
        family, seed = self.family(), self.config.run.seed
        self.trainer = Trainer(family=family, config=trainer, objective=self.objective(), mesh=mesh, seed=seed)
        self.cache = ConditionCache(Path(self.config.data.cache))
        return socket.gethostname()

    def publish(self, which: str) -> list[PublishedBuffer]:
        self.fence.check()
        return put(self.trainer.shards(which))

    def refresh_reference(self) -> None:
        self.trainer.refresh_reference()

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def restore(self, folder: Path) -> int:
        self.trainer.restore(folder)
        return self.trainer.steps

    def export(self, folder: Path) -> None:
        """`transformer/` and `ema_transformer/` (or `lora/` and `ema_lora/`) inside `folder`."""
        dtype = getattr(torch, self.config.run.export_dtype)
        kind = "lora" if self.config.trainer.lora else self.trainer.family.denoiser_folder
        self.trainer.export(folder / kind, dtype=dtype)
        if self.trainer.ema:
            self.trainer.export(folder / f"ema_{kind}", which="ema", dtype=dtype)


class TrainerGroup:
    """The ranks, as the driver sees them. Every method runs on all ranks and returns when all have answered."""

    def __init__(
        self,
        worker: type[TrainerWorker],
        arguments: Callable[[int], tuple],
        config: TrainingConfig,
        placement: PlacementGroup,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        """`worker(*arguments(rank))` is started for every rank; `meanwhile` is called again and again while ranks work."""
        trainer = config.trainer
        self.config, self._publish_s = config, 0.0
        self.group = RankGroup(
            worker,
            arguments,
            ranks=trainer.ranks,
            num_cpus=trainer.num_cpus,
            num_gpus=trainer.num_gpus,
            placement=placement,
            timeout_s=trainer.timeout_s,
            meanwhile=meanwhile,
            name="trainer rank",
            lost=TrainerLost,
        )

    def train(self, arguments: Callable[[int], tuple]) -> dict[str, float]:
        """One optimizer update, each rank with its own arguments: `train/…` scalars over all ranks, and its seconds."""
        started = monotonic()
        scalars = self.group.all("step", arguments)[0]
        return {f"train/{name}": value for name, value in scalars.items()} | {"time/train": monotonic() - started}

    def publish(self, version: int, which: str = "policy") -> Publication:
        """`policy` or `ema` weights of all ranks in the object store."""
        started = monotonic()
        buffers = self.group.all("publish", lambda rank: (which,))
        self._publish_s = monotonic() - started
        return Publication(version=version, buffers=tuple(buffer for rank in buffers for buffer in rank))

    def refresh_reference(self) -> None:
        self.group.all("refresh_reference")

    def save(self, folder: Path) -> None:
        """The exact training state, by rows of whole tensors."""
        self.group.all("save", lambda rank: (folder,))

    def restore(self, folder: Path) -> int:
        """Read what `save` wrote; returns the number of steps done."""
        return self.group.all("restore", lambda rank: (folder,))[0]

    def export(self, folder: Path) -> None:
        """Weights that diffusers loads."""
        self.group.all("export", lambda rank: (folder,))

    def kill(self) -> None:
        self.group.kill()
