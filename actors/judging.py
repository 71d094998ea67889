"""The driver's side of judging: media are asked about by reference, the answers come back, and no pixel passes through here.

`Judging` keeps a judging actor: it bounds the calls in flight, and replaces the actor when it dies or does not answer. A caller
with an event loop, like rollouts, gives the table of what it waits for, and pumps it. `judge_all` is the loop for callers
without one: media in files are read by tasks beside the data and judged, and the answers are yielded as they come.

Left out: what a failed judge means (`rlhf.rollouts`), and reading itself (`actors.reading`).
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, TypeVar

import ray

from actors.judges import FIRST_BACKOFF_S, Answer, Judges, PixelsLost
from actors.placement import JUDGES_CPUS
from rlhf.errors import Refused, last_line
from rlhf.rewards.config import JudgesConfig
from rlhf.types import Prompt

FETCH_TIMEOUT_S = 60.0
SILENT = 3.0
"""Times the timeouts, retries and backoffs of one judge: a medium is judged by the filter and then by the rewards."""
START_S = 300.0
"""What a new actor is given on top, until its first answer."""
ASKED_AT_ONCE = 1000
"""Media that the judging actor works on at a time; further ones wait here."""
READS_AT_ONCE = 4
"""Tasks that read media, or whose media are being judged, at a time: a bound on what is in the object store."""
READ_TIMEOUT_S = 600.0
POLL_S = 1.0

Waiting = dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]]
"""What a driver waits for, and what is done when it is there."""
K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class JudgesDied:
    """The judging actor died or was replaced before it answered; the medium may be asked about again."""

    reason: str


class JudgingFailed(RuntimeError):
    """The judging actor failed again and again, or media could not be read: a fault of the machine."""


def judging_actor(
    judges: JudgesConfig,
    rewards: Sequence[str],
    apps: Mapping[str, str],
    *,
    ask_filter: bool = False,
    empty_prompt: str | None = None,
) -> Callable[[], ray.actor.ActorHandle]:
    """What starts a judging actor, and starts another in its place. The arguments are those of `actors.judges.Judges`."""
    actor = ray.remote(Judges).options(num_cpus=JUDGES_CPUS, max_concurrency=ASKED_AT_ONCE)
    return lambda: actor.remote(judges, rewards, apps, ask_filter=ask_filter, empty_prompt=empty_prompt)


class Judging:
    """Asks a judging actor. `waiting` is the driver's table; `pending` counts the media whose answer is not there yet."""

    def __init__(
        self,
        judges: JudgesConfig,
        new_actor: Callable[[], ray.actor.ActorHandle],
        waiting: Waiting | None = None,
        *,
        max_restarts: int = 4,
    ):
        """new_actor: see `judging_actor`. waiting: unset, `judge_all` pumps one of its own."""
        self.waiting: Waiting = {} if waiting is None else waiting
        self._new_actor, self._max_restarts = new_actor, max_restarts
        backoffs_s = FIRST_BACKOFF_S * 2**judges.retries
        self._silent_s = SILENT * (judges.timeout_s * (judges.retries + 1) + backoffs_s)
        self._actor = new_actor()
        self._answered, self._started = monotonic(), False
        self._queue: deque[tuple[ray.ObjectRef, Prompt, Callable[[Any], None]]] = deque()
        self._asked = self._restarts = 0

    @property
    def pending(self) -> int:
        return self._asked + len(self._queue)

    def ask(
        self, medium: ray.ObjectRef, prompt: Prompt, done: Callable[[Answer | PixelsLost | JudgesDied], None]
    ) -> None:
        """Judge one medium; `done` gets what became of it, from whoever pumps the table."""
        if not self.pending:
            self._answered = monotonic()
        self._queue.append((medium, prompt, done))
        self._send()

    def _send(self) -> None:
        while self._queue and self._asked < ASKED_AT_ONCE:
            medium, prompt, done = self._queue.popleft()
            self._asked += 1
            self.waiting[self._actor.judge.remote([medium], prompt)] = self._answer(self._actor, done)

    def _answer(self, actor: ray.actor.ActorHandle, done: Callable[[Any], None]) -> Callable[[ray.ObjectRef], None]:
        def answered(reference: ray.ObjectRef) -> None:
            self._asked -= 1
            self._answered = monotonic()
            try:
                answer = ray.get(reference, timeout=FETCH_TIMEOUT_S)
                self._started = self._started or actor is self._actor
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                if actor is self._actor:
                    self._replace(last_line(error))
                answer = JudgesDied(reason=last_line(error))
            self._send()
            done(answer)

        return answered

    def watch(self) -> None:
        """Replace an actor that has answered nothing for longer than its slowest medium can take."""
        silent = monotonic() - self._answered
        if self.pending and silent > self._silent_s + (0.0 if self._started else START_S):
            self._answered = monotonic()
            self._replace(f"no answer to any of {self.pending} media for {silent:.0f} s")

    def _replace(self, reason: str) -> None:
        self._restarts += 1
        if self._restarts > self._max_restarts:
            raise JudgingFailed(f"the judging actor failed {self._restarts} times; the last: {reason}")
        ray.kill(self._actor)
        self._actor, self._started = self._new_actor(), False

    def close(self) -> None:
        ray.kill(self._actor)


# --- media that lie in files -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Read(Generic[K]):
    """Some media that one task reads and that are then judged."""

    key: K
    """The caller's own name for them."""
    start: Callable[[], list[ray.ObjectRef]]
    """Starts the task: a reference to what it found out about the media (small), then one to each medium."""
    prompts: Callable[[Any], Sequence[Prompt]]
    """From what was found out: what each medium is judged for."""


@dataclass(frozen=True, kw_only=True)
class Judged(Generic[K]):
    """The media of one task, judged."""

    key: K
    about: Any
    """What the task found out."""
    answers: Sequence[Answer]
    """One per medium."""


def judge_all(judging: Judging, reads: Iterable[Read[K]]) -> Generator[Judged[K], None, None]:
    """Judge the media of every task, as they come; a few tasks at a time, whose media stay in the object store.

    What one judge fails on is in the answers. Raises: Refused for a medium that has changed; JudgingFailed for one that cannot
    be read, and for a judging actor that does not stay alive. Tasks that are not done when the iterator is closed are
    cancelled.
    """
    todo, batches = iter(reads), _Batches[K](judging)
    try:
        while True:
            while len(batches.running) < READS_AT_ONCE and (read := next(todo, None)) is not None:
                batches.start(read)
            if not batches.running:
                return
            pump(judging)
            yield from batches.take()
    finally:
        batches.cancel()


@dataclass(kw_only=True, eq=False)
class _Batch(Generic[K]):
    """The media of one task on their way."""

    read: Read[K]
    about: ray.ObjectRef
    media: list[ray.ObjectRef]
    deadline: float
    """Until which it must be read; infinite afterwards."""
    found: Any = None
    answers: dict[int, Answer] = field(default_factory=dict)
    """By place in `media`."""


class _Batches(Generic[K]):
    """The tasks of `judge_all` that are not done, as handlers in the table of what is waited for."""

    def __init__(self, judging: Judging):
        self._judging = judging
        self.running: list[_Batch[K]] = []

    def start(self, read: Read[K]) -> None:
        about, *media = read.start()
        batch = _Batch(read=read, about=about, media=media, deadline=monotonic() + READ_TIMEOUT_S)
        self.running.append(batch)
        self._judging.waiting[about] = lambda _: self._found_out(batch)

    def _found_out(self, batch: _Batch[K]) -> None:
        try:
            batch.found = ray.get(batch.about, timeout=FETCH_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            kind = Refused if isinstance(cause, Refused) else JudgingFailed
            raise kind(f"media cannot be read: {cause}") from error
        batch.deadline = math.inf
        for place, (medium, prompt) in enumerate(zip(batch.media, batch.read.prompts(batch.found), strict=True)):
            self._ask(batch, place, medium, prompt)

    def _ask(self, batch: _Batch[K], place: int, medium: ray.ObjectRef, prompt: Prompt) -> None:
        def done(answer: Answer | PixelsLost | JudgesDied) -> None:
            if isinstance(answer, JudgesDied):
                self._ask(batch, place, medium, prompt)
            elif isinstance(answer, PixelsLost):
                raise JudgingFailed(f"a medium is gone from the object store: {answer.reason}")
            else:
                batch.answers[place] = answer

        self._judging.ask(medium, prompt, done)

    def take(self) -> list[Judged[K]]:
        """Those that are done. Raises: JudgingFailed where one was not read in time."""
        if any(monotonic() > batch.deadline for batch in self.running):
            raise JudgingFailed(f"media were not read in {READ_TIMEOUT_S:.0f} s; free: {ray.available_resources()}")
        done = [batch for batch in self.running if len(batch.answers) == len(batch.media)]
        self.running = [batch for batch in self.running if batch not in done]
        return [
            Judged(key=batch.read.key, about=batch.found, answers=[batch.answers[i] for i in range(len(batch.media))])
            for batch in done
        ]

    def cancel(self) -> None:
        for batch in self.running:
            self._judging.waiting.pop(batch.about, None)
            ray.cancel(batch.about)


def pump(judging: Judging) -> None:
    """Wait a little for the first of what is waited for, then handle all that is there."""
    references = list(judging.waiting)
    ray.wait(references, timeout=POLL_S)
    ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    for reference in ready:
        judging.waiting.pop(reference)(reference)
    judging.watch()
