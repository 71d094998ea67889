"""The nouns of the rollout state machine: commands, events, the state of every prompt, and its snapshot.

Each prompt of a run is at any time in exactly one place: queued (reopened by a resume) / in flight (`open`) /
`closed` (the buffer, see `buffer.py`) / trained / dropped. Trained and dropped are counts: a run may see millions of
prompts, and all that a resume must know of them is that they are below `next_cursor` and not listed as open.
`rollout.py` has the verbs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rlhf.rollouts.pairing import RewardScale, RolloutGroup
from rlhf.types import Candidate, Prompt, Score


@dataclass(frozen=True, kw_only=True)
class RolloutLimits:
    num_valid_samples: int
    max_sample_attempts: int
    max_dropped_in_a_row: int
    """Groups that make no pair, without a usable one between, after which `NothingPasses` is raised."""
    max_failure_rate: float
    """Share of a judge's last `failure_window` calls above which `JudgeUnreliable` is raised."""
    failure_window: int = 50


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Command: sample this attempt of this prompt with the current policy."""

    ticket: int
    cursor: int
    attempt: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Command: ask the filter, then the rewards if it passed; one answer for all of it."""

    ticket: int
    candidate: Candidate
    prompt: Prompt


Command = Sample | Judge


@dataclass(frozen=True, kw_only=True)
class Enqueue:
    """A prompt enters. `cursor` is the next of the stream, or one that a resume reopened: `buffer.wanted` tells."""

    cursor: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Sampled:
    ticket: int
    candidate: Candidate


@dataclass(frozen=True, kw_only=True)
class SampleLost:
    """The sampler died or hung, or the pixels of a candidate being judged are gone: the attempt is sampled again."""

    ticket: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    ticket: int
    score: Score


@dataclass(frozen=True, kw_only=True)
class JudgeFailed:
    """A judge gave no usable answer after its retries: the candidate is quarantined, never in a pair."""

    ticket: int
    judge: str
    """"filter" or the name of a reward."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class JudgeLost:
    """The judging actor died: the same candidate is judged again."""

    ticket: int
    reason: str


Event = Enqueue | Sampled | SampleLost | Judged | JudgeFailed | JudgeLost


@dataclass(frozen=True, kw_only=True)
class Flight:
    """What a ticket stands for: an attempt being sampled, or (with a candidate) being judged."""

    cursor: int
    attempt: int
    candidate: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class OpenGroup:
    prompt: Prompt
    issued: int = 0
    """Attempts so far; the next one's number."""
    valid: tuple[tuple[Candidate, Score], ...] = ()
    failed: int = 0
    """Candidates that the filter rejected."""
    quarantined: int = 0

    @property
    def pending(self) -> int:
        return self.issued - len(self.valid) - self.failed - self.quarantined


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Outcomes since the last usable group: what `NothingPasses` reports."""

    groups: int = 0
    tied: int = 0
    passed: int = 0
    failed: int = 0
    quarantined: int = 0


@dataclass(frozen=True, kw_only=True)
class Window:
    """What `drain` reports: everything since the last drain. Integers and `fsum`, so that arrival order never shows."""

    passed: int = 0
    failed: int = 0
    finished: int = 0
    """Groups closed or dropped for too few valid candidates or a tie."""
    attempts: int = 0
    """Attempts of the finished groups."""
    lost: int = 0
    """Samples and judgements issued again."""
    quarantined: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    margins: tuple[float, ...] = ()
    ages: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """The last 20 drops and quarantines, in words."""


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """Everything that is known of the prompts of a run. Mappings are never changed in place."""

    limits: RolloutLimits
    scale: RewardScale
    next_ticket: int = 0
    next_cursor: int = 0
    queued: tuple[int, ...] = ()
    """Cursors below `next_cursor` that a resume reopened and that wait for their prompts, ascending."""
    open: Mapping[int, OpenGroup] = field(default_factory=dict)
    tickets: Mapping[int, Flight] = field(default_factory=dict)
    closed: Mapping[int, RolloutGroup] = field(default_factory=dict)
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Groups by reason: "too_few_valid", "tie", "stale"."""
    since_usable: Tally = Tally()
    stale_in_a_row: int = 0
    """Groups dropped as stale since a batch of pairs was last taken."""
    calls: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """Per judge its last calls, newest last; True: it failed."""
    window: Window = Window()


def place(state: RolloutState, cursor: int) -> Literal["unseen", "queued", "sampling", "judging", "closed", "done"]:
    """Where a prompt is. "done" is trained or dropped: kept as counts, not per cursor."""
    if cursor >= state.next_cursor:
        return "unseen"
    if cursor in state.queued:
        return "queued"
    if cursor in state.open:
        sampling = any(f.cursor == cursor and f.candidate is None for f in state.tickets.values())
        return "sampling" if sampling else "judging"
    return "closed" if cursor in state.closed else "done"


def snapshot(state: RolloutState) -> dict[str, Any]:
    """What a resume needs, JSON-able: the next cursor and the cursors below it that are neither trained nor dropped.

    Groups in flight or buffered are named by cursor only, and sampled again from attempt 0 after a resume: their
    candidates live in the memory of a cluster that may be gone, and their policy version with it. No prompt is lost
    and none trains twice. Taken at `lookahead = 0` after a step nothing is open, so a resumed run repeats an
    uninterrupted one: exactly where each candidate gets its place in a sampler's batch and its scores again, which
    `rollout.batch_size = 1` and judges that are functions of the picture ensure; else up to rounding.
    """
    return {
        "next_cursor": state.next_cursor,
        "open_cursors": sorted([*state.queued, *state.open, *state.closed]),
        "trained": state.trained,
        "dropped": dict(state.dropped),
        "since_usable": asdict(state.since_usable),
        "calls": {judge: [int(failed) for failed in calls] for judge, calls in state.calls.items()},
        "scale": state.scale.snapshot(),
    }


def restore(snapshot: Mapping[str, Any], limits: RolloutLimits, *, first_ticket: int = 0) -> RolloutState:
    """The state of a snapshot. In a process that goes on (the trainer was rebuilt), pass the old state's
    `next_ticket` as `first_ticket`, so that answers to commands from before the rollback are unknown here."""
    return RolloutState(
        limits=limits,
        scale=RewardScale.restore(snapshot["scale"]),
        next_ticket=first_ticket,
        next_cursor=snapshot["next_cursor"],
        queued=tuple(snapshot["open_cursors"]),
        trained=snapshot["trained"],
        dropped=dict(snapshot["dropped"]),
        since_usable=Tally(**snapshot["since_usable"]),
        calls={judge: tuple(map(bool, calls)) for judge, calls in snapshot["calls"].items()},
    )
