"""N ranks of one process group, started together, driven together and killed together.

When one fails or is late, all are killed: the others would wait in a collective. Every wait has a deadline, because Ray reports
nothing for a process that is stopped. Left out: starting one rank anew (the caller builds a new group) and what the ranks do.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import ray
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf.rewards.ctr.config import CTRTrainConfig
from rlhf.training_tables import TrainerConfig

FETCH_TIMEOUT_S = 300.0
POLL_S = 0.1
PING_TIMEOUT_S = 5.0
LOST = (
    *(dist.DistBackendError, dist.DistNetworkError),
    *(ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError, ray.exceptions.GetTimeoutError),
)
"""What a rank raises when a peer, or the node that held its input, is gone."""


class RankLost(RuntimeError):
    """A rank died or hung; the group is gone."""


class Rank:
    """What a worker derives from. Its methods are called on every rank at once, first `join(host, port)`, which starts the
    process group over `rendezvous(host, port)`.
    """

    rank: int

    def open_store(self) -> tuple[str, int]:
        """Rank 0: open a store on a free port of this node and return where it is."""
        host = ray.util.get_node_ip_address()
        fd = None
        if ipaddress.ip_address(host).is_loopback:  # where torch's own socket would listen on every address
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            fd = socket.create_server((host, 0), family=family).detach()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, master_listen_fd=fd)
        return host, self._store.port

    def rendezvous(self, host: str, port: int) -> dist.Store:
        if ipaddress.ip_address(host).is_loopback:  # then all ranks are on this machine, and keep to it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        return self._store if self.rank == 0 else dist.TCPStore(host, port, is_master=False)


class RankGroup:
    """The ranks, as the driver sees them: `all` runs a method on every rank and returns when all have answered."""

    def __init__(
        self,
        worker: type[Rank],
        table: TrainerConfig | CTRTrainConfig,
        placement: PlacementGroup,
        *arguments: Any,
        meanwhile: Callable[[], None] = lambda: None,
        name: str = "rank",
        lost: type[RankLost] = RankLost,
    ):
        """Start `worker(rank, *arguments)` in the first bundles of `placement` and join them.

        table: its timeout_s is the deadline of every call. meanwhile: called again and again while ranks work. name: what
        messages call a rank. lost: raised when one is gone.
        """
        self._timeout_s, self._meanwhile, self._lost = table.timeout_s, meanwhile, lost
        actor: Any = ray.remote(worker)
        fixed = {"num_cpus": table.num_cpus, "num_gpus": table.num_gpus, "max_restarts": 0, "max_task_retries": 0}
        bundles = (PlacementGroupSchedulingStrategy(placement, rank) for rank in range(table.ranks))
        self.workers = [
            actor.options(**fixed, scheduling_strategy=bundle).remote(rank, *arguments)
            for rank, bundle in enumerate(bundles)
        ]
        try:
            store = ray.get(self.workers[0].open_store.remote(), timeout=table.timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self.kill()
            raise lost(f"{name} 0 did not start: {error}") from error
        self.all("join", *store)

    def all(self, method: str, *arguments: Any, each: Sequence[Any] = (), timeout_s: float | None = None) -> list[Any]:
        """Call `method` on every rank; on the first failure kill them all and raise `lost` or what the rank raised.

        each: a last argument for each rank. timeout_s: a deadline for this call other than the group's.
        """
        timeout_s = timeout_s or self._timeout_s
        calls = [
            getattr(one, method).remote(*arguments, *each[rank : rank + 1]) for rank, one in enumerate(self.workers)
        ]
        deadline = monotonic() + timeout_s
        waiting = {call: rank for rank, call in enumerate(calls)}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=POLL_S)
                self._meanwhile()
                if done:
                    ray.get(done, timeout=FETCH_TIMEOUT_S)
                    waiting.pop(done[0])
                elif monotonic() >= deadline:
                    late = ", ".join(map(str, waiting.values()))
                    raise self._lost(f"{method}: rank {late} gave no answer in {timeout_s:.0f} s")
        except ray.exceptions.RayActorError as error:
            self.kill()
            raise self._lost(f"{method}: a rank died: {error}") from error
        except ray.exceptions.RayTaskError as error:
            lost = isinstance(error.cause, LOST) or self._some_rank_is_dead()
            self.kill()
            if lost:
                raise self._lost(f"{method}: {error.cause}") from error
            raise error.as_instanceof_cause() from None
        except BaseException:
            self.kill()
            raise
        return ray.get(calls, timeout=FETCH_TIMEOUT_S)

    def _some_rank_is_dead(self) -> bool:
        """A rank whose peer died fails in its collective, often before Ray reports the death: then ask for it."""
        pings = [worker.__ray_ready__.remote() for worker in self.workers]
        ready, _ = ray.wait(pings, num_returns=len(pings), timeout=PING_TIMEOUT_S)
        try:
            ray.get(ready, timeout=PING_TIMEOUT_S)
        except ray.exceptions.RayActorError:
            return True
        return False

    def kill(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
