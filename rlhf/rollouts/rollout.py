"""The rollout state machine: what happens to each prompt between the stream and a closed group.

`advance(state, event) -> (state, commands)` decides; actors carry out the commands and report back. Nothing here
runs, waits, reads a clock or draws a number, so every fault can be replayed in a unit test. The nouns are in
`state.py`.

Every command carries a fresh ticket. A ticket is spent by its first answer, so an answer that comes twice, late, or
from before a resume changes nothing. A group keeps valid + pending = num_valid_samples while it has attempts left;
the attempts that it uses, and therefore its candidates, do not depend on the order in which answers arrive.

Left out on purpose: batching, retries, timeouts and queues of the commands (the shell's), rejected candidates (only
counted: their pictures are free to go), and candidates in snapshots (see `state.snapshot`).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real

from rlhf.errors import Refused
from rlhf.rollouts.pairing import RolloutGroup
from rlhf.rollouts.reliability import MIN_CALLS, check_rate
from rlhf.rollouts.state import (
    Command,
    Enqueue,
    Event,
    Flight,
    Judge,
    Judged,
    JudgeFailed,
    JudgeLost,
    OpenGroup,
    RolloutState,
    Sample,
    Sampled,
    SampleLost,
    Tally,
    Window,
)
from rlhf.types import Score

LARGEST_REWARD = 1e100
"""Beyond it, squares and quotients of rewards stop being finite."""


class NothingPasses(Refused):
    """Group after group makes no pair: going on would only burn accelerators."""


def advance(state: RolloutState, event: Event) -> tuple[RolloutState, tuple[Command, ...]]:
    """The next state and what to do about it. An answer to an unknown ticket, or of the wrong kind, changes nothing.

    Raises JudgeUnreliable and NothingPasses (stop the run and show the message), and ValueError for a cursor out of
    turn or a candidate that answers another prompt's ticket (both are defects of the shell).
    """
    if isinstance(event, Enqueue):
        return _enqueue(state, event)
    flight = state.tickets.get(event.ticket)
    if flight is None:
        return state, ()
    spent = replace(state, tickets={t: f for t, f in state.tickets.items() if t != event.ticket})
    match event:
        case Sampled() if flight.candidate is None:
            return _sampled(spent, event, flight)
        case SampleLost():
            return _issue(_count(spent, lost=1), replace(flight, candidate=None))
        case JudgeLost() if flight.candidate:
            return _issue(_count(spent, lost=1), flight)
        case Judged() if flight.candidate:
            return _judged(spent, event.score, flight)
        case JudgeFailed() if flight.candidate:
            return _quarantine(spent, event.judge, event.reason, flight)
    return state, ()


def _enqueue(state: RolloutState, event: Enqueue) -> tuple[RolloutState, tuple[Command, ...]]:
    if event.cursor in state.queued:
        state = replace(state, queued=tuple(cursor for cursor in state.queued if cursor != event.cursor))
    elif event.cursor == state.next_cursor:
        state = replace(state, next_cursor=event.cursor + 1)
    else:
        turn = f"{state.next_cursor}" + (f" or one of {state.queued}" if state.queued else "")
        raise ValueError(f"prompt {event.cursor} is out of turn: the next cursor is {turn}; use buffer.wanted()")
    return _settle(_with_group(state, event.cursor, OpenGroup(prompt=event.prompt)), event.cursor)


def _issue(state: RolloutState, flight: Flight) -> tuple[RolloutState, tuple[Command, ...]]:
    """Sample or Judge under a fresh ticket."""
    ticket, prompt = state.next_ticket, state.open[flight.cursor].prompt
    state = replace(state, next_ticket=ticket + 1, tickets={**state.tickets, ticket: flight})
    if flight.candidate is None:
        return state, (Sample(ticket=ticket, cursor=flight.cursor, attempt=flight.attempt, prompt=prompt),)
    return state, (Judge(ticket=ticket, candidate=flight.candidate, prompt=prompt),)


def _sampled(state: RolloutState, event: Sampled, flight: Flight) -> tuple[RolloutState, tuple[Command, ...]]:
    asked, got = (flight.cursor, flight.attempt), (event.candidate.cursor, event.candidate.attempt)
    if asked != got:
        raise ValueError(f"ticket {event.ticket} asked for (cursor, attempt) {asked}, the sampler answered {got}")
    return _issue(state, replace(flight, candidate=event.candidate))


def _judged(state: RolloutState, score: Score, flight: Flight) -> tuple[RolloutState, tuple[Command, ...]]:
    group, candidate = state.open[flight.cursor], flight.candidate
    assert candidate is not None
    if not score.verdict.valid:
        state = _record_call(_count(state, failed=1), "filter", failed=False)
        group = replace(group, failed=group.failed + 1)
        return _settle(_with_group(state, flight.cursor, group), flight.cursor)
    for name in state.scale.names:
        if problem := _problem(score, name):
            return _quarantine(state, name, problem, flight)
    for judge in ("filter", *state.scale.names):
        state = _record_call(state, judge, failed=False)
    rewards = {name: (*state.window.rewards.get(name, ()), float(score.rewards[name])) for name in state.scale.names}
    state = _count(state, passed=1)
    state = replace(state, window=replace(state.window, rewards=rewards))
    group = replace(group, valid=(*group.valid, (candidate, score)))
    return _settle(_with_group(state, flight.cursor, group), flight.cursor)


def _problem(score: Score, name: str) -> str | None:
    value = score.rewards.get(name)
    if value is None:
        return f"the score has no reward {name!r}, only {sorted(score.rewards)}"
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or abs(value) > LARGEST_REWARD:
        return f"reward {name!r} is {value!r}, not a finite number"
    return None


def _quarantine(
    state: RolloutState, judge: str, reason: str, flight: Flight
) -> tuple[RolloutState, tuple[Command, ...]]:
    if judge != "filter":
        state = _record_call(state, "filter", failed=False)
    state = _record_call(state, judge, failed=True, reason=reason)
    counts = _plus(state.window.quarantined, judge)
    state = _note(state, f"prompt {flight.cursor} attempt {flight.attempt}: quarantined, {judge} failed: {reason}")
    state = replace(
        state,
        window=replace(state.window, quarantined=counts),
        since_usable=replace(state.since_usable, quarantined=state.since_usable.quarantined + 1),
    )
    group = state.open[flight.cursor]
    group = replace(group, quarantined=group.quarantined + 1)
    return _settle(_with_group(state, flight.cursor, group), flight.cursor)


def _record_call(state: RolloutState, judge: str, *, failed: bool, reason: str = "") -> RolloutState:
    calls = (*state.calls.get(judge, ()), failed)[-state.limits.failure_window :]
    if failed and len(calls) >= min(MIN_CALLS, state.limits.failure_window):
        check_rate(judge, calls, state.limits.max_failure_rate, reason)
    return replace(state, calls={**state.calls, judge: calls})


def _settle(state: RolloutState, cursor: int) -> tuple[RolloutState, tuple[Command, ...]]:
    """Top the group up to num_valid_samples valid or pending; close or drop it when nothing is pending."""
    group, limits = state.open[cursor], state.limits
    commands: tuple[Command, ...] = ()
    missing = limits.num_valid_samples - len(group.valid) - group.pending
    attempts = range(group.issued, min(group.issued + missing, limits.max_sample_attempts))
    state = _with_group(state, cursor, replace(group, issued=group.issued + len(attempts)))
    for attempt in attempts:
        state, command = _issue(state, Flight(cursor=cursor, attempt=attempt))
        commands += command
    return (state, commands) if state.open[cursor].pending else (_close(state, cursor), commands)


def _close(state: RolloutState, cursor: int) -> RolloutState:
    group = state.open[cursor]
    window = state.window
    window = replace(window, finished=window.finished + 1, attempts=window.attempts + group.issued)
    state = replace(state, window=window, open={c: g for c, g in state.open.items() if c != cursor})
    if len(group.valid) < 2:
        counts = f"{len(group.valid)} of {group.issued} passed, {group.failed} FAIL, {group.quarantined} quarantined"
        return drop(state, cursor, "too_few_valid", f"too few valid: {counts}")
    candidates, scores = zip(*sorted(group.valid, key=lambda entry: entry[0].attempt), strict=True)
    closed = RolloutGroup(cursor=cursor, prompt=group.prompt, candidates=candidates, scores=scores)
    if state.scale.ties(closed):
        return drop(state, cursor, "tie", f"tie: the rewards of all {len(candidates)} candidates are equal")
    return replace(state, closed={**state.closed, cursor: closed}, since_usable=Tally())


def drop(state: RolloutState, cursor: int, reason: str, words: str) -> RolloutState:
    """Count a group, already out of `open` and `closed`, as dropped. Raises NothingPasses after too many in a row."""
    window = replace(state.window, dropped=_plus(state.window.dropped, reason))
    state = _note(
        replace(state, window=window, dropped=_plus(state.dropped, reason)), f"prompt {cursor}: dropped, {words}"
    )
    if reason == "stale":
        return replace(state, stale_in_a_row=state.stale_in_a_row + 1)
    tally = state.since_usable
    tally = replace(tally, groups=tally.groups + 1, tied=tally.tied + (reason == "tie"))
    if tally.groups >= state.limits.max_dropped_in_a_row:
        raise NothingPasses(_why_nothing_passes(tally, words))
    return replace(state, since_usable=tally)


def _why_nothing_passes(tally: Tally, words: str) -> str:
    judged = tally.passed + tally.failed + tally.quarantined
    message = f"{tally.passed} of {judged} candidates passed the filter"
    if tally.tied == tally.groups:
        remedy = "but the rewards tie in every group; check the reward models and reward.scaling"
    elif tally.quarantined > tally.failed:
        remedy = "most were quarantined; check the judges' own logs"
    else:
        remedy = "check judges.filter (its threshold and model), the prompts, and the sampled pictures"
    counts = f"{tally.failed} FAIL, {tally.quarantined} quarantined, {tally.tied} groups tied"
    return f"{message}; {remedy}. {tally.groups} groups in a row made no pair ({counts}); the last: {words}"


def drain(state: RolloutState) -> tuple[RolloutState, dict[str, float], tuple[str, ...]]:
    """The metrics since the last drain, named `area/name`, and the drops and quarantines in words. Absent: no data."""
    window = state.window
    metrics: dict[str, float] = {}
    if window.passed + window.failed:
        metrics["filter/pass_rate"] = window.passed / (window.passed + window.failed)
    if window.finished:
        metrics["rollout/attempts_per_group"] = window.attempts / window.finished
    if window.ages:
        metrics["rollout/staleness"] = sum(window.ages) / len(window.ages)
        metrics["reward/margin"] = math.fsum(window.margins) / len(window.margins)
    means = {name: math.fsum(values) / len(values) for name, values in window.rewards.items()}
    if means:
        weights = state.scale.weights
        total = math.fsum(weights[name] for name in means)
        metrics["reward/mean"] = math.fsum(weights[name] * mean for name, mean in means.items()) / total
    metrics |= {f"reward/{name}": mean for name, mean in means.items()}
    for reason in ("too_few_valid", "tie", "stale"):
        metrics[f"rollout/dropped_{reason}"] = float(window.dropped.get(reason, 0))
    for judge in dict.fromkeys(("filter", *state.scale.names, *window.quarantined)):
        metrics[f"rollout/quarantined_{judge}"] = float(window.quarantined.get(judge, 0))
    metrics["rollout/reissued"] = float(window.lost)
    return replace(state, window=Window()), metrics, window.notes


def _with_group(state: RolloutState, cursor: int, group: OpenGroup) -> RolloutState:
    return replace(state, open={**state.open, cursor: group})


def _plus(counts: Mapping[str, int], key: str) -> dict[str, int]:
    return {**counts, key: counts.get(key, 0) + 1}


def _note(state: RolloutState, words: str) -> RolloutState:
    return replace(state, window=replace(state.window, notes=(*state.window.notes, words)[-20:]))


def _count(state: RolloutState, *, passed: int = 0, failed: int = 0, lost: int = 0) -> RolloutState:
    window, tally = state.window, state.since_usable
    return replace(
        state,
        window=replace(window, passed=window.passed + passed, failed=window.failed + failed, lost=window.lost + lost),
        since_usable=replace(tally, passed=tally.passed + passed, failed=tally.failed + failed),
    )
