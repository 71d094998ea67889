"""Checking files of preference pairs: every picture decoded, in tasks of Ray Data, or in threads where Ray must not start.

The answer is an index in the cache folder, named after the files' sizes and times, so that a data set is decoded for its
check once. A JSONL, CSV or folder is checked every time: its pictures are files of their own, and may be mended without it.
"""

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import ray.data
import xxhash

from actors import streaming
from rlhf.data.clips import Asked
from rlhf.data.columns import is_target_table
from rlhf.data.examples import FORMAT, PICTURES, PairIndex, blocks_of, check_block, read_index, write_index
from rlhf.data.files import TABLES, find_files
from rlhf.data.formats import Block
from rlhf.data.records import BadInput, Problem, whole
from rlhf.tables import PreprocessConfig
from rlhf.types import Item

CHECKER_CPUS = 0.1
PROGRESS_EVERY_S = 10.0
Check = Callable[[Block], PairIndex]
CheckAll = Callable[[Sequence[Block], Check], list[PairIndex]]


def check_pairs(
    paths: Sequence[Path],
    split: str,
    *,
    key: str,
    cache: Path,
    on_bad_row: str,
    source_counts: range,
    needs_loser: bool,
    items: Mapping[str, Item] | None,
    check_all: CheckAll,
    root: Path | None = None,
    asked: Asked = PICTURES,
) -> Path:
    """The file of the index of some data sets, in their order.

    key: the configuration key of `paths`, for messages. check_all: does the work. root, asked: of `check_block`. Raises: BadInput
    with every problem, unless on_bad_row is "skip" and some pairs are good.
    """
    files = [file for path in paths for file in find_files(path, split, key)]
    if needs_loser and any(file.is_dir() or is_target_table(file) for file in files):
        remedy = 'set objective = "sft", or give pairs of a winner and a loser'
        raise BadInput([whole(paths[0], "holds pictures to learn from, but none that they are preferred to", remedy)])
    blocks, problems = list[Block](), list[Problem]()
    for file in files:
        try:
            blocks += blocks_of(file)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    places = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = json.dumps([FORMAT, places, str(source_counts), needs_loser, sorted(items or ()), str(root), str(asked)])
    index_file = cache / "pairs" / xxhash.xxh3_128_hexdigest(about.encode()) / "index.arrow"
    if not index_file.exists() or any(file.suffix not in TABLES for file in files):
        check = partial(
            check_block, source_counts=source_counts, needs_loser=needs_loser, items=items, root=root, asked=asked
        )
        write_index(index_file, check_all(blocks, check))
    index = read_index(index_file)
    if index.problems and (on_bad_row == "stop" or not len(index.table)):
        raise BadInput(index.problems)
    if not len(index.table):
        what = f"holds no example: it has {index.ties} ties, {index.unlabelled} unlabelled rows"
        raise BadInput([whole(paths[0], what, f"set {key} to labelled pairs or targets")])
    return index_file


def in_threads(log: Callable[[str], None], blocks: Sequence[Block], check: Check) -> list[PairIndex]:
    """In this process, for a dry run."""
    found, tell = list[PairIndex](), _teller(log, blocks)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for one in pool.map(check, blocks):
            found.append(one)
            tell(len(found))
    return found


def _teller(log: Callable[[str], None], blocks: Sequence[Block]) -> Callable[[int], None]:
    """Says, now and then, how many blocks are done."""
    log(f"checking {sum(block.count for block in blocks)} rows in {len(blocks)} blocks")
    shown = monotonic()

    def tell(done: int) -> None:
        nonlocal shown
        if monotonic() - shown > PROGRESS_EVERY_S:
            shown = monotonic()
            log(f"checked {done}/{len(blocks)} blocks")

    return tell


def on_cluster(
    settings: PreprocessConfig, log: Callable[[str], None], blocks: Sequence[Block], check: Check
) -> list[PairIndex]:
    """By tasks of Ray Data, on every node that sees the files. Raises: PreprocessFailed, StreamBroken."""
    if not blocks:
        return []
    streaming.prepare()
    rows = [{"number": number, "block": pickle.dumps(block)} for number, block in enumerate(blocks)]

    def task(row: dict[str, Any]) -> dict[str, Any]:
        found = check(pickle.loads(row["block"]))
        return {"number": row["number"], "found": pickle.dumps(found), "error": ""}

    # As many at once as there are CPUs, though each asks for little: a checker does nothing but decode.
    cpus = int(ray.cluster_resources().get("CPU", 1))
    tasks = ray.data.TaskPoolStrategy(size=max(1, min(cpus, len(rows))))
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
    checked = dataset.map(task, num_cpus=CHECKER_CPUS, compute=tasks)
    stream = streaming.stream(checked, "the check of the pairs", settings.timeout_s)
    answers, tell = dict[int, bytes](), _teller(log, blocks)
    for row in stream:
        answers[row["number"]] = row["found"]
        tell(len(answers))
    return [pickle.loads(answers[number]) for number in range(len(blocks))]
