"""Base against tuned: what the judges' scores of two sets of pictures, made from the same noise, add up to.

For every judge, over the pairs (base b, tuned t) of one prompt and one seed that it scored both:

    win rate        = mean of 1[t > b] + ½·1[t = b]
    mean difference = mean of t − b

with 95 % intervals by the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)
over PROMPTS: a resample draws as many prompts as there are, with replacement, and takes all pictures of each along, since
pictures of one prompt are alike. Where every prompt says the same, the interval has no width: it then only says that these
prompts agree. Left out: corrections for several judges (each interval stands for itself), bias-corrected intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")
_CELLS = 4_000_000
"""Prompts drawn at once: bounds memory to some tens of megabytes."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    file: str
    """Relative to the evaluation's folder."""
    scores: Mapping[str, float]
    """By judge; one that failed is absent."""
    source_distance: float | None = None
    """None where the model sees no source."""


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Base and tuned for one prompt, from one and the same noise."""

    prompt: int
    """Place of the prompt in the evaluation, from 0."""
    variant: int
    """0, 1, … within the prompt."""
    key: str
    """The prompt's name in the data set."""
    instruction: str
    height: int
    width: int
    source: str | None
    """The picture that was edited, as the model saw it; relative to the evaluation's folder."""
    base: Picture
    tuned: Picture

    def difference(self, judge: str) -> float | None:
        """tuned − base; None where the judge did not score both."""
        if judge not in self.base.scores or judge not in self.tuned.scores:
            return None
        return self.tuned.scores[judge] - self.base.scores[judge]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval. A single prompt gives none: `low` and `high` are then None."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class JudgeResult:
    prompts: int
    pairs: int
    left_out: int
    """Pairs without a score of both pictures, in none of the other numbers."""
    wins: int
    """Pairs in which tuned scored higher."""
    losses: int
    ties: int
    base: float
    """Mean score."""
    tuned: float
    win_rate: Estimate
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class SourceResult:
    """Mean source distance of both, and of tuned − base: below 0, tuned keeps more of the source."""

    prompts: int
    pairs: int
    base: float
    tuned: float
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class FailedScore:
    judge: str
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that the page shows and results.json holds."""

    model: str
    tuned: str
    steps: int
    seed: int
    judges: Mapping[str, JudgeResult]
    source: SourceResult | None
    """None where the model sees no source."""
    duels: Sequence[Duel]
    failed: Sequence[FailedScore] = ()
    left_out: Sequence[str] = ()
    """Problems of the prompt file that were left out."""


def judge_result(judge: str, duels: Sequence[Duel], seed: int) -> JudgeResult | None:
    """The numbers of one judge; None where it scored no pair. `seed` makes the resamples reproducible."""
    scored = [duel for duel in duels if duel.difference(judge) is not None]
    if not scored:
        return None
    base = np.array([duel.base.scores[judge] for duel in scored])
    tuned = np.array([duel.tuned.scores[judge] for duel in scored])
    outcome = (np.sign(tuned - base) + 1) / 2
    prompts = [duel.prompt for duel in scored]
    win_rate, difference = estimates(prompts, np.stack([outcome, tuned - base], axis=1), seed)
    return JudgeResult(
        prompts=len(set(prompts)),
        pairs=len(scored),
        left_out=len(duels) - len(scored),
        wins=int((outcome == 1).sum()),
        losses=int((outcome == 0).sum()),
        ties=int((outcome == 0.5).sum()),
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        win_rate=win_rate,
        difference=difference,
    )


def source_result(duels: Sequence[Duel], seed: int) -> SourceResult | None:
    """The numbers of the source distance; None where the pictures have no source."""
    measured = [duel for duel in duels if duel.base.source_distance is not None]
    if not measured:
        return None
    prompts = [duel.prompt for duel in measured]
    base = np.array([duel.base.source_distance for duel in measured], dtype=float)
    tuned = np.array([duel.tuned.source_distance for duel in measured], dtype=float)
    (difference,) = estimates(prompts, (tuned - base)[:, None], seed)
    return SourceResult(
        prompts=len(set(prompts)),
        pairs=len(measured),
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=difference,
    )


def estimates(
    prompts: Sequence[int], values: np.ndarray, seed: int, resamples: int = 10_000, level: float = 0.95
) -> list[Estimate]:
    """The mean of each column of values (pairs, columns), with its percentile bootstrap interval over prompts.

    prompts: the prompt of each row. All columns share their resamples. Without rows: AssertionError.
    """
    assert len(prompts) == len(values) > 0, f"{len(prompts)} prompts for {len(values)} rows"
    _, place = np.unique(np.asarray(prompts), return_inverse=True)
    count = int(place.max()) + 1
    # A prompt's rows enter together: its sums, and how many there are (a failed score leaves fewer).
    sums = np.zeros((count, values.shape[1] + 1))
    np.add.at(sums, place, np.column_stack([values, np.ones(len(values))]))
    means = values.mean(axis=0)
    if count == 1:
        return [Estimate(value=float(mean), low=None, high=None) for mean in means]
    random = np.random.default_rng(seed)
    chunk = max(1, _CELLS // count)
    drawn = []
    for start in range(0, resamples, chunk):
        chosen = random.integers(count, size=(min(chunk, resamples - start), count))
        totals = np.stack([column[chosen].sum(axis=1) for column in sums.T], axis=1)
        drawn.append(totals[:, :-1] / totals[:, -1:])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
    return [Estimate(value=float(m), low=float(a), high=float(b)) for m, a, b in zip(means, low, high, strict=True)]


def source_distance(picture: np.ndarray, source: np.ndarray) -> float:
    """Mean |picture − source| / 255 over the half of the pixels that changed least: 0 … 1, lower keeps more.

    An edit is meant to change a part of the source; the half that changed least lies outside of that part, unless the
    whole picture was to change. Both uint8 (H, W, 3); a pixel's change is the mean of its three channels.
    Raises: ValueError where the sizes differ.
    """
    if picture.shape != source.shape:
        raise ValueError(f"the picture is {picture.shape}, its source {source.shape}")
    change = np.abs(picture.astype(np.int16) - source).mean(axis=2).ravel()
    half = (change.size + 1) // 2
    return float(np.partition(change, half - 1)[:half].mean() / 255)
