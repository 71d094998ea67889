"""The samplers of a run, as the driver has them: the shell around the machine that says who may get work.

`rlhf.rollouts.health` decides; here its commands (start, load) are carried out and it is told what happened.
Every answer that is waited for has a handler in one table, which whoever pumps the run owns. Left out: what the work is for
(`rollouts.py`).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray

from actors.judging import Waiting
from actors.publication import Publication
from actors.sampler import SampleRequest
from rlhf.errors import Refused, last_line
from rlhf.rollouts import health
from rlhf.tables import OnlineSamplersConfig

FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SampleWork:
    ticket: int
    bucket: Hashable
    """A batch holds one."""
    request: SampleRequest
    done: Callable[[int, ray.ObjectRef, ray.ObjectRef], None]
    """Gets the policy version and references to the medium and the latents."""
    lost: Callable[[str], None]
    """Gets the reason why the sampler died or hung: the work is to be given out again."""


class Fleet:
    """`load` weights, then `dispatch` from a queue of work. `new_sampler(index)` starts the actor of that index."""

    def __init__(
        self, new_sampler: Callable[[int], ray.actor.ActorHandle], table: OnlineSamplersConfig, waiting: Waiting
    ):
        self._new_sampler, self._waiting = new_sampler, waiting
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._in_sampling: dict[int, SampleWork] = {}
        self._publication: Publication | None = None
        self.count = table.count
        self.busy_s = 0.0
        """Seconds of sampling since whoever reads it set it to 0, over all samplers."""
        # The timeout is that of a start, a load, and a batch.
        restarts, timeout_s = table.max_restarts, table.timeout_s
        self._obey(health.start(table.count, max_restarts=restarts, timeout_s=timeout_s, now=monotonic()))

    @property
    def version(self) -> int:
        return self._publication.version if self._publication else -1

    def load(self, publication: Publication) -> None:
        """Make `publication` what every sampler must hold before it samples again. Does not wait: `StaleWeights`, for a checksum
        (of the bytes read back) that is not the published one, is raised when the answer comes.
        """
        self._publication = publication
        self._obey(health.published(self._health, publication.version, str(publication.checksum), monotonic()))

    def dispatch(self, queue: list[SampleWork]) -> None:
        """Give each healthy sampler a batch of one bucket, taken out of the queue: the first waiter of every slot."""
        for index in health.healthy(self._health):
            if not queue:
                break
            batch: dict[int, SampleWork] = {}
            for work in queue:
                if work.bucket == queue[0].bucket:
                    batch.setdefault(work.request.slot, work)
            queue[:] = [work for work in queue if batch.get(work.request.slot) is not work]
            self._send(index, list(batch.values()))

    def tick(self, open_groups: int, judging: int) -> None:
        """Let time pass: deadlines are looked at. Raises what the health machine does."""
        self._obey(health.ticked(self._health, open_groups, judging, monotonic()))

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def _obey(self, decided: health.Next) -> None:
        self._health, commands = decided
        for command in commands:
            match command:
                case health.Start(sampler=index, generation=generation):
                    if index in self._actors:
                        ray.kill(self._actors[index])
                    for ticket in command.tickets:
                        self._in_sampling.pop(ticket).lost(command.reason)
                    self._start(index, generation)
                case health.Load(sampler=index, generation=generation):
                    self._send_weights(index, generation)

    def _start(self, index: int, generation: int) -> None:
        self._actors[index] = self._new_sampler(index)
        ready = self._actors[index].__ray_ready__.remote()
        self._watch(ready, index, generation, lambda _: health.started(self._health, index, generation, monotonic()))

    def _send_weights(self, index: int, generation: int) -> None:
        assert self._publication is not None
        version, buffers = self._publication.version, self._publication.buffers
        manifests, arrays = [manifest for _, manifest in buffers], [reference for reference, _ in buffers]
        reference = self._actors[index].load.remote(version, manifests, *arrays)

        def acknowledged(answer: Any) -> health.Next:
            version, checksum = answer
            return health.loaded(self._health, index, generation, version, str(checksum), monotonic())

        self._watch(reference, index, generation, acknowledged)

    def _send(self, index: int, batch: list[SampleWork]) -> None:
        generation, started = self._health.samplers[index].generation, monotonic()
        sample = self._actors[index].sample.options(num_returns=1 + 2 * len(batch))
        references = sample.remote([work.request for work in batch])
        by_ticket = {work.ticket: work for work in batch}
        self._in_sampling |= by_ticket
        self._obey(health.dispatched(self._health, index, tuple(by_ticket), started))

        def replied(version: int) -> health.Next:
            self.busy_s += monotonic() - started
            if self._health.samplers[index].generation == generation:
                for work, media, latents in zip(batch, references[1::2], references[2::2], strict=True):
                    self._in_sampling.pop(work.ticket, None)
                    work.done(version, media, latents)
            return health.replied(self._health, index, generation, monotonic())

        self._watch(references[0], index, generation, replied)

    def _watch(
        self, reference: ray.ObjectRef, index: int, generation: int, event: Callable[[Any], health.Next]
    ) -> None:
        """When `reference` is there, carry out what `event(value)` decides, or what the death of the sampler does.

        Raises what the sampler refused.
        """

        def done(reference: ray.ObjectRef) -> None:
            try:
                value = ray.get(reference, timeout=FETCH_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Refused):
                    raise error.as_instanceof_cause() from None  # a new process would meet the same
                self._obey(health.died(self._health, index, generation, last_line(error), monotonic()))
            else:
                self._obey(event(value))

        self._waiting[reference] = done
