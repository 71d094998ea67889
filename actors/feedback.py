"""AI feedback: a judge of the reward tier decides which picture of a pair wins (Diffusion-DPO's `choice_model`).

Pictures are read and decoded in tasks and go to the judge by reference; its replicas batch them. Scores are kept beside the
index as they come, so that an interrupted relabelling goes on. Left out: scores from more than one judge.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from actors.asking import Failure
from rlhf.data.examples import PairIndex, Preference, pictures_of
from rlhf.data.media import decode_image
from rlhf.data.pair_files import Block, read_block
from rlhf.errors import Refused
from rlhf.rollouts.reliability import FailureRates, JudgeUnreliable
from rlhf.types import Item

READER_CPUS = 0.1
PAIRS_PER_TASK = 16
TASKS_AT_ONCE = 4
KEEP_EVERY_S = 30.0


class FeedbackFailed(Refused):
    """The judge or a reader of pictures was lost, or a picture has changed; what is scored is kept."""


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
        return Scores(values=np.full((len(index), 2), np.nan), failed=np.zeros(len(index), bool))
    with np.load(kept) as arrays:
        return Scores(values=arrays["values"], failed=arrays["failed"])


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What follows from a judge's scores."""

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
    judge: str,
    scorer: ray.actor.ActorHandle,
    items: Mapping[str, Item],
    kept: Path,
    timeout_s: float,
    max_failure_rate: float,
    log: Callable[[str], None],
) -> Scores:
    """Ask about every pair that the file `kept` lacks, and keep the answers there too. A pair without one is told and marked.

    `timeout_s` is for one task and its pictures. Raises: JudgeUnreliable above `max_failure_rate`, and then all marks are
    taken back, to be asked again of a judge that was mended; FeedbackFailed.
    """
    scores, rates = read_scores(kept, index), FailureRates(max_failure_rate)
    todo = scores.unasked()
    log(f"feedback: {judge} scores {len(todo)} of {len(index)} pairs")
    saved = monotonic()
    try:
        for done, (row, answer) in enumerate(_answers(index, todo, judge, scorer, items, timeout_s), start=1):
            if isinstance(answer, str):
                pair = index[row]
                answer = f"{index.blocks[pair.block].file} row {pair.number}: {answer}"
                log(f"feedback: left out: {answer}")
                scores.failed[row] = True
            else:
                scores.values[row] = answer
            rates.add(judge, answer if isinstance(answer, str) else None)
            if monotonic() - saved > KEEP_EVERY_S:
                saved = monotonic()
                log(f"feedback: {done}/{len(todo)} pairs")
                _keep(kept, scores, index)
        rates.check(judge)
    except JudgeUnreliable:
        scores.failed[:] = False
        raise
    except ray.exceptions.RayError as error:
        raise FeedbackFailed(f"scoring stopped: {getattr(error, 'cause', None) or error}") from error
    finally:
        _keep(kept, scores, index)
    return scores


def _answers(
    index: PairIndex,
    rows: np.ndarray,
    judge: str,
    scorer: ray.actor.ActorHandle,
    items: Mapping[str, Item],
    timeout_s: float,
) -> Iterator[tuple[int, tuple[float, float] | str]]:
    """(row of the index, its two scores or why it has none), as they come. Raises: FeedbackFailed at the deadline."""
    work, running = _work(index, rows), {}
    try:
        while True:
            for some, block, pairs in work:
                running[score_some.remote(judge, scorer, block, pairs, items, timeout_s)] = some
                if len(running) == TASKS_AT_ONCE:
                    break
            if not running:
                return
            done, _ = ray.wait(list(running), timeout=timeout_s)
            if not done:
                raise FeedbackFailed(f"judge {judge!r} finished none of {len(running)} tasks in {timeout_s:.0f} s")
            answers = ray.get(done[0], timeout=timeout_s)
            yield from zip(running.pop(done[0]), answers, strict=True)
    finally:
        for task in running:
            ray.cancel(task)


def _work(index: PairIndex, rows: np.ndarray) -> Iterator[tuple[list[int], Block, list[Preference]]]:
    """(index rows, their block, their pairs), some of one block at a time."""
    blocks = index.table["block"].to_numpy()
    for block in np.unique(blocks[rows]):
        inside = [int(row) for row in rows[blocks[rows] == block]]
        for start in range(0, len(inside), PAIRS_PER_TASK):
            part = inside[start : start + PAIRS_PER_TASK]
            yield part, index.blocks[block], [index[row] for row in part]


@ray.remote(num_cpus=READER_CPUS, max_retries=2)
def score_some(
    judge: str,
    scorer: ray.actor.ActorHandle,
    block: Block,
    pairs: list[Preference],
    items: Mapping[str, Item],
    timeout_s: float,
) -> list[tuple[float, float] | str]:
    """Scores of both pictures of every pair, at their own size; or why a pair has none."""
    asked = []
    for pair in pairs:
        item = items.get(pair.image_id) if pair.image_id else None
        pictures = [ray.put(decode_image(data)) for data in pictures_of(pair, block, _block)[:2]]
        asked += [scorer.score.remote([picture], pair.caption, item) for picture in pictures]
    answers = [answer[judge] for answer in ray.get(asked, timeout=timeout_s)]
    return [_both(*answers[i : i + 2]) for i in range(0, len(answers), 2)]


def _both(first: float | Failure, second: float | Failure) -> tuple[float, float] | str:
    for answer in (first, second):
        if isinstance(answer, Failure):
            return answer.reason
    assert not isinstance(first, Failure) and not isinstance(second, Failure)
    return first, second


@lru_cache(maxsize=2)
def _block(block: Block):
    return read_block(block)


def _keep(file: Path, scores: Scores, index: PairIndex) -> None:
    """Write the scores, and those that another job has written meanwhile."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        theirs = read_scores(file, index).values
        values = np.where(np.isnan(scores.values), theirs, scores.values)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        with partial.open("wb") as out:
            np.savez(out, values=values, failed=scores.failed)
        partial.rename(file)


def write_record(file: Path, index: PairIndex, feedback: Feedback) -> None:
    """Parquet: of every pair its file and row, the human's winner, both scores, and the winner it trains with.

    A pair that the judge failed on has no scores and no winner: it is left out.
    """
    blocks = index.table["block"].to_pylist()
    table = pa.table(
        {
            "file": [index.blocks[block].file for block in blocks],
            "row": index.table["number"],
            "human": index.table["winner"],
            "score_0": pa.array(feedback.scores.values[:, 0], mask=~feedback.scored),
            "score_1": pa.array(feedback.scores.values[:, 1], mask=~feedback.scored),
            "winner": pa.array(feedback.winners, mask=~feedback.scored),
        }
    )
    pq.write_table(table, file)
