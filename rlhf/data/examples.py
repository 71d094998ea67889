"""Checked preference pairs: what is wrong with each row, and the index that training draws from.

Pairs lie in tables with Pick-a-Pic's columns (Parquet, Arrow), or in a JSONL of winner, loser, prompt[, source]. A source is a
path or a list of paths. Where no loser is needed (SFT), a line may have a winner alone or, with the same meaning, a target.

Every picture is really decoded before any model loads. The index keeps no pixels: captions, which picture won, where the
pictures lie, and the hash of their bytes, in one Arrow file that any number of processes map into memory.
Left out: the order of training (`stream`), AI feedback (`actors.feedback`), pictures by URL, further columns (ignored).
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from rlhf.data import formats
from rlhf.data.checks import check
from rlhf.data.formats import Block
from rlhf.data.media import PictureFile
from rlhf.data.records import BadInput, Field, Problem, Record
from rlhf.runs.durable import durable
from rlhf.types import Cell, Example, Geometry, Prompt, Source

FORMAT = 4
ROWS_AT_ONCE = 10_000
TIE = 0.5
"""`label_0` of a row that prefers neither picture."""
_LABEL = "1 prefers jpg_0, 0 prefers jpg_1, 0.5 neither"
_TEXT = "give the text that the pictures were made for"
_BYTES = "give the bytes of a PNG, JPEG or WEBP file"
TABLE = (
    Field(name="caption", remedy=_TEXT),
    Field(name="label_0", kind="number", remedy=_LABEL),
    Field(name="jpg_0", kind="picture", remedy=_BYTES),
    Field(name="jpg_1", kind="picture", remedy=_BYTES),
    Field(name="has_label", kind="any", required=False),
)
"""Pick-a-Pic v2. label_0 is 1 where the first picture is preferred, 0 the second, 0.5 neither; has_label False: nobody chose."""
LINE = (
    Field(name="prompt", example='"a red apple"', remedy=_TEXT),
    Field(name="winner", kind="picture path", example='"pictures/1.png"'),
    Field(name="loser", kind="picture path", example='"pictures/2.png"'),
)
TARGET = Field(name="target", kind="picture path", example='"pictures/1.png"')
SOURCE = Field(name="source", kind="picture paths", example='"pictures/3.png"')
IMAGE_ID = Field(name="image_id", required=False, example='"10001"')
TABLE_SOURCE = Field(
    name="source", kind="picture path", remedy="an edit family learns from a JSONL of winner, loser, prompt, source"
)
SCHEMA = pa.schema(
    [
        ("block", pa.int32()),
        ("row", pa.int32()),
        ("number", pa.int64()),
        ("caption", pa.string()),
        ("winner", pa.int8()),
        ("content_0", pa.string()),
        ("content_1", pa.string()),
        ("path_0", pa.string()),
        ("path_1", pa.string()),
        ("source_paths", pa.list_(pa.string())),
        ("source_contents", pa.list_(pa.string())),
        ("image_id", pa.string()),
    ]
)


def blocks_of(file: Path) -> list[Block]:
    """The blocks of one file of pairs. Raises: BadInput for a file that is unreadable or lacks a column."""
    fields = () if file.suffix == ".jsonl" else TABLE
    give = f"Pick-a-Pic's columns {', '.join(field.name for field in TABLE if field.required)}"
    return formats.blocks_of(file, fields, give=f"{give}, or the pairs/ folder of an online run")


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """Checked pairs, in the order of the files. A row is a pair, or a picture to learn from that is compared with no other."""

    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    """Usable pairs per block."""
    table: pa.Table
    problems: tuple[Problem, ...] = ()
    """Of the rows that were left out."""
    ties: int = 0
    """Rows that prefer neither picture: no pair, and no fault."""
    unlabelled: int = 0
    """Rows that say themselves (has_label) that nobody chose."""

    def examples(self, rows: range, geometry: Geometry) -> Iterator[Example]:
        """The pairs of some rows, read some thousands at a time. Roles come in the order of the two pictures; one alone is a
        target. geometry: of the prompts.
        """
        for start in range(rows.start, rows.stop, ROWS_AT_ONCE):
            for row in self.table.slice(start, min(ROWS_AT_ONCE, rows.stop - start)).to_pylist():
                block, number, targets = self.blocks[row["block"]], row["number"], dict[str, Source]()
                roles = ("winner", "loser") if row["winner"] == 0 else ("loser", "winner")
                for side, role in enumerate(roles if row["content_1"] is not None else ("target",)):
                    path, column = row[f"path_{side}"], f"jpg_{side}"
                    cell = None if path else Cell(part=block.part, row=row["row"], column=column, number=number)
                    targets[role] = Source(path=path or block.file, cell=cell, content=row[f"content_{side}"])
                places = zip(row["source_paths"], row["source_contents"], strict=True)
                prompt = Prompt(
                    key=row["image_id"] or str(number),
                    instruction=row["caption"],
                    sources=tuple(Source(path=path, content=content) for path, content in places),
                    geometry=geometry,
                )
                yield Example(prompt=prompt, targets=targets)

    def relabelled(self, winners: np.ndarray, keep: np.ndarray) -> "PairIndex":
        """The pairs where `keep` (bool) is true, with these winners (int8); both (pairs,)."""
        place = SCHEMA.get_field_index("winner")
        table = self.table.set_column(place, SCHEMA.field("winner"), pa.array(winners, pa.int8())).filter(
            pa.array(keep)
        )
        sizes = np.bincount(table["block"].to_numpy(), minlength=len(self.blocks))
        return replace(self, table=table, sizes=tuple(sizes.tolist()))

    def digest(self) -> str:
        """Of what training sees: pictures, captions and winners, in order, and the blocks that the order is made of."""
        digest = xxhash.xxh3_128(repr(list(self.sizes)).encode())
        for name in ("content_0", "content_1", "source_contents", "caption", "winner"):
            for chunk in self.table[name].chunks:
                digest.update("\x1f".join(map(str, chunk.to_pylist())).encode())
        return digest.hexdigest()

    def report(self) -> str:
        """What is in it and what was left out, a line per problem."""
        count, others = len(self.table), f"{self.ties} ties, {self.unlabelled} unlabelled"
        lines = [f"{count} pairs in {len(self.blocks)} blocks; without a preference: {others}"]
        if again := self._repeated():
            lines.append(f"{again} pairs repeat an earlier one with its caption, or turn it round")
        if self.problems:
            lines.append(f"left out: {len(self.problems)} problems; going on with {count} pairs")
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])

    def _repeated(self) -> int:
        """Pairs of the same two pictures and caption as one before, whichever won."""
        columns = (self.table[name].to_pylist() for name in ("content_0", "content_1", "caption"))
        pairs = [(*sorted((first, second or "")), caption) for first, second, caption in zip(*columns, strict=True)]
        return len(pairs) - len(set(pairs))


# --- checking ----------------------------------------------------------------------------------------------------------


def check_block(
    block: Block, *, source_counts: range, items: Collection[str] | None, needs_loser: bool = True
) -> PairIndex:
    """The index of one block, every picture of which is decoded. source_counts: how many sources a row may have, see `Family`;
    `items`, where given, must hold every image_id.
    """
    is_table = block.format != ".jsonl"
    fields, target_fields = _fields(is_table, source_counts, needs_loser, items)
    rows, problems, ties, unlabelled = list[dict[str, Any]](), list[Problem](), 0, 0
    records: Sequence[Record | Problem]
    try:
        records = formats.read_block(block, TABLE if is_table else LINE)
    except BadInput as error:
        records = error.problems
    for place, record in enumerate(records):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        if is_table and record.fields.get("has_label") is False:
            unlabelled += 1
            continue
        if is_table and record.fields.get("label_0") in (TIE, str(TIE)):
            ties += 1
            continue
        values, faults = check(record, target_fields if "target" in record.fields else fields)
        label = values.get("label_0", 1.0)
        if label not in (0, 1):
            faults.append(record.problem("label_0", f"is {label:g}", _LABEL))
        first, second = (values.get(field.name) for field in (TABLE if is_table else LINE) if "picture" in field.kind)
        if isinstance(first, PictureFile) and isinstance(second, PictureFile) and first.content == second.content:
            faults.append(record.problem(None, "both pictures are the same", "leave the row out: it prefers neither"))
        if faults:
            problems += faults
            continue
        row = {"block": 0, "row": place, "number": record.number, "image_id": values.get("image_id")}
        row |= {"caption": values["caption" if is_table else "prompt"], "winner": 0 if label == 1 else 1}
        for side, picture in enumerate(value for value in values.values() if isinstance(value, PictureFile)):
            row |= {f"path_{side}": picture.path, f"content_{side}": picture.content}
        sources = values.get("source", ())
        row |= {"source_paths": [s.path for s in sources], "source_contents": [s.content for s in sources]}
        rows.append(row)
    table, found = pa.Table.from_pylist(rows, schema=SCHEMA), tuple(problems)
    return PairIndex(blocks=(block,), sizes=(len(rows),), table=table, problems=found, ties=ties, unlabelled=unlabelled)


def _fields(
    is_table: bool, source_counts: range, needs_loser: bool, items: Collection[str] | None
) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
    """What a row must have, and what one with a target."""
    prompt, winner, loser = LINE
    remedy = "give every pair the image_id of an item"
    known_id = replace(IMAGE_ID, required=True, known=items, known_in="data.item_metadata", remedy=remedy)
    source = TABLE_SOURCE if is_table else replace(SOURCE, counts=source_counts, required=0 not in source_counts)
    others = (source,) if max(source_counts) else ()
    others = (*others, IMAGE_ID if items is None else known_id)
    if is_table or needs_loser:
        both = (*(TABLE if is_table else LINE), *others)
        return both, both
    return (prompt, winner, replace(loser, required=False), *others), (prompt, TARGET, *others)


# --- files -------------------------------------------------------------------------------------------------------------


def write_index(file: Path, parts: Sequence[PairIndex]) -> None:
    """The pairs of indexes, one after the other, as one file; whole or not at all."""
    firsts = accumulate((len(part.blocks) for part in parts), initial=0)
    tables, block = [SCHEMA.empty_table()], SCHEMA.field("block")
    for part, first in zip(parts, firsts, strict=False):
        tables.append(part.table.set_column(0, block, pc.add(part.table["block"], pa.scalar(first, block.type))))
    about = {
        "blocks": [asdict(block) for part in parts for block in part.blocks],
        "sizes": [size for part in parts for size in part.sizes],
        "problems": [asdict(problem) for part in parts for problem in part.problems],
        "ties": sum(part.ties for part in parts),
        "unlabelled": sum(part.unlabelled for part in parts),
    }
    table = pa.concat_tables(tables).combine_chunks().replace_schema_metadata({"index": json.dumps(about)})
    file.parent.mkdir(parents=True, exist_ok=True)
    with durable(file) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_index(file: Path) -> PairIndex:
    """Map an index into memory."""
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    about = json.loads(table.schema.metadata[b"index"])
    return PairIndex(
        blocks=tuple(Block(**block) for block in about["blocks"]),
        sizes=tuple(about["sizes"]),
        table=table.replace_schema_metadata(None),
        problems=tuple(Problem(**problem) for problem in about["problems"]),
        ties=about["ties"],
        unlabelled=about["unlabelled"],
    )
