"""AI feedback: a judge of the reward tier decides which picture of a pair wins (Diffusion-DPO's `choice_model`).

Pictures are read and decoded in tasks and go to the judge by reference; its replicas batch them. Scores are kept beside the
index as they come, so that an interrupted relabelling goes on. Left out: scores from more than one judge.
"""

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
from rlhf.data.pair_files import Block, read_block
from rlhf.data.preferences import PairIndex, Preference, pictures_of
from rlhf.rewards.images import decode_image
from rlhf.types import Item

READER_CPUS = 0.1
PAIRS_PER_TASK = 16
TASKS_AT_ONCE = 4
KEEP_EVERY_S = 30.0
MIN_ASKED = 10
"""Pairs before the failure rate counts."""
FAILED = np.inf
"""In place of a score that the judge could not give: never compared, never trained on."""


class FeedbackFailed(RuntimeError):
    """The judge failed too often or was lost; what is scored is kept."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What the judge said of every pair of an index."""

    scores: np.ndarray
    """float64 (pairs, 2): of the first and of the second picture; infinite where the judge failed on one of them."""
    winners: np.ndarray
    """int8 (pairs,): the picture with the higher score; at a tie the human's."""
    swapped: float
    """Share of the scored pairs whose winner is not the human's."""

    @property
    def scored(self) -> np.ndarray:
        """bool (pairs,): the pairs that the judge could tell of; the others are left out of training."""
        return np.isfinite(self.scores).all(axis=1)


def relabel(index: PairIndex, scores: np.ndarray) -> Feedback:
    """A pair is swapped iff its loser scores strictly higher (Diffusion-DPO, arXiv 2311.12908, on AI feedback)."""
    human = index.table["winner"].to_numpy()
    first, second = scores.T
    winners = np.where(first > second, 0, np.where(second > first, 1, human)).astype(np.int8)
    scored = np.isfinite(scores).all(axis=1)
    return Feedback(scores=scores, winners=winners, swapped=float((winners != human)[scored].mean()))


def score_pairs(
    index: PairIndex,
    judge: str,
    scorer: ray.actor.ActorHandle,
    items: Mapping[str, Item],
    kept: Path,
    timeout_s: float,
    max_failure_rate: float,
    log: Callable[[str], None],
) -> None:
    """Score what the file `kept` lacks, and keep it there. A pair that the judge fails on is told and marked.

    `timeout_s` is for one task and its pictures. Raises: FeedbackFailed where the judge fails on more than
    `max_failure_rate` of the pairs, or is lost.
    """
    scores, todo = read_scores(kept, index), unscored(kept, index)
    log(f"feedback: {judge} scores {len(todo)} of {len(index)} pairs")
    saved, asked, reasons = monotonic(), 0, []
    try:
        for row, answer in _answers(index, todo, judge, scorer, items, timeout_s):
            asked += 1
            if isinstance(answer, str):
                pair = index[row]
                reasons.append(f"{index.blocks[pair.block].file} row {pair.number}: {answer}")
                log(f"feedback: left out: {reasons[-1]}")
            scores[row] = FAILED if isinstance(answer, str) else answer
            if asked >= min(MIN_ASKED, len(todo)) and len(reasons) > max_failure_rate * asked:
                scores[scores == FAILED] = np.nan  # to be asked again, of a judge that was mended
                raise FeedbackFailed(
                    f"judge {judge!r} failed on {len(reasons)} of {asked} pairs (judges.max_failure_rate = "
                    f"{max_failure_rate:.0%}); the last: {reasons[-1]}"
                )
            if monotonic() - saved > KEEP_EVERY_S:
                saved = monotonic()
                log(f"feedback: {asked}/{len(todo)} pairs")
                _keep(kept, scores)
    except ray.exceptions.RayError as error:
        raise FeedbackFailed(f"scoring stopped: {getattr(error, 'cause', None) or error}") from error
    finally:
        _keep(kept, scores)


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


def read_scores(kept: Path, index: PairIndex) -> np.ndarray:
    """float64 (pairs, 2): scores of the first and the second picture, NaN where a pair has none yet."""
    return np.load(kept) if kept.exists() else np.full((len(index), 2), np.nan)


def unscored(kept: Path, index: PairIndex) -> np.ndarray:
    """Rows of the index that have no scores yet."""
    return np.flatnonzero(np.isnan(read_scores(kept, index)).any(axis=1))


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


def _keep(file: Path, scores: np.ndarray) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("wb") as out:
        np.save(out, scores)
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
            "score_0": pa.array(feedback.scores[:, 0], mask=~feedback.scored),
            "score_1": pa.array(feedback.scores[:, 1], mask=~feedback.scored),
            "winner": pa.array(feedback.winners, mask=~feedback.scored),
        }
    )
    pq.write_table(table, file)
