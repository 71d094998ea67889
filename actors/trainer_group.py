"""The trainer actor group: N ranks of one `rlhf.trainer.Trainer`, driven together.

The driver hands every rank its pairs as references; ranks fetch latents from the object store and conditions from the
cache. When one rank fails, all are killed at once (the others would wait in a collective) and `TrainerLost` is raised: the
caller builds a new group, which restores the last committed checkpoint. Every wait has a deadline.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import weights
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

FETCH_TIMEOUT_S = 300.0
POLL_S = 0.1
PING_TIMEOUT_S = 5.0
LOST = (
    *(dist.DistBackendError, dist.DistNetworkError),
    *(ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError, ray.exceptions.GetTimeoutError),
)
"""What a rank raises when a peer, or the node that held its pairs' latents, is gone."""


class TrainerLost(RuntimeError):
    """A rank died or hung; the group is gone and training goes on from the last committed checkpoint."""


class TrainerWorker:
    """One rank. Each public method is called on every rank at once."""

    def __init__(self, rank: int, config: OnlineDPOConfig, fence: Fence):
        self.rank, self.config, self.fence = rank, config, fence

    def ping(self) -> None:
        """Answers when the rank is free."""

    def open_store(self) -> tuple[str, int]:
        """Rank 0: bind a free port on this node and return where it is."""
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, host: str, port: int) -> str:
        """Join the process group and load this rank's shard. Returns the host's name."""
        trainer = self.config.trainer
        device = "cuda" if trainer.num_gpus else "cpu"
        store = self._store if self.rank == 0 else dist.TCPStore(host, port, is_master=False)
        mesh = distributed.start(
            rank=self.rank, world=trainer.ranks, store=store, device=device, timeout_s=trainer.timeout_s
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
        self.config, self._meanwhile, self._publish_s = config, meanwhile, 0.0
        worker = ray.remote(TrainerWorker)
        self.workers = [
            worker.options(
                num_cpus=trainer.num_cpus,
                num_gpus=trainer.num_gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            ).remote(rank, config, fence)
            for rank in range(trainer.ranks)
        ]
        try:
            host, port = ray.get(self.workers[0].open_store.remote(), timeout=trainer.timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self.kill()
            raise TrainerLost(f"trainer rank 0 did not start: {error}") from error
        self._all("join", lambda rank: (host, port))

    def _all(self, method: str, arguments: Callable[[int], tuple] = lambda rank: ()) -> list[Any]:
        """Call `method` on every rank; on the first failure kill them all and raise."""
        calls = [getattr(worker, method).remote(*arguments(rank)) for rank, worker in enumerate(self.workers)]
        deadline = monotonic() + self.config.trainer.timeout_s
        waiting = dict(zip(calls, range(len(calls)), strict=True))
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=POLL_S)
                self._meanwhile()
                if not done and monotonic() < deadline:
                    continue
                if not done:
                    late = ", ".join(map(str, waiting.values()))
                    raise TrainerLost(f"{method}: rank {late} gave no answer in {self.config.trainer.timeout_s:.0f} s")
                ray.get(done, timeout=FETCH_TIMEOUT_S)
                waiting.pop(done[0])
        except ray.exceptions.RayActorError as error:
            self.kill()
            raise TrainerLost(f"{method}: a rank died: {error}") from error
        except ray.exceptions.RayTaskError as error:
            lost = isinstance(error.cause, LOST) or self._some_rank_is_dead()
            self.kill()
            if lost:
                raise TrainerLost(f"{method}: {error.cause}") from error
            raise error.as_instanceof_cause() from None
        except BaseException:
            self.kill()
            raise
        return ray.get(calls, timeout=FETCH_TIMEOUT_S)

    def _some_rank_is_dead(self) -> bool:
        """A rank whose peer died fails in its collective, often before Ray reports the death: then ask for it."""
        pings = [worker.ping.remote() for worker in self.workers]
        ready, _ = ray.wait(pings, num_returns=len(pings), timeout=PING_TIMEOUT_S)
        for ping in ready:
            try:
                ray.get(ping, timeout=PING_TIMEOUT_S)
            except ray.exceptions.RayActorError:
                return True
        return False

    def step(self, step: int, pairs: Sequence[Pair], pairs_folder: Path) -> dict[str, float]:
        """One optimizer update; rank r trains pairs [r·n, (r+1)·n), n = pairs per rank.

        Returns `train/…` scalars over all ranks, and the seconds of this step and of the last publish.
        """
        n = self.config.trainer.pairs_per_rank
        assert len(pairs) == n * len(self.workers), "a step needs the same count of pairs on every rank"
        parts = [list(pairs[i : i + n]) for i in range(0, len(pairs), n)]
        started = monotonic()
        scalars = self._all("step", lambda rank: (step, parts[rank], pairs_folder))[0]
        times = {"time/train": monotonic() - started, "time/publish": self._publish_s}
        return {f"train/{name}": value for name, value in scalars.items()} | times

    def publish(self, version: int, which: str = "policy") -> Publication:
        """`policy` or `ema` weights of all ranks in the object store."""
        started = monotonic()
        buffers = self._all("publish", lambda rank: (which,))
        self._publish_s = monotonic() - started
        return Publication(version=version, buffers=tuple(buffer for rank in buffers for buffer in rank))

    def refresh_reference(self) -> None:
        self._all("refresh_reference")

    def save(self, folder: Path) -> None:
        """The exact training state, by rows of whole tensors."""
        self._all("save", lambda rank: (folder,))

    def restore(self, folder: Path) -> int:
        """Read what `save` wrote; returns the number of steps done."""
        return self._all("restore", lambda rank: (folder,))[0]

    def export(self, folder: Path) -> None:
        """Weights that diffusers loads."""
        self._all("export", lambda rank: (folder,))

    def kill(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
