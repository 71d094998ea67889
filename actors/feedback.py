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


class FeedbackFailed(RuntimeError):
    """The judge gave no answer for a picture; what is scored is kept."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What the judge said of every pair of an index."""

    scores: np.ndarray
    """float64 (pairs, 2): of the first and of the second picture."""
    winners: np.ndarray
    """int8 (pairs,): the picture with the higher score; at a tie the human's."""
    swapped: float
    """Share of pairs whose winner is not the human's."""


def relabel(index: PairIndex, scores: np.ndarray) -> Feedback:
    """A pair is swapped iff its loser scores strictly higher (Diffusion-DPO, arXiv 2311.12908, on AI feedback)."""
    human = index.table["winner"].to_numpy()
    first, second = scores.T
    winners = np.where(first > second, 0, np.where(second > first, 1, human)).astype(np.int8)
    return Feedback(scores=scores, winners=winners, swapped=float((winners != human).mean()))


def score_pairs(
    index: PairIndex,
    judge: str,
    scorer: ray.actor.ActorHandle,
    items: Mapping[str, Item],
    kept: Path,
    timeout_s: float,
    log: Callable[[str], None],
) -> None:
    """Score what the file `kept` lacks, and keep it there.

    `timeout_s` is for one task and its pictures. Raises: FeedbackFailed naming the row and the judge's reason.
    """
    scores, todo = read_scores(kept, index), unscored(kept, index)
    log(f"feedback: {judge} scores {len(todo)} of {len(index)} pairs")
    work, running = _work(index, todo), {}
    saved = monotonic()
    try:
        while True:
            for rows, block, pairs in work:
                running[score_some.remote(judge, scorer, block, pairs, items, timeout_s)] = rows
                if len(running) == TASKS_AT_ONCE:
                    break
            if not running:
                break
            done, _ = ray.wait(list(running), timeout=timeout_s)
            if not done:
                raise FeedbackFailed(f"judge {judge!r} finished none of {len(running)} tasks in {timeout_s:.0f} s")
            answers = ray.get(done[0], timeout=timeout_s)
            rows = running.pop(done[0])
            for row, answer in zip(rows, answers, strict=True):
                if isinstance(answer, str):
                    pair = index[int(row)]
                    raise FeedbackFailed(
                        f"judge {judge!r}: {index.blocks[pair.block].file} row {pair.number}: {answer}"
                    )
                scores[row] = answer
            if monotonic() - saved > KEEP_EVERY_S:
                saved = monotonic()
                log(f"feedback: {int((~np.isnan(scores).any(axis=1)).sum())}/{len(index)} pairs")
                _keep(kept, scores)
    except ray.exceptions.RayTaskError as error:
        raise FeedbackFailed(f"judge {judge!r}: {error.cause}") from error
    finally:
        for task in running:
            ray.cancel(task)
        _keep(kept, scores)


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
    rows = _block(block)
    asked = []
    for pair in pairs:
        item = items.get(pair.image_id) if pair.image_id else None
        pictures = [ray.put(decode_image(data)) for data in pictures_of(block, rows, pair)]
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
    """Parquet: of every pair its file and row, the human's winner, both scores, and the winner it trains with."""
    blocks = index.table["block"].to_pylist()
    table = pa.table(
        {
            "file": [index.blocks[block].file for block in blocks],
            "row": index.table["number"],
            "human": index.table["winner"],
            "score_0": feedback.scores[:, 0],
            "score_1": feedback.scores[:, 1],
            "winner": feedback.winners,
        }
    )
    pq.write_table(table, file)
