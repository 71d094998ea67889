"""Prompts, candidates and groups without pixels, and a shell that carries commands out at once, in any order."""

import random
from collections.abc import Callable, Iterable

from rlhf.rollouts import rollout
from rlhf.rollouts.pairing import RewardScale, RolloutGroup
from rlhf.rollouts.state import Judge, RolloutState, Sample
from rlhf.tables import RolloutConfig
from rlhf.types import Candidate, Geometry, Prompt, Score, Verdict

Verdicts = Callable[[Candidate], Score]


def prompt(cursor: int) -> Prompt:
    return Prompt(key=f"i{cursor}", instruction=f"text {cursor % 3}", geometry=Geometry(height=16, width=16))


def candidate(cursor: int, attempt: int, version: int = 0) -> Candidate:
    return Candidate(
        cursor=cursor, attempt=attempt, version=version, media=f"{cursor}/{attempt}", latents=f"{cursor}/{attempt}"
    )


def passed(**rewards: float) -> Score:
    return Score(verdict=Verdict(valid=True), rewards=rewards)


FAIL = Score(verdict=Verdict(valid=False, reason="garbled text"))


def group(cursor: int, *rewards: dict[str, float], version: int = 0) -> RolloutGroup:
    return RolloutGroup(
        cursor=cursor,
        prompt=prompt(cursor),
        candidates=tuple(candidate(cursor, attempt, version) for attempt in range(len(rewards))),
        scores=tuple(passed(**values) for values in rewards),
    )


def fresh(*, names=("hps",), scaling="running", max_failure_rate=0.5, **limits) -> RolloutState:
    return RolloutState(
        config=RolloutConfig(**limits),
        max_failure_rate=max_failure_rate,
        scale=RewardScale(weights=dict.fromkeys(names, 1.0), scaling=scaling),
    )


def asked_for(command: Sample | Judge) -> tuple[int, int]:
    """(cursor, attempt)"""
    of = command.candidate if isinstance(command, Judge) else command
    return of.cursor, of.attempt


def place(state: RolloutState, cursor: int) -> str:
    """Where a prompt is. "done" is trained or dropped: kept as counts, not per cursor."""
    if cursor >= state.next_cursor:
        return "unseen"
    if cursor in state.queued:
        return "queued"
    if cursor in state.open:
        sampling = any(isinstance(one, Sample) and one.cursor == cursor for one in state.tickets.values())
        return "sampling" if sampling else "judging"
    return "closed" if cursor in state.closed else "done"


def enqueue(state: RolloutState, cursors: Iterable[int]) -> tuple[RolloutState, list[Sample | Judge]]:
    commands: list[Sample | Judge] = []
    for cursor in cursors:
        state, more = rollout.enqueue(state, cursor, prompt(cursor))
        commands += more
    return state, commands


def answer(state: RolloutState, command: Sample | Judge, judge: Verdicts, version: int = 0) -> rollout.Next:
    if isinstance(command, Sample):
        return rollout.sampled(state, command.ticket, candidate(command.cursor, command.attempt, version))
    return rollout.judged(state, command.ticket, judge(command.candidate))


def finish(
    state: RolloutState,
    commands: list[Sample | Judge],
    judge: Verdicts,
    order: random.Random | None = None,
    version: int = 0,
) -> RolloutState:
    """Answer every command, those that follow included, oldest first or in a random order."""
    commands = list(commands)
    while commands:
        command = commands.pop(order.randrange(len(commands)) if order else 0)
        state, more = answer(state, command, judge, version)
        commands += more
    return state
