"""The samplers of a run, as the driver has them: a queue of work, and the shell around the machine that says who may get it.

`rlhf.rollouts.health` decides; here its commands (start, kill, load, reissue) are carried out and it is told what happened. The
fleet holds references only. Every answer that is waited for has a handler in one table, which whoever pumps the run owns.

Left out: what the work is for (`rollouts.py`).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray

from actors.judging import Waiting
from actors.publication import Publication
from actors.sampler import SampleRequest
from rlhf.rollouts import health

FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One picture to sample."""

    ticket: int
    bucket: Hashable
    """A batch holds one."""
    request: SampleRequest
    done: Callable[[int, ray.ObjectRef, ray.ObjectRef], None]
    """Gets the policy version and references to the medium and the latents."""
    lost: Callable[[str], None]
    """The sampler died or hung, for this reason: the work is to be given out again."""


class Fleet:
    """`load` weights, then `dispatch` from a queue of work. `new_sampler(index)` starts the actor of that index."""

    def __init__(
        self,
        new_sampler: Callable[[int], ray.actor.ActorHandle],
        count: int,
        *,
        max_restarts: int,
        timeout_s: float,
        waiting: Waiting,
    ):
        """timeout_s: of a start, a load, and a batch."""
        self._new_sampler, self._timeout_s, self._waiting = new_sampler, timeout_s, waiting
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._in_sampling: dict[int, Work] = {}
        self._publication: Publication | None = None
        self.count = count
        self.busy_s = 0.0
        """Seconds of sampling since whoever reads it set it to 0, over all samplers."""
        limits = health.HealthLimits(max_restarts=max_restarts, start_timeout_s=timeout_s, load_timeout_s=timeout_s)
        self._health, commands = health.start(count, limits, monotonic())
        self._carry_out(commands)

    @property
    def version(self) -> int:
        """The newest publication's: a counter that never decreases within a driver."""
        return self._publication.version if self._publication else -1

    def load(self, publication: Publication) -> None:
        """Make `publication` what every sampler must hold before it samples again.

        Does not wait: a busy sampler finishes its batch first, and one whose acknowledged checksum (of the bytes it read
        back) is not the published one stops the run, with `StaleWeights`, when the answer comes.
        """
        self._publication = publication
        self._tell(health.Published(version=publication.version, checksum=str(publication.checksum)))

    def dispatch(self, queue: list[Work]) -> None:
        """Give each healthy sampler a batch of one bucket, taken out of the queue: the first waiter of every slot."""
        for index in health.healthy(self._health):
            if not queue:
                break
            batch: dict[int, Work] = {}
            for work in queue:
                if work.bucket == queue[0].bucket:
                    batch.setdefault(work.request.slot, work)
            queue[:] = [work for work in queue if batch.get(work.request.slot) is not work]
            self._send(index, list(batch.values()))

    def tick(self, open_groups: int, judging: int) -> None:
        """Let time pass: deadlines are looked at. Raises what the health machine does."""
        self._tell(health.Tick(open_groups=open_groups, judging=judging))

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    # --- the machine ---------------------------------------------------------------------------------------------------

    def _tell(self, event: Any) -> None:
        self._health, commands = health.advance(self._health, event, monotonic())
        self._carry_out(commands)

    def _carry_out(self, commands: Sequence[Any]) -> None:
        for command in commands:
            match command:
                case health.Start(sampler=index, generation=generation):
                    self._start(index, generation)
                case health.Kill(sampler=index):
                    ray.kill(self._actors[index])
                case health.Load(sampler=index, generation=generation):
                    self._send_weights(index, generation)
                case health.Reissue(tickets=tickets, reason=reason):
                    for ticket in tickets:
                        self._in_sampling.pop(ticket).lost(reason)

    def _start(self, index: int, generation: int) -> None:
        self._actors[index] = self._new_sampler(index)
        started = health.Started(sampler=index, generation=generation)
        self._watch(self._actors[index].ready.remote(), index, generation, lambda _: started)

    def _send_weights(self, index: int, generation: int) -> None:
        publication = self._publication
        assert publication is not None
        reference = self._actors[index].load.remote(
            publication.version,
            [buffer.manifest for buffer in publication.buffers],
            *(buffer.reference for buffer in publication.buffers),
        )

        def acknowledged(answer: Any) -> health.Event:
            version, checksum, _ = answer
            return health.LoadAcked(sampler=index, generation=generation, version=version, checksum=str(checksum))

        self._watch(reference, index, generation, acknowledged)

    def _send(self, index: int, batch: list[Work]) -> None:
        generation = self._health.samplers[index].generation
        started = monotonic()
        sample = self._actors[index].sample.options(num_returns=1 + 2 * len(batch))
        references = sample.remote([work.request for work in batch])
        self._in_sampling |= {work.ticket: work for work in batch}
        tickets = tuple(work.ticket for work in batch)
        self._tell(health.Dispatched(sampler=index, deadline=started + self._timeout_s, tickets=tickets))

        def replied(version: int) -> health.Event:
            self.busy_s += monotonic() - started
            if self._health.samplers[index].generation == generation:
                for position, work in enumerate(batch):
                    self._in_sampling.pop(work.ticket, None)
                    work.done(version, references[1 + 2 * position], references[2 + 2 * position])
            return health.Replied(sampler=index, generation=generation)

        self._watch(references[0], index, generation, replied)

    def _watch(self, reference: ray.ObjectRef, index: int, generation: int, event: Callable[[Any], Any]) -> None:
        """When `reference` is there, tell the health machine `event(value)`, or that the sampler died."""

        def done(reference: ray.ObjectRef) -> None:
            try:
                value = ray.get(reference, timeout=FETCH_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                self._tell(health.Died(sampler=index, generation=generation, reason=reason))
            else:
                self._tell(event(value))

        self._waiting[reference] = done
