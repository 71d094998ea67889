"""AI feedback: a judge of the reward tier decides which picture of a pair wins (Diffusion-DPO's `choice_model`).

Pictures are read in tasks and go to the judge by reference, at their own size. Scores are kept beside the index as they come,
so that an interrupted relabelling goes on. Left out: scores from more than one judge.
"""

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors import reading
from actors.judging import Judging, Read, judge_all
from rlhf.data.examples import PairIndex
from rlhf.rollouts.reliability import FailureRates, JudgeUnreliable
from rlhf.runs.durable import durable
from rlhf.types import Example, Geometry, Item, Prompt, Sized

PAIRS_PER_READ = 16
KEEP_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a judge has said so far of every pair of an index."""

    values: np.ndarray
    """float64 (pairs, 2): of the first and of the second picture; NaN where there is no score."""
    failed: np.ndarray
    """bool (pairs,): the judge was asked and had no answer for one of the two."""

    def unasked(self) -> np.ndarray:
        """int64: rows of the index that the judge was not asked about yet."""
        return np.flatnonzero(np.isnan(self.values).any(axis=1) & ~self.failed)


def read_scores(kept: Path, index: PairIndex) -> Scores:
    """What the file `kept` holds; nothing yet where there is none."""
    if not kept.exists():
        return Scores(values=np.full((len(index.table), 2), np.nan), failed=np.zeros(len(index.table), bool))
    with np.load(kept) as arrays:
        return Scores(values=arrays["values"], failed=arrays["failed"])


@dataclass(frozen=True, kw_only=True)
class Feedback:
    scores: Scores
    winners: np.ndarray
    """int8 (pairs,): the picture with the higher score; at a tie, or without scores, the human's."""
    swapped: float
    """Share of the scored pairs whose winner is not the human's."""

    @property
    def scored(self) -> np.ndarray:
        """bool (pairs,): the pairs that the judge could tell of; the others are left out of training."""
        return ~self.scores.failed


def relabel(index: PairIndex, scores: Scores) -> Feedback:
    """A pair is swapped iff its loser scores strictly higher (Diffusion-DPO, arXiv 2311.12908, on AI feedback)."""
    assert not scores.unasked().size, "some pairs were never shown to the judge"
    human = index.table["winner"].to_numpy()
    first, second = scores.values.T
    winners = np.where(first > second, 0, np.where(second > first, 1, human)).astype(np.int8)
    return Feedback(scores=scores, winners=winners, swapped=float((winners != human)[~scores.failed].mean()))


def score_pairs(
    index: PairIndex,
    sized: Sized,
    judge: str,
    judging: Judging,
    items: Mapping[str, Item],
    kept: Path,
    max_failure_rate: float,
    log: Callable[[str], None],
) -> Scores:
    """Ask about every pair that the file `kept` lacks, and keep the answers there too. A pair without one is logged and marked.

    sized: of training; a judge sees every picture at its own size. judging: asks `judge` alone, and no filter. Raises:
    JudgeUnreliable above `max_failure_rate`, and then all marks are taken back, to be asked again of a judge that was mended;
    what `judge_all` does.
    """
    scores, rates = read_scores(kept, index), FailureRates(max_failure_rate)
    todo = scores.unasked()
    log(f"feedback: {judge} scores {len(todo)} of {len(index.table)} pairs")
    saved = monotonic()
    try:
        for done, (row, answer) in enumerate(_answers(index, sized, todo, judge, judging, items), start=1):
            reason = None
            if isinstance(answer, str):
                scores.failed[row] = True
                block, number = (index.table[name][row].as_py() for name in ("block", "number"))
                reason = f"{index.blocks[block].file} row {number}: {answer}"
                log(f"feedback: left out: {reason}")
            else:
                scores.values[row] = answer
            rates.add(judge, reason)
            if monotonic() - saved > KEEP_EVERY_S:
                saved = monotonic()
                log(f"feedback: {done}/{len(todo)} pairs")
                _keep(kept, scores, index)
        rates.check(judge)
    except JudgeUnreliable:
        scores.failed[:] = False
        raise
    finally:
        _keep(kept, scores, index)
    return scores


def _answers(
    index: PairIndex, sized: Sized, rows: np.ndarray, judge: str, judging: Judging, items: Mapping[str, Item]
) -> Iterator[tuple[int, tuple[float, ...] | str]]:
    """(row of the index, its two scores or why it has none), as they come. Raises: what `judge_all` does."""
    with closing(judge_all(judging, _reads(index, sized, rows, items))) as judged:
        for some in judged:
            for row, *both in zip(some.key, some.answers[::2], some.answers[1::2], strict=True):
                reasons = [failure.reason for answer in both for failure in answer.failures]
                yield row, reasons[0] if reasons else tuple(answer.rewards[judge] for answer in both)


def _reads(index: PairIndex, sized: Sized, rows: np.ndarray, items: Mapping[str, Item]) -> Iterator[Read[list[int]]]:
    """Some pairs of one block at a time: both pictures of each, a lone one twice, so that nothing is swapped."""
    blocks = index.table["block"].to_numpy()
    for block in np.unique(blocks[rows]):
        inside = rows[blocks[rows] == block].tolist()
        for start in range(0, len(inside), PAIRS_PER_READ):
            part = inside[start : start + PAIRS_PER_READ]
            pairs = [pair for row in part for pair in index.examples(range(row, row + 1), sized)]
            given = [list(pair.targets.values()) for pair in pairs]
            pictures = [picture for some in given for picture in (some[0], some[-1])]
            read = partial(reading.start, reading.of_data_set, pictures)
            yield Read(key=part, start=read, prompts=partial(_prompts, pairs, items))


def _prompts(pairs: Sequence[Example], items: Mapping[str, Item], sizes: Sequence[tuple[int, int]]) -> list[Prompt]:
    """What the two pictures of every pair are judged for. A source is brought to the size of the picture beside it."""
    twice = [pair.prompt for pair in pairs for _ in range(2)]
    return [
        replace(prompt, item=items.get(prompt.key, {}), geometry=Geometry(height=height, width=width))
        for prompt, (height, width) in zip(twice, sizes, strict=True)
    ]


def _keep(file: Path, scores: Scores, index: PairIndex) -> None:
    """Write the scores, and those that another job has written meanwhile."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        values = np.where(np.isnan(scores.values), read_scores(file, index).values, scores.values)
        with durable(file) as partial, partial.open("wb") as out:
            np.savez(out, values=values, failed=scores.failed)


def write_record(file: Path, index: PairIndex, feedback: Feedback) -> None:
    """Parquet: of every pair its file and row, the human's winner and, where the judge did not fail, what it made of it."""
    failed = feedback.scores.failed
    columns = {
        "file": [index.blocks[block].file for block in index.table["block"].to_pylist()],
        "row": index.table["number"],
        "human": index.table["winner"],
        "score_0": pa.array(feedback.scores.values[:, 0], mask=failed),
        "score_1": pa.array(feedback.scores.values[:, 1], mask=failed),
        "winner": pa.array(feedback.winners, mask=failed),
    }
    pq.write_table(pa.table(columns), file)
