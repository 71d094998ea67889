"""What is in a data set of `jobs.train`, and everything that is wrong with it:

    python -m jobs.check_data PATH [--split train] [--root FOLDER] [--area 1048576 [--step 64] …]
                              [--frames 21 --stride 3] [--urls]

With an area in pixels it tells how many examples each of data.buckets gets. With --urls it lists the URLs in the rows, for you to
download, a line each, and does nothing else: no job fetches any.

Every picture is decoded; no model is loaded, no cluster started and nothing is written. With a problem the status is 2.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from pydantic import ValidationError

from actors.checks import in_threads
from jobs.cli import run_main, say
from jobs.one_process import refuse_small
from rlhf.data.clips import Asked
from rlhf.data.columns import is_target_table
from rlhf.data.examples import PICTURES, PairIndex, blocks_of, check_block
from rlhf.data.files import TABLES, find_files
from rlhf.data.formats import Block, read_block
from rlhf.data.records import BadInput, Problem, Record, whole
from rlhf.data.sizes import Sizes, sides
from rlhf.data.work import is_record, record_size
from rlhf.errors import Refused
from rlhf.tables import BucketsTable
from rlhf.types import Geometry

SHOWN = 8
"""Different sizes that are listed."""
ANY_NUMBER = range(1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="what data.path of jobs.train may be: a file or a folder")
    parser.add_argument("--split", default="train", help="of a folder with files of several splits")
    parser.add_argument("--root", type=Path, help="data.root, which the paths in a JSONL or CSV start from")
    parser.add_argument("--area", type=int, help="of data.buckets, in pixels")
    for name in ("step", "min_side", "max_side"):
        default = BucketsTable.model_fields[name].default
        parser.add_argument(
            f"--{name}", type=int, default=default, help="of data.buckets, in pixels (default: %(default)s)"
        )
    parser.add_argument("--frames", type=int, default=1, help="model.frames, where the data set is of videos")
    parser.add_argument("--stride", type=int, default=1, help="data.frame_stride")
    parser.add_argument("--urls", action="store_true", help="list the URLs in the rows")
    given = parser.parse_args()
    for name in ("frames", "stride"):
        refuse_small(f"--{name}", getattr(given, name), 1)
    if given.urls:
        for url in urls_of(given.path.absolute(), given.split):
            say(url)
        return
    sides = {name: getattr(given, name) for name in ("step", "min_side", "max_side")}
    try:
        buckets = BucketsTable(areas=(given.area,), **sides) if given.area is not None else None
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        shown = " ".join(f"--{name} {value}" for name, value in {"area": given.area, **sides}.items())
        raise Refused(f"{shown}: {what}") from error
    asked = Asked(frames=given.frames, stride=given.stride)
    check_data(given.path.absolute(), given.split, buckets, given.root and given.root.absolute(), asked)


def check_data(
    path: Path, split: str, buckets: BucketsTable | None = None, root: Path | None = None, asked: Asked = PICTURES
) -> None:
    """Print what is there, and what goes into buckets of one area. Raises: BadInput with every problem."""
    if is_record(path):
        say(f"the record of an online run: {record_size(path)} pairs with their latents")
        return
    blocks, problems = list[Block](), list[Problem]()
    for file in find_files(path, split, "PATH"):
        try:
            blocks += blocks_of(file)
        except BadInput as error:
            problems += error.problems
    parts = in_threads(say, blocks, partial(_check, root=root, asked=asked)) if blocks else []
    problems += [problem for part in parts for problem in part.problems]
    if any(len(part.table) for part in parts):
        for line in described(parts, buckets):
            say(line)
    elif not problems:
        problems.append(whole(path, "holds no example", "give a data set with rows"))
    if problems:
        raise BadInput(problems, skippable=False)


def urls_of(path: Path, split: str) -> list[str]:
    """Every URL in the rows of a data set, once, in their order. Raises: BadInput for a row that cannot be read."""
    rows = [row for file in find_files(path, split, "PATH") for block in blocks_of(file) for row in read_block(block)]
    if problems := [row for row in rows if isinstance(row, Problem)]:
        raise BadInput(problems, skippable=False)
    values = (value for row in rows if isinstance(row, Record) for value in row.fields.values())
    flat = (one for value in values for one in (value if isinstance(value, list) else [value]))
    return list(dict.fromkeys(one for one in flat if isinstance(one, str) and re.match(r"\w+://", one)))


def _check(block: Block, root: Path | None, asked: Asked) -> PairIndex:
    """As a family would that takes any number of control pictures; tables of pairs have none."""
    counts = range(1) if block.format in TABLES and not is_target_table(Path(block.file)) else ANY_NUMBER
    return check_block(block, source_counts=counts, items=None, needs_loser=False, root=root, asked=asked)


def described(parts: Sequence[PairIndex], buckets: BucketsTable | None) -> Iterator[str]:
    """Lines about the examples that are good, of which there are some."""
    rows = pa.concat_tables([part.table for part in parts]).to_pylist()
    pairs = sum(row["picture_1"] is not None for row in rows)
    yield f"{pairs} pairs of a winner and a loser, {len(rows) - pairs} targets"
    if undecided := sum(part.ties + part.unlabelled for part in parts):
        yield f"{undecided} rows that prefer neither picture, which are left out"
    captions = Counter(row["caption"] for row in rows)
    yield f"captions: {len(captions)} different, up to {max(map(len, captions))} characters"
    yield f"control pictures of an example: {_counted(len(row['sources']) for row in rows)}"
    yield f"masks: {sum(row['mask'] is not None for row in rows)}"
    yield f"sizes (height × width): {_counted(_size(row['picture_0']) for row in rows)}"
    if buckets is not None:
        sized = Sizes(sizes=tuple(Geometry(height=h, width=w) for h, w in sides(buckets.areas[0], buckets)))
        preferred = (row[f"picture_{row['winner']}"] for row in rows)
        found = Counter(sized(picture["height"], picture["width"]) for picture in preferred)
        counts = ", ".join(f"{size.height} × {size.width} ({count})" for size, count in found.most_common())
        yield f"buckets: {counts}"
    if any(row["sources"] for row in rows):
        yield f"sizes of control pictures: {_counted(_size(source) for row in rows for source in row['sources'])}"


def _size(picture: Mapping[str, int]) -> str:
    return f"{picture['height']} × {picture['width']}"


def _counted(values: Iterable[object]) -> str:
    """Each value with how often it is there, the most frequent first."""
    counts = Counter(values).most_common()
    others = [f"{len(counts) - SHOWN} others"] if len(counts) > SHOWN else []
    return ", ".join([*(f"{value} ({count})" for value, count in counts[:SHOWN]), *others])


if __name__ == "__main__":
    run_main(main)
