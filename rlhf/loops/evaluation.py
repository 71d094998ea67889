"""Held-out prompts in a run: sampled at fixed noise with the loaded weights, and judged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rlhf.types import Prompt, Score, seed_from

Publish = Callable[[str, int | None], None]
"""(side, step): make the samplers hold the `policy` or `ema` weights; step None: no pair may come of them."""


class Rollouts(Protocol):
    def score(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[Any, Any]]: ...


class Tracker(Protocol):
    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def edits(self, step: int, name: str, prompts: Sequence[Prompt], answers: Sequence[tuple[Any, Any]]) -> None: ...


def evaluation(
    held_out: Sequence[Prompt],
    rollouts: Rollouts,
    tracker: Tracker,
    publish: Publish,
    *,
    rewards: Sequence[str],
    variants: int,
    seed: int,
    ema: bool,
) -> Callable[[int], None]:
    """The duty that scores held-out prompts with the policy (step 0: the base) and, if one is kept, the EMA weights.

    variants: pictures per prompt, each from noise of its own.
    """
    prompts = [prompt for prompt in held_out for _ in range(variants)]
    seeds = [seed_from(seed, "eval", index) for index in range(len(prompts))]

    def measure(step: int, name: str) -> None:
        answers = rollouts.score(prompts, seeds)
        tracker.log(step, summary(name, [answer for _, answer in answers], rewards))
        tracker.edits(step, name, prompts, answers)

    def do(step: int) -> None:
        measure(step, "policy" if step else "base")
        if step and ema:
            publish("ema", None)
            measure(step, "ema")
            publish("policy", step)

    return do


def summary(name: str, answers: Sequence[Any], rewards: Sequence[str]) -> dict[str, float]:
    """`eval/NAME_REWARD` over the pictures that passed, and the shares that passed and that could be judged."""
    scores = [answer for answer in answers if isinstance(answer, Score)]
    passed = [score for score in scores if score.verdict.valid]
    scalars = {f"eval/{name}_judged": len(scores) / len(answers)}
    if scores:
        scalars[f"eval/{name}_pass_rate"] = len(passed) / len(scores)
    if passed:
        for reward in rewards:
            scalars[f"eval/{name}_{reward}"] = sum(score.rewards[reward] for score in passed) / len(passed)
    return scalars
