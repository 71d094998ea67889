"""The trainer actor group: N ranks of one `rlhf.trainer.Trainer`, driven together by a `RankGroup`.

The driver hands every rank its pairs as references; ranks fetch latents from the object store and conditions from the
cache. When one rank fails, all are killed and `TrainerLost` is raised: the caller builds a new group, which restores the
last committed checkpoint.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

import ray
import torch
from ray.util.placement_group import PlacementGroup

from actors import weights
from actors.rank_group import FETCH_TIMEOUT_S, Rank, RankGroup, RankLost
from actors.weights import Publication, PublishedBuffer
from rlhf import distributed
from rlhf.algorithms.objectives import DPO
from rlhf.config import OnlineDPOConfig
from rlhf.data.cache import ConditionCache
from rlhf.data.collate import collate
from rlhf.data.pairs import write_pairs
from rlhf.models import FAMILIES
from rlhf.run_folder import Fence
from rlhf.trainer import Trainer
from rlhf.types import Pair


class TrainerLost(RankLost):
    """A rank died or hung; the group is gone and training goes on from the last committed checkpoint."""


class TrainerWorker(Rank):
    """One rank. Each public method is called on every rank at once."""

    def __init__(self, rank: int, config: OnlineDPOConfig, fence: Fence):
        self.rank, self.config, self.fence = rank, config, fence

    def join(self, host: str, port: int) -> str:
        """Join the process group and load this rank's shard. Returns the host's name."""
        trainer = self.config.trainer
        device = "cuda" if trainer.num_gpus else "cpu"
        mesh = distributed.start(
            rank=self.rank,
            world=trainer.ranks,
            store=self.rendezvous(host, port),
            device=device,
            timeout_s=trainer.timeout_s,
        )
        family = FAMILIES[self.config.model.family](
            path=Path(self.config.model.path),
            guidance_scale=self.config.rollout.guidance_scale,
            dtype=torch.bfloat16 if trainer.mixed_precision == "bf16" else torch.float32,
        )
        objective = DPO(beta=self.config.dpo.beta)
        self.trainer = Trainer(family=family, config=trainer, objective=objective, mesh=mesh, seed=self.config.run.seed)
        self.cache = ConditionCache(Path(self.config.data.cache))
        return socket.gethostname()

    def step(self, step: int, pairs: Sequence[Pair], pairs_folder: Path) -> dict[str, float]:
        """Fetch, write the audit, train. `pairs` are this rank's own."""
        references = [side.latents for pair in pairs for side in (pair.winner, pair.loser)]
        latents = iter(ray.get(references, timeout=FETCH_TIMEOUT_S))
        pairs = [
            replace(
                pair,
                winner=replace(pair.winner, image=None, latents=next(latents)),
                loser=replace(pair.loser, image=None, latents=next(latents)),
            )
            for pair in pairs
        ]
        config, process = self.config, self.trainer.family.process
        first = self.rank * config.trainer.pairs_per_rank
        self.fence.check()
        write_pairs(
            pairs_folder / f"step_{step:06d}.rank_{self.rank}.parquet",
            pairs,
            process,
            seed=config.run.seed,
            step=step,
            first_index=first,
            save_latents=config.run.save_latents,
        )
        size = config.trainer.train_batch_size
        micro_batches = [
            collate(
                pairs[i : i + size],
                self.cache.condition,
                process,
                seed=config.run.seed,
                step=step,
                first_index=first + i,
            )
            for i in range(0, len(pairs), size)
        ]
        return self.trainer.step(micro_batches)

    def publish(self, which: str) -> list[PublishedBuffer]:
        self.fence.check()
        return weights.put(self.trainer.shards(which))

    def refresh_reference(self) -> None:
        self.trainer.refresh_reference()

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def restore(self, folder: Path) -> int:
        self.trainer.restore(folder)
        return self.trainer.steps

    def export(self, folder: Path) -> None:
        """`transformer/` and `ema_transformer/` (or `lora/` and `ema_lora/`) inside `folder`."""
        kind = "lora" if self.config.trainer.lora else self.trainer.family.denoiser_folder
        self.trainer.export(folder / kind)
        if self.trainer.ema:
            self.trainer.export(folder / f"ema_{kind}", which="ema")


class TrainerGroup:
    """The ranks, as the driver sees them. Every method runs on all ranks and returns when all have answered."""

    def __init__(
        self,
        config: OnlineDPOConfig,
        fence: Fence,
        placement: PlacementGroup,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        """`meanwhile` is called again and again while ranks work, so that rollouts go on."""
        trainer = config.trainer
        self.config, self._publish_s = config, 0.0
        self.group = RankGroup(
            TrainerWorker,
            lambda rank: (rank, config, fence),
            ranks=trainer.ranks,
            num_cpus=trainer.num_cpus,
            num_gpus=trainer.num_gpus,
            placement=placement,
            timeout_s=trainer.timeout_s,
            meanwhile=meanwhile,
            name="trainer rank",
            lost=TrainerLost,
        )

    def step(self, step: int, pairs: Sequence[Pair], pairs_folder: Path) -> dict[str, float]:
        """One optimizer update; rank r trains pairs [r·n, (r+1)·n), n = pairs per rank.

        Returns `train/…` scalars over all ranks, and the seconds of this step and of the last publish.
        """
        n = self.config.trainer.pairs_per_rank
        assert len(pairs) == n * self.config.trainer.ranks, "a step needs the same count of pairs on every rank"
        parts = [list(pairs[i : i + n]) for i in range(0, len(pairs), n)]
        started = monotonic()
        scalars = self.group.all("step", lambda rank: (step, parts[rank], pairs_folder))[0]
        times = {"time/train": monotonic() - started, "time/publish": self._publish_s}
        return {f"train/{name}": value for name, value in scalars.items()} | times

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
