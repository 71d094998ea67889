"""N ranks of one process group, started together, driven together and killed together.

Rank 0 opens a `TCPStore` on a port of its own and every rank joins over it. A method is called on all ranks at once; when
one fails or is late, all are killed (the others would wait in a collective) and `RankLost` is raised. Every wait has a
deadline, because Ray reports nothing for a process that is stopped. Left out: starting one rank anew (the caller builds a
new group) and what the ranks do.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any

import ray
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
    """What the group asks of every rank beside its own methods. A worker derives from it and has a method

    `join(host, port)`, which calls `self.rendezvous(host, port)` and starts the process group over that store.
    """

    rank: int

    def ping(self) -> None:
        """Answers when the rank is free."""

    def open_store(self) -> tuple[str, int]:
        """Rank 0: bind a free port on this node and return where it is."""
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def rendezvous(self, host: str, port: int) -> dist.Store:
        """The store that rank 0 opened."""
        return self._store if self.rank == 0 else dist.TCPStore(host, port, is_master=False)


class RankGroup:
    """The ranks, as the driver sees them: `all` runs a method on every rank and returns when all have answered."""

    def __init__(
        self,
        worker: type[Rank],
        arguments: Callable[[int], tuple],
        *,
        ranks: int,
        num_cpus: float,
        num_gpus: float,
        placement: PlacementGroup,
        timeout_s: float,
        meanwhile: Callable[[], None] = lambda: None,
        name: str = "rank",
        lost: type[RankLost] = RankLost,
    ):
        """Start `worker(*arguments(rank))` in the first `ranks` bundles of `placement` and join them.

        `timeout_s` is the deadline of every call, `meanwhile` is called again and again while ranks work, `name` is
        what messages call a rank, and `lost` is raised when one is gone.
        """
        self._timeout_s, self._meanwhile, self._lost = timeout_s, meanwhile, lost
        actor: Any = ray.remote(worker)
        self.workers = [
            actor.options(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            ).remote(*arguments(rank))
            for rank in range(ranks)
        ]
        try:
            host, port = ray.get(self.workers[0].open_store.remote(), timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self.kill()
            raise lost(f"{name} 0 did not start: {error}") from error
        self.all("join", lambda rank: (host, port))

    def all(
        self, method: str, arguments: Callable[[int], tuple] = lambda rank: (), *, timeout_s: float | None = None
    ) -> list[Any]:
        """Call `method` on every rank; on the first failure kill them all and raise.

        `timeout_s`: a deadline for this call other than the group's. Raises: `lost` for a rank that died or was late,
        else what the rank raised.
        """
        timeout_s = timeout_s or self._timeout_s
        calls = [getattr(worker, method).remote(*arguments(rank)) for rank, worker in enumerate(self.workers)]
        deadline = monotonic() + timeout_s
        waiting = dict(zip(calls, range(len(calls)), strict=True))
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=POLL_S)
                self._meanwhile()
                if not done and monotonic() < deadline:
                    continue
                if not done:
                    late = ", ".join(map(str, waiting.values()))
                    raise self._lost(f"{method}: rank {late} gave no answer in {timeout_s:.0f} s")
                ray.get(done, timeout=FETCH_TIMEOUT_S)
                waiting.pop(done[0])
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
        pings = [worker.ping.remote() for worker in self.workers]
        ready, _ = ray.wait(pings, num_returns=len(pings), timeout=PING_TIMEOUT_S)
        for ping in ready:
            try:
                ray.get(ping, timeout=PING_TIMEOUT_S)
            except ray.exceptions.RayActorError:
                return True
        return False

    def kill(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
