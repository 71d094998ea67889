"""Prompts, candidates and groups without pixels, and a shell that carries commands out at once, in any order."""

import random
from collections.abc import Callable, Iterable

from rlhf.rollouts.pairing import RewardScale, RolloutGroup
from rlhf.rollouts.rollout import advance
from rlhf.rollouts.state import (
    Command,
    Enqueue,
    Event,
    Judge,
    Judged,
    RolloutLimits,
    RolloutState,
    Sample,
    Sampled,
)
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


def fresh(*, names=("hps",), scaling="running", **limits) -> RolloutState:
    settings = dict(num_valid_samples=2, max_sample_attempts=20, max_dropped_in_a_row=32, max_failure_rate=0.5)
    return RolloutState(
        limits=RolloutLimits(**{**settings, **limits}),
        scale=RewardScale(weights=dict.fromkeys(names, 1.0), scaling=scaling),
    )


def enqueue(state: RolloutState, cursors: Iterable[int]) -> tuple[RolloutState, list[Command]]:
    commands: list[Command] = []
    for cursor in cursors:
        state, more = advance(state, Enqueue(cursor=cursor, prompt=prompt(cursor)))
        commands += more
    return state, commands


def answer(command: Command, judge: Verdicts, version: int = 0) -> Event:
    if isinstance(command, Sample):
        return Sampled(ticket=command.ticket, candidate=candidate(command.cursor, command.attempt, version))
    return Judged(ticket=command.ticket, score=judge(command.candidate))


def finish(
    state: RolloutState, commands: list[Command], judge: Verdicts, order: random.Random | None = None, version=0
):
    """Answer every command, those that follow included, oldest first or in a random order."""
    commands = list(commands)
    while commands:
        command = commands.pop(order.randrange(len(commands)) if order else 0)
        assert isinstance(command, Sample | Judge)
        state, more = advance(state, answer(command, judge, version))
        commands += more
    return state
