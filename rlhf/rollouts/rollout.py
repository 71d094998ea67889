"""The rollout state machine: what happens to each prompt between the stream and a closed group.

An event is a function of the state and gives the next state and commands; actors carry out the commands and report back.
Nothing here runs, waits, reads a clock or draws a number, so every fault can be replayed in a unit test.

Every command carries a fresh ticket. A ticket is spent by its first answer, so an answer that comes twice, late, from before
a resume, or of the wrong kind changes nothing. A group keeps valid + pending = num_valid_samples while it has attempts left;
the attempts that it uses, and therefore its candidates, do not depend on the order in which answers arrive.

Left out: batching, retries, timeouts and queues of the commands (the shell's), rejected candidates (only counted: their
pictures are free to go), and candidates in snapshots (see `state.snapshot`).
"""

import math
from collections import Counter
from dataclasses import replace
from numbers import Real

from rlhf.errors import Refused
from rlhf.rollouts.pairing import RolloutGroup
from rlhf.rollouts.reliability import MIN_CALLS, WINDOW, check_rate
from rlhf.rollouts.state import Judge, OpenGroup, RolloutState, Sample, Window
from rlhf.types import Candidate, Prompt, Score

LARGEST_REWARD = 1e100
"""Beyond it, squares and quotients of rewards stop being finite."""

Next = tuple[RolloutState, tuple[Sample | Judge, ...]]
"""What follows from an event. Any may raise JudgeUnreliable and NothingPasses: stop the run and show the message."""


class NothingPasses(Refused):
    """Group after group makes no pair: going on would only burn accelerators."""


def enqueue(state: RolloutState, cursor: int, prompt: Prompt) -> Next:
    """A prompt enters. ValueError unless `cursor` is the next of the stream, or one that a resume reopened."""
    if cursor in state.queued:
        state = replace(state, queued=tuple(other for other in state.queued if other != cursor))
    elif cursor == state.next_cursor:
        state = replace(state, next_cursor=cursor + 1)
    else:
        turn = f"{state.next_cursor}" + (f" or one of {state.queued}" if state.queued else "")
        raise ValueError(f"prompt {cursor} is out of turn: the next cursor is {turn}; use buffer.wanted()")
    return _settle(state, cursor, OpenGroup(prompt=prompt))


def sampled(state: RolloutState, ticket: int, candidate: Candidate) -> Next:
    """The sampler answered. ValueError where it answered for another prompt or attempt."""
    spent, sample = _spend(state, ticket)
    if not isinstance(sample, Sample):
        return state, ()
    asked, got = (sample.cursor, sample.attempt), (candidate.cursor, candidate.attempt)
    if asked != got:
        raise ValueError(f"ticket {ticket} asked for (cursor, attempt) {asked}, the sampler answered {got}")
    return _issue(spent, Judge(ticket=spent.next_ticket, candidate=candidate, prompt=sample.prompt))


def sample_lost(state: RolloutState, ticket: int) -> Next:
    """The sampler died or hung, or the pixels of a candidate being judged are gone: the attempt is sampled again."""
    spent, lost = _spend(state, ticket)
    if lost is None:
        return state, ()
    of = lost.candidate if isinstance(lost, Judge) else lost
    again = Sample(ticket=spent.next_ticket, cursor=of.cursor, attempt=of.attempt, prompt=lost.prompt)
    return _issue(_count(spent, reissued=1), again)


def judge_lost(state: RolloutState, ticket: int) -> Next:
    """The judging actor died: the same candidate is judged again."""
    spent, judge = _spend(state, ticket)
    if not isinstance(judge, Judge):
        return state, ()
    return _issue(_count(spent, reissued=1), replace(judge, ticket=spent.next_ticket))


def judge_failed(state: RolloutState, ticket: int, judge: str, reason: str) -> Next:
    """`judge`, "filter" or a reward's name, gave no usable answer after its retries: the candidate is quarantined."""
    spent, asked = _spend(state, ticket)
    return _quarantine(spent, asked.candidate, judge, reason) if isinstance(asked, Judge) else (state, ())


def judged(state: RolloutState, ticket: int, score: Score) -> Next:
    """The judges answered; a score with a reward that is no finite number is a failure of that judge."""
    spent, judge = _spend(state, ticket)
    if not isinstance(judge, Judge):
        return state, ()
    candidate, names = judge.candidate, tuple(state.scale.weights)
    group = state.open[candidate.cursor]
    if not score.verdict.valid:
        spent = _asked(_count(spent, failed=1), "filter")
        return _settle(spent, candidate.cursor, replace(group, failed=group.failed + 1))
    for name in names:
        if problem := _problem(score, name):
            return _quarantine(spent, candidate, name, problem)
    spent = _asked(_count(spent, passed=1), "filter")
    for name in names:
        spent = _asked(spent, name)
    for name, value in score.rewards.items():  # those of weight 0 too
        spent = observe(spent, f"reward/{name}", float(value))
    return _settle(spent, candidate.cursor, replace(group, valid=(*group.valid, (candidate, score))))


def _spend(state: RolloutState, ticket: int) -> tuple[RolloutState, Sample | Judge | None]:
    """The state without a ticket, and the command that had it; None where it is unknown."""
    rest = {other: command for other, command in state.tickets.items() if other != ticket}
    return replace(state, tickets=rest), state.tickets.get(ticket)


def _issue(state: RolloutState, command: Sample | Judge) -> Next:
    """`command` has the next ticket."""
    tickets = {**state.tickets, command.ticket: command}
    return replace(state, next_ticket=state.next_ticket + 1, tickets=tickets), (command,)


def _problem(score: Score, name: str) -> str | None:
    value = score.rewards.get(name)
    if value is None:
        return f"the score has no reward {name!r}, only {sorted(score.rewards)}"
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST_REWARD:  # a comparison with NaN is false
        return f"reward {name!r} is {value!r}, not a finite number"
    return None


def _quarantine(state: RolloutState, candidate: Candidate, judge: str, reason: str) -> Next:
    if judge != "filter":
        state = _asked(state, "filter")
    words = f"prompt {candidate.cursor} attempt {candidate.attempt}: quarantined, {judge} failed: {reason}"
    state = _count(_asked(state, judge, reason), words, **{"quarantined": 1, f"quarantined_{judge}": 1})
    group = state.open[candidate.cursor]
    return _settle(state, candidate.cursor, replace(group, quarantined=group.quarantined + 1))


def _asked(state: RolloutState, judge: str, failure: str | None = None) -> RolloutState:
    """One more call of a judge, and why it failed if it did. Raises JudgeUnreliable."""
    calls = (*state.calls.get(judge, ()), failure is not None)[-WINDOW:]
    if failure is not None and len(calls) >= MIN_CALLS:
        check_rate(judge, calls, state.max_failure_rate, failure)
    return replace(state, calls={**state.calls, judge: calls})


def _settle(state: RolloutState, cursor: int, group: OpenGroup) -> Next:
    """Top the group up to num_valid_samples valid or pending; close or drop it when nothing is pending."""
    missing = state.config.num_valid_samples - len(group.valid) - group.pending
    attempts = range(group.issued, min(group.issued + missing, state.config.max_sample_attempts))
    group = replace(group, issued=group.issued + len(attempts))
    if not group.pending:
        return _close(state, cursor, group), ()
    state = replace(state, open={**state.open, cursor: group})
    commands: tuple[Sample | Judge, ...] = ()
    for attempt in attempts:
        sample = Sample(ticket=state.next_ticket, cursor=cursor, attempt=attempt, prompt=group.prompt)
        state, command = _issue(state, sample)
        commands += command
    return state, commands


def _close(state: RolloutState, cursor: int, group: OpenGroup) -> RolloutState:
    state = _count(state, finished=1, attempts=group.issued)
    state = replace(state, open={other: still for other, still in state.open.items() if other != cursor})
    if len(group.valid) < 2:
        counts = f"{len(group.valid)} of {group.issued} passed, {group.failed} FAIL, {group.quarantined} quarantined"
        return drop(state, cursor, "too_few_valid", f"too few valid: {counts}")
    candidates, scores = zip(*sorted(group.valid, key=lambda entry: entry[0].attempt), strict=True)
    closed = RolloutGroup(cursor=cursor, prompt=group.prompt, candidates=candidates, scores=scores)
    if state.scale.ties(closed):
        return drop(state, cursor, "tie", f"tie: the rewards of all {len(candidates)} candidates are equal")
    return replace(state, closed={**state.closed, cursor: closed}, since_usable=Counter())


def drop(state: RolloutState, cursor: int, reason: str, words: str) -> RolloutState:
    """Count a group, already out of `open` and `closed`, as dropped. Raises NothingPasses after too many in a row."""
    state = replace(state, dropped=state.dropped + Counter([reason]))
    state = _count(state, f"prompt {cursor}: dropped, {words}", **{f"dropped_{reason}": 1})
    if reason == "stale":
        return replace(state, stale_in_a_row=state.stale_in_a_row + 1)
    state = _count(state, groups=1, tied=int(reason == "tie"))
    if state.since_usable["groups"] >= state.config.max_dropped_in_a_row:
        raise NothingPasses(_why_nothing_passes(state.since_usable, words))
    return state


def _why_nothing_passes(counts: Counter[str], words: str) -> str:
    groups, passed, failed, quarantined = (counts[name] for name in ("groups", "passed", "failed", "quarantined"))
    if counts["tied"] == groups:
        remedy = "but the rewards tie in every group; check the reward models and reward.scaling"
    elif quarantined > failed:
        remedy = "most were quarantined; check the judges' own logs"
    else:
        remedy = "check judges.filter (its threshold and model), the prompts, and the sampled pictures"
    return (
        f"{passed} of {passed + failed + quarantined} candidates passed the filter; {remedy}. {groups} groups in a row "
        f"made no pair ({failed} FAIL, {quarantined} quarantined, {counts['tied']} groups tied); the last: {words}"
    )


def drain(state: RolloutState) -> tuple[RolloutState, dict[str, float], tuple[str, ...]]:
    """The metrics since the last drain, named `area/name`, and the drops and quarantines in words. Absent: no data."""
    window, counts, weights = state.window, state.window.counts, state.scale.weights
    metrics = {name: math.fsum(values) / len(values) for name, values in window.values.items()}
    if seen := counts["passed"] + counts["failed"]:
        metrics["filter/pass_rate"] = counts["passed"] / seen
    if counts["finished"]:
        metrics["rollout/attempts_per_group"] = counts["attempts"] / counts["finished"]
    if counts["passed"]:
        total = math.fsum(weight * metrics[f"reward/{name}"] for name, weight in weights.items())
        metrics["reward/mean"] = total / math.fsum(weights.values())
    dropped = ("dropped_too_few_valid", "dropped_tie", "dropped_stale")
    for name in (*dropped, *(f"quarantined_{judge}" for judge in ("filter", *weights)), "reissued"):
        metrics[f"rollout/{name}"] = float(counts[name])
    return replace(state, window=Window()), metrics, window.notes


def observe(state: RolloutState, metric: str, *values: float) -> RolloutState:
    """Add to what `drain` gives the mean of."""
    seen = state.window.values
    return replace(state, window=replace(state.window, values={**seen, metric: (*seen.get(metric, ()), *values)}))


def _count(state: RolloutState, *notes: str, **counts: int) -> RolloutState:
    """Add to what `drain` and `NothingPasses` tell."""
    window, more = state.window, Counter(counts)
    window = replace(window, counts=window.counts + more, notes=(*window.notes, *notes)[-20:])
    return replace(state, window=window, since_usable=state.since_usable + more)
