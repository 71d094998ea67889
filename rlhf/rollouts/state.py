"""The nouns of the rollout state machine: commands, the state of every prompt, and its snapshot. Its verbs: `rollout.py`.

Each prompt of a run is at any time in exactly one place: queued (reopened by a resume) / in flight (`open`) / `closed` (the
buffer, see `buffer.py`) / trained / dropped. Trained and dropped are counts: a run may see millions of prompts, and all that
a resume must know of them is that they are below `next_cursor` and not listed as open.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollouts.pairing import RewardScale, RolloutGroup
from rlhf.tables import RolloutConfig
from rlhf.types import Candidate, Prompt, Score


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
class Window:
    """What `drain` reports: everything since the last drain. Integers and `fsum`, so that arrival order never shows."""

    counts: Counter[str] = field(default_factory=Counter)
    """passed, failed (by the filter), quarantined, quarantined_JUDGE: candidates; groups, tied: see `since_usable`;
    finished: groups closed or dropped for too few valid candidates or a tie, attempts: theirs; dropped_REASON: groups;
    reissued: samples and judgements."""
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What metrics are means of, by their names: rewards of candidates, margins of pairs, and their ages in steps."""
    notes: tuple[str, ...] = ()
    """The last 20 drops and quarantines, in words."""


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """Everything that is known of the prompts of a run. Mappings are never changed in place."""

    config: RolloutConfig
    max_failure_rate: float
    """Share of a judge's last calls above which `JudgeUnreliable` is raised."""
    scale: RewardScale
    next_ticket: int = 0
    next_cursor: int = 0
    queued: tuple[int, ...] = ()
    """Cursors below `next_cursor` that a resume reopened and that wait for their prompts, ascending."""
    open: Mapping[int, OpenGroup] = field(default_factory=dict)
    tickets: Mapping[int, Sample | Judge] = field(default_factory=dict)
    """The commands that no answer came to yet."""
    closed: Mapping[int, RolloutGroup] = field(default_factory=dict)
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Groups by reason: "too_few_valid", "tie", "stale"."""
    since_usable: Counter[str] = field(default_factory=Counter)
    """The window's counts, but since the last usable group; groups: those that made no pair, tied: of them by a tie."""
    stale_in_a_row: int = 0
    """Groups dropped as stale since a batch of pairs was last taken."""
    calls: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """Per judge its last calls, newest last; True: it failed."""
    window: Window = field(default_factory=Window)


def snapshot(state: RolloutState) -> dict[str, Any]:
    """What a resume needs, JSON-able: the next cursor and the cursors below it that are neither trained nor dropped.

    Groups in flight or buffered are named by cursor only, and sampled again from attempt 0 after a resume: their candidates
    live in the memory of a cluster that may be gone, and their policy version with it. No prompt is lost and none trains
    twice. Taken at `lookahead = 0` after a step nothing is open, so a resumed run repeats an uninterrupted one: exactly where
    each candidate gets its place in a sampler's batch and its scores again, else up to rounding.
    """
    tallied = ("groups", "tied", "passed", "failed", "quarantined")
    return {
        "next_cursor": state.next_cursor,
        "open_cursors": sorted([*state.queued, *state.open, *state.closed]),
        "trained": state.trained,
        "dropped": dict(state.dropped),
        "since_usable": {name: state.since_usable[name] for name in tallied},
        "calls": {judge: [int(failed) for failed in calls] for judge, calls in state.calls.items()},
        "scale": state.scale.snapshot(),
    }


def restore(snapshot: Mapping[str, Any], before: RolloutState) -> RolloutState:
    """The state of a snapshot. `before`: this process's until now, also where the trainer was rebuilt: its tickets are
    not given again, so that answers to commands from before the rollback are unknown."""
    return RolloutState(
        config=before.config,
        max_failure_rate=before.max_failure_rate,
        scale=RewardScale.restore(snapshot["scale"]),
        next_ticket=before.next_ticket,
        next_cursor=snapshot["next_cursor"],
        queued=tuple(snapshot["open_cursors"]),
        trained=snapshot["trained"],
        dropped=Counter(snapshot["dropped"]),
        since_usable=Counter(snapshot["since_usable"]),
        calls={judge: tuple(map(bool, calls)) for judge, calls in snapshot["calls"].items()},
    )
