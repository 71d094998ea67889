"""Checking files of preference pairs: every picture decoded, in tasks of Ray Data, or in threads where Ray must not start.

The answer is an index in the cache folder, named after the files' sizes and times, so that a data set is decoded for its
check once. A JSONL is checked every time: its pictures are files of their own, and may be mended without it.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import ray
import ray.data
import xxhash

from actors import streaming
from rlhf.data.examples import FORMAT, Checked, PairIndex, blocks_of, check_block, gather, read_index, write_index
from rlhf.data.files import find_files
from rlhf.data.formats import Block
from rlhf.data.records import BadInput, Problem
from rlhf.tables import PreprocessConfig
from rlhf.types import Item

CHECKER_CPUS = 0.1
T = TypeVar("T")
PROGRESS_EVERY_S = 10.0
Check = Callable[[int, Block], Checked]
CheckAll = Callable[[Sequence[Block], Check], list[Checked]]


@dataclass(frozen=True, kw_only=True)
class CheckedPairs:
    """A data set that was checked."""

    file: Path
    index: PairIndex
    """What lies in `file`."""
    problems: tuple[Problem, ...]

    def report(self) -> str:
        """What is in it and what was left out, a line per problem."""
        index, others = self.index, f"{self.index.ties} ties, {self.index.unlabelled} unlabelled"
        lines = [f"{len(index)} pairs in {len(index.blocks)} blocks; without a preference: {others}"]
        if self.problems:
            lines.append(f"left out: {len(self.problems)} problems; going on with {len(index)} pairs")
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


def check_pairs(
    path: Path,
    split: str,
    *,
    key: str,
    cache: Path,
    on_bad_row: str,
    needs_source: bool,
    needs_loser: bool,
    items: Mapping[str, Item] | None,
    check_all: CheckAll,
) -> CheckedPairs:
    """The index of a data set. key: the configuration key of `path`, for messages. check_all: does the work. Raises: BadInput
    with every problem, unless on_bad_row is "skip" and some pairs are good.
    """
    files = find_files(path, split, key)
    blocks, problems = list[Block](), list[Problem]()
    for file in files:
        try:
            blocks += blocks_of(file)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    places = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = json.dumps([FORMAT, places, needs_source, needs_loser, sorted(items or ())])
    folder = cache / "pairs" / xxhash.xxh3_128_hexdigest(about.encode())
    index_file, problems_file = folder / "index.arrow", folder / "problems.json"
    if not index_file.exists() or any(file.suffix == ".jsonl" for file in files):
        check = partial(check_block, needs_source=needs_source, needs_loser=needs_loser, items=items)
        index, problems = gather(blocks, check_all(blocks, check))
        folder.mkdir(parents=True, exist_ok=True)
        problems_file.write_text(json.dumps([asdict(problem) for problem in problems]))
        write_index(index_file, index)
    problems = [Problem(**values) for values in json.loads(problems_file.read_text())]
    index = read_index(index_file)
    if problems and (on_bad_row == "stop" or not len(index)):
        raise BadInput(problems)
    if not len(index):
        what = f"holds no pair: it has {index.ties} ties, {index.unlabelled} unlabelled rows"
        remedy = f"set {key} to labelled pairs"
        raise BadInput([Problem(file=str(path), line=None, field=None, what=what, remedy=remedy)])
    return CheckedPairs(file=index_file, index=index, problems=tuple(problems))


def in_threads(log: Callable[[str], None], blocks: Sequence[Block], check: Check) -> list[Checked]:
    """In this process, for a dry run."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(_told(log, blocks, pool.map(check, range(len(blocks)), blocks)))


def _told(log: Callable[[str], None], blocks: Sequence[Block], found: Iterable[T]) -> Iterator[T]:
    log(f"checking {sum(block.count for block in blocks)} rows in {len(blocks)} blocks")
    shown = monotonic()
    for done, one in enumerate(found, start=1):
        yield one
        if monotonic() - shown > PROGRESS_EVERY_S:
            shown = monotonic()
            log(f"checked {done}/{len(blocks)} blocks")


def on_cluster(
    settings: PreprocessConfig, log: Callable[[str], None], blocks: Sequence[Block], check: Check
) -> list[Checked]:
    """By tasks of Ray Data, on every node that sees the files. Raises: PreprocessFailed, StreamBroken."""
    if not blocks:
        return []
    streaming.prepare()
    rows = [{"number": number, "block": pickle.dumps(block)} for number, block in enumerate(blocks)]

    def task(row: dict[str, Any]) -> dict[str, Any]:
        found = check(row["number"], pickle.loads(row["block"]))
        return {"number": row["number"], "found": pickle.dumps(found), "error": ""}

    # As many at once as there are CPUs, though each asks for little: a checker does nothing but decode.
    cpus = int(ray.cluster_resources().get("CPU", 1))
    tasks = ray.data.TaskPoolStrategy(size=max(1, min(cpus, len(rows))))
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
    checked = dataset.map(task, num_cpus=CHECKER_CPUS, compute=tasks)
    stream = streaming.stream(checked, "the check of the pairs", settings.timeout_s)
    answers = {row["number"]: row["found"] for row in _told(log, blocks, stream)}
    return [pickle.loads(answers[number]) for number in range(len(blocks))]
