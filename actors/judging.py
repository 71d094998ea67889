"""The driver's side of judging: media are asked about by reference, the answers come back, and no pixel passes through here.

`Judging` replaces the judging actor when it dies or does not answer. A caller with an event loop, like rollouts, gives the
table of what it waits for, and pumps it. `judge_all` is the loop for callers without one, whose media are in files. Left out:
what a failed judge means (`rlhf.rollouts`), and reading (`actors.reading`).
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
"""Media that the judging actor works on at a time."""
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


Outcome = Answer | PixelsLost | JudgesDied


class JudgingFailed(RuntimeError):
    """The judging actor failed again and again, or media could not be read: a fault of the machine."""


class Judging:
    """Asks a judging actor. `waiting` is the driver's table."""

    def __init__(
        self,
        judges: JudgesConfig,
        rewards: Sequence[str],
        apps: Mapping[str, str],
        waiting: Waiting | None = None,
        *,
        ask_filter: bool = False,
        empty_prompt: str | None = None,
        max_restarts: int = 4,
    ):
        """rewards, apps, ask_filter, empty_prompt: see `Judges`. waiting: unset, `judge_all` pumps one of its own."""
        self.waiting: Waiting = {} if waiting is None else waiting
        actor = ray.remote(Judges).options(num_cpus=JUDGES_CPUS, max_concurrency=ASKED_AT_ONCE)
        self._new_actor = partial(actor.remote, judges, rewards, apps, ask_filter=ask_filter, empty_prompt=empty_prompt)
        self._max_restarts = max_restarts
        self._silent_s = SILENT * (judges.timeout_s * (judges.retries + 1) + FIRST_BACKOFF_S * 2**judges.retries)
        self._actor = self._new_actor()
        self._answered, self._started, self._restarts = monotonic(), False, 0
        self.pending = 0
        """Media whose answer is not there yet."""

    def ask(self, medium: ray.ObjectRef, prompt: Prompt, done: Callable[[Outcome], None]) -> None:
        """Judge one medium; `done` gets what became of it, from whoever pumps the table."""
        if not self.pending:
            self._answered = monotonic()
        self.pending += 1
        self.waiting[self._actor.judge.remote([medium], prompt)] = partial(self._came, self._actor, done)

    def _came(self, actor: ray.actor.ActorHandle, done: Callable[[Outcome], None], reference: ray.ObjectRef) -> None:
        self.pending -= 1
        self._answered = monotonic()
        try:
            outcome = ray.get(reference, timeout=FETCH_TIMEOUT_S)
            self._started = self._started or actor is self._actor
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
            outcome = JudgesDied(reason=last_line(error))
            if actor is self._actor:
                self._replace(outcome.reason)
        done(outcome)

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


class Read(Generic[K]):
    """Some media that one task reads and that are then judged; `judge_all` gives it back with `about` and `answers`."""

    def __init__(self, *, key: K, start: Callable[[], list[ray.ObjectRef]], prompts: Callable[[Any], Sequence[Prompt]]):
        """key: the caller's own name for them. start: starts the task, gives a reference to `about` (small) and one to each
        medium. prompts: from `about`, what each medium is judged for.
        """
        self.key, self._start, self._prompts = key, start, prompts
        self.about: Any = None
        self.deadline = math.inf
        """Of reading; infinite afterwards."""
        self._answers: dict[int, Answer] = {}

    def begin(self, judging: Judging) -> None:
        self._judging, self.deadline = judging, monotonic() + READ_TIMEOUT_S
        self._reading, *media = self._start()
        self._count = len(media)
        judging.waiting[self._reading] = partial(self._was_read, media)

    def _was_read(self, media: list[ray.ObjectRef], reading: ray.ObjectRef) -> None:
        try:
            self.about = ray.get(reading, timeout=FETCH_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            kind = Refused if isinstance(cause, Refused) else JudgingFailed
            raise kind(f"media cannot be read: {cause}") from error
        self.deadline = math.inf
        for place, (medium, prompt) in enumerate(zip(media, self._prompts(self.about), strict=True)):
            self._ask(place, medium, prompt)

    def _ask(self, place: int, medium: ray.ObjectRef, prompt: Prompt) -> None:
        def done(answer: Outcome) -> None:
            if isinstance(answer, JudgesDied):
                self._ask(place, medium, prompt)
            elif isinstance(answer, PixelsLost):
                raise JudgingFailed(f"a medium is gone from the object store: {answer.reason}")
            else:
                self._answers[place] = answer

        self._judging.ask(medium, prompt, done)

    @property
    def done(self) -> bool:
        return len(self._answers) == self._count

    @property
    def answers(self) -> list[Answer]:
        """One per medium."""
        return [self._answers[place] for place in range(self._count)]

    def forget(self) -> None:
        """Its task ends by itself: where `ray.cancel` meets a task's end, Ray aborts this process (ray-project/ray#54527)."""
        self._judging.waiting.pop(self._reading, None)


def judge_all(judging: Judging, reads: Iterable[Read[K]]) -> Generator[Read[K], None, None]:
    """Judge the media of every task, as they come; a few tasks at a time, whose media are in the object store.

    What one judge fails on is in the answers. Raises: Refused for a medium that has changed; JudgingFailed for one that cannot
    be read (in time), and for a judging actor that does not stay alive. Closing the iterator forgets what is not read yet.
    """
    todo, running = iter(reads), list[Read[K]]()
    try:
        while True:
            for read in islice(todo, READS_AT_ONCE - len(running)):
                read.begin(judging)
                running.append(read)
            if not running:
                return
            handle_ready(judging.waiting, POLL_S)
            judging.watch()
            if any(monotonic() > read.deadline for read in running):
                raise JudgingFailed(f"media were not read in {READ_TIMEOUT_S:.0f} s; free: {ray.available_resources()}")
            done = [read for read in running if read.done]
            running = [read for read in running if not read.done]
            yield from done
    finally:
        for read in running:
            read.forget()


def handle_ready(waiting: Waiting, timeout_s: float) -> None:
    """Wait at most `timeout_s` for the first of what is waited for, then handle all that is there."""
    if references := list(waiting):
        ray.wait(references, timeout=timeout_s)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            waiting.pop(reference)(reference)
