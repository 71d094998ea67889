"""From the rewards of one prompt's candidates to a preference pair.

A pair is the best against the worst of the VALID candidates of one prompt. With several rewards the order needs one number
per candidate, and a plain 1:1 sum would let the reward with the larger units decide everything. `RewardScale` makes the units
comparable: `running` divides each reward by its pooled WITHIN-GROUP standard deviation (the spread that decides a pair; the
spread across prompts cancels inside one), `fixed` is the hand-set mixture of FEAST's train_dpo_flux_kontext.py. Left out:
learned weights between rewards, pairs of middle ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.types import Candidate, Pair, Prompt, Score

WINDOW = 256
"""Groups whose spread a running scale pools."""

Spread = tuple[tuple[float, int], ...]
"""Of one group, in the order of `RewardScale.weights`: (sum of squared deviations, degrees of freedom) of each reward."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The valid candidates of one prompt and their scores, in the order of their attempts: at least two."""

    cursor: int
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[Score, ...]
    """One per candidate; every verdict is a pass."""

    def values(self, reward: str) -> tuple[float, ...]:
        """One reward of every candidate."""
        return tuple(float(score.rewards[reward]) for score in self.scores)


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """How several rewards become one total per candidate. Totals are compared within a group only.

    running: Σ over rewards of w·(r − group mean) / σ, where σ is the pooled within-group standard deviation of that
        reward over `window`: σ² = Σ_groups Σ_candidates (r − group mean)² / Σ_groups (K − 1). With σ = 0 it adds 0.
    fixed: clip((hps − 0.15) / 0.2, 0, 1) and ctr, averaged by weight (FEAST's script, there 1:1); a single reward
        is taken as it is. `RewardConfig` refuses it for others.
    """

    weights: Mapping[str, float]
    """Reward → its weight w > 0, in the order of the recipe."""
    scaling: Literal["running", "fixed"] = "running"
    window: tuple[Spread, ...] = ()
    """The last 256 consumed groups (of a larger batch all), newest last."""

    def observe(self, groups: Sequence[RolloutGroup]) -> "RewardScale":
        """The scale with `groups` as its newest. All of a batch count, even one of more than 256 groups."""
        if self.scaling == "fixed":
            return self
        window = self.window + tuple(tuple(_spread(group.values(name)) for name in self.weights) for group in groups)
        return replace(self, window=window[-max(WINDOW, len(groups)) :])

    def deviations(self) -> dict[str, float]:
        """Pooled within-group standard deviation of each reward over the window; 0 where nothing has been seen."""
        pooled = {}
        for index, name in enumerate(self.weights):
            freedom = sum(spread[index][1] for spread in self.window)
            squares = math.fsum(spread[index][0] for spread in self.window)
            pooled[name] = math.sqrt(squares / freedom) if freedom else 0.0
        return pooled

    def totals(self, group: RolloutGroup) -> tuple[float, ...]:
        """One number per candidate of the group, higher is better."""
        return tuple(math.fsum(parts.values()) for parts in self.parts(group))

    def parts(self, group: RolloutGroup) -> tuple[dict[str, float], ...]:
        """Of each candidate of the group its scaled rewards by name, whose sum is its total."""
        if self.scaling == "fixed":
            return tuple(self._fixed(score.rewards) for score in group.scores)
        columns = {  # w·(r − mean)/σ
            name: _standardised(group.values(name), deviation / self.weights[name])
            if deviation > 0
            else [0.0] * len(group.scores)
            for name, deviation in self.deviations().items()
        }
        return tuple({name: column[place] for name, column in columns.items()} for place in range(len(group.scores)))

    def ties(self, group: RolloutGroup) -> bool:
        """Whether the group can make no pair, whatever the running window will hold."""
        if self.scaling == "fixed":
            return len(set(self.totals(group))) == 1
        return all(len(set(group.values(name))) == 1 for name in self.weights)

    def _fixed(self, rewards: Mapping[str, float]) -> dict[str, float]:
        if len(self.weights) == 1:
            return {name: float(rewards[name]) for name in self.weights}
        scaled = {"hps": min(max((rewards["hps"] - 0.15) / 0.2, 0.0), 1.0), "ctr": rewards["ctr"]}
        total = math.fsum(self.weights.values())
        return {name: weight / total * scaled[name] for name, weight in self.weights.items()}

    def snapshot(self) -> dict[str, Any]:
        """JSON-able; floats survive JSON exactly."""
        window = [list(map(list, spread)) for spread in self.window]
        return {"weights": dict(self.weights), "scaling": self.scaling, "window": window}

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> "RewardScale":
        window = tuple(tuple((float(squares), int(freedom)) for squares, freedom in s) for s in snapshot["window"])
        return cls(weights=dict(snapshot["weights"]), scaling=snapshot["scaling"], window=window)


def make_pair(group: RolloutGroup, parts: Sequence[Mapping[str, float]]) -> Pair | None:
    """Best against worst of a group by the sum of each candidate's scaled rewards, or None where all are equal.

    Among equals the earliest attempt is taken, so the order in which candidates arrived never matters.
    """
    totals = [math.fsum(one.values()) for one in parts]
    places, attempts = range(len(totals)), [candidate.attempt for candidate in group.candidates]
    best = max(places, key=lambda place: (totals[place], -attempts[place]))
    worst = min(places, key=lambda place: (totals[place], attempts[place]))
    if not totals[best] > totals[worst]:
        return None
    return Pair(
        prompt=group.prompt,
        cursor=group.cursor,
        winner=group.candidates[best],
        loser=group.candidates[worst],
        winner_score=group.scores[best],
        loser_score=group.scores[worst],
        margin=totals[best] - totals[worst],
        margins={name: value - parts[worst][name] for name, value in parts[best].items()},
    )


def _spread(values: Sequence[float]) -> tuple[float, int]:
    """Equal values have spread 0 exactly: rounding noise of a mean must not become the unit of a reward."""
    if len(set(values)) == 1:
        return 0.0, len(values) - 1
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) * (value - mean) for value in values), len(values) - 1


def _standardised(values: Sequence[float], deviation: float) -> list[float]:
    """Centred first: a large common offset would otherwise round away a small difference in another reward."""
    mean = math.fsum(values) / len(values)
    return [(value - mean) / deviation for value in values]
