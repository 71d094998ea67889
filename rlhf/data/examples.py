"""Checked preference pairs: what is wrong with each row, and the index that training draws from.

Pairs lie in tables with Pick-a-Pic's columns (Parquet, Arrow), or in a JSONL of winner, loser, prompt[, source]. A source is a
path or a list of paths. Where no loser is needed (SFT), a line may have a winner alone or, with the same meaning, a target.

Every picture is really decoded before any model loads. The index keeps no pixels: captions, which picture won, where the
pictures lie, and the hash of their bytes, in one Arrow file that any number of processes map into memory.
Left out: the order of training (`stream`), AI feedback (`actors.feedback`), pictures by URL, further columns (ignored).
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from rlhf.data import formats
from rlhf.data.checks import check
from rlhf.data.formats import Block
from rlhf.data.records import BadInput, Field, Problem, Record
from rlhf.runs.durable import durable
from rlhf.types import Cell, Source

FORMAT = 3
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
LINE_FIELDS = (*LINE, *(replace(field, required=False) for field in (TARGET, SOURCE)), IMAGE_ID)
"""All that a line may hold."""
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
class Preference:
    """One usable row: a pair, or a picture to learn from that is compared with no other."""

    block: int
    """Index of its block."""
    row: int
    """Place in the block, from 0."""
    number: int
    """Of the row (line) in its file, from 1."""
    caption: str
    winner: int
    """0 or 1: which of the two pictures is preferred; 0 where there is one."""
    content_0: str
    """xxh3-128 of the first picture's file."""
    content_1: str | None = None
    """None: there is no second picture."""
    path_0: str | None = None
    """Where a picture is a file of its own: its absolute path."""
    path_1: str | None = None
    source_paths: Sequence[str] = ()
    """Absolute, of what edit families see; empty for others."""
    source_contents: Sequence[str] = ()
    image_id: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """What the first picture and, where there is one, the second is: winner and loser, or target."""
        if self.content_1 is None:
            return ("target",)
        return ("winner", "loser") if self.winner == 0 else ("loser", "winner")

    @property
    def key(self) -> str:
        """The name of its prompt."""
        return self.image_id or str(self.number)

    def sources(self) -> tuple[Source, ...]:
        """What its pictures were made from."""
        places = zip(self.source_paths, self.source_contents, strict=True)
        return tuple(Source(path=path, content=content) for path, content in places)

    def pictures(self, block: Block) -> dict[str, Source]:
        """Its pictures by role, of a row of `block`."""
        given = ((self.path_0, self.content_0), (self.path_1, self.content_1))
        found = {}
        for side, (role, (path, content)) in enumerate(zip(self.roles, given, strict=False)):
            cell = None if path else Cell(part=block.part, row=self.row, column=f"jpg_{side}", number=self.number)
            found[role] = Source(path=path or block.file, cell=cell, content=str(content))
        return found


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a block holds."""

    pairs: tuple[Preference, ...]
    problems: tuple[Problem, ...] = ()
    ties: int = 0
    """Rows that prefer neither picture: no pair, and no fault."""
    unlabelled: int = 0
    """Rows that say themselves (has_label) that nobody chose."""


def check_block(
    number: int, block: Block, *, needs_source: bool, items: Collection[str] | None, needs_loser: bool = True
) -> Checked:
    """Read a block and decode every picture. `number` is the block's index; `items`, where given, must hold every image_id."""
    pairs, problems, ties, unlabelled = [], [], 0, 0
    remedy = "give every pair the image_id of an item"
    known_id = replace(IMAGE_ID, required=True, known=items, known_in="data.item_metadata", remedy=remedy)
    try:
        rows = formats.read_block(block, LINE_FIELDS if block.format == ".jsonl" else TABLE)
    except BadInput as error:
        return Checked(pairs=(), problems=error.problems)
    for row, record in enumerate(rows):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        if record.fields.get("has_label") is False:
            unlabelled += 1
            continue
        if record.fields.get("label_0") in (TIE, str(TIE)):
            ties += 1
            continue
        fields = _line_fields(record, needs_loser) if block.format == ".jsonl" else TABLE
        if needs_source:
            fields = (*fields, SOURCE if block.format == ".jsonl" else TABLE_SOURCE)
        values, faults = check(record, (*fields, IMAGE_ID if items is None else known_id))
        label = values.get("label_0", 1.0)
        if label not in (0, 1):
            faults.append(record.problem("label_0", f"is {label:g}", _LABEL))
        if faults:
            problems += faults
        else:
            pairs.append(_preference(number, row, record, values))
    return Checked(pairs=tuple(pairs), problems=tuple(problems), ties=ties, unlabelled=unlabelled)


def _line_fields(record: Record, needs_loser: bool) -> tuple[Field, ...]:
    prompt, winner, loser = LINE
    if needs_loser:
        return LINE
    if "target" in record.fields:
        return (prompt, TARGET)
    return (prompt, winner, replace(loser, required=False))


def _preference(number: int, row: int, record: Record, values: Mapping[str, Any]) -> Preference:
    first, second = (values.get(name) for name in (("jpg_0", "jpg_1") if "jpg_0" in values else ("winner", "loser")))
    first = first or values["target"]
    sources = values.get("source", ())
    return Preference(
        block=number,
        row=row,
        number=record.number,
        caption=values["caption"] if "caption" in values else values["prompt"],
        winner=0 if values.get("label_0", 1) == 1 else 1,
        content_0=first.content,
        content_1=second.content if second else None,
        path_0=first.path,
        path_1=second.path if second else None,
        source_paths=[source.path for source in sources],
        source_contents=[source.content for source in sources],
        image_id=values.get("image_id"),
    )


# --- the index ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """Checked pairs, in the order of the files."""

    blocks: tuple[Block, ...]
    table: pa.Table
    ties: int
    unlabelled: int

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Preference:
        return Preference(**{name: self.table[name][row].as_py() for name in self.table.column_names})

    def preferences(self, rows: int) -> Iterator[Preference]:
        """The first `rows` pairs, read some thousands at a time."""
        for start in range(0, rows, ROWS_AT_ONCE):
            for values in self.table.slice(start, min(ROWS_AT_ONCE, rows - start)).to_pylist():
                yield Preference(**values)

    def block_sizes(self) -> np.ndarray:
        """Usable pairs per block, int64 (blocks,)."""
        return np.bincount(self.table["block"].to_numpy(), minlength=len(self.blocks)).astype(np.int64)

    def relabelled(self, winners: np.ndarray, keep: np.ndarray) -> "PairIndex":
        """The pairs where `keep` (bool) is true, with these winners (int8); both (pairs,)."""
        place = SCHEMA.get_field_index("winner")
        table = self.table.set_column(place, SCHEMA.field("winner"), pa.array(winners, pa.int8())).filter(
            pa.array(keep)
        )
        return PairIndex(blocks=self.blocks, table=table, ties=self.ties, unlabelled=self.unlabelled)

    def digest(self) -> str:
        """Of what training sees: pictures, captions and winners, in order, and the blocks that the order is made of."""
        digest = xxhash.xxh3_128(repr(self.block_sizes().tolist()).encode())
        for name in ("content_0", "content_1", "source_contents", "caption", "winner"):
            for chunk in self.table[name].chunks:
                digest.update("\x1f".join(map(str, chunk.to_pylist())).encode())
        return digest.hexdigest()


def gather(blocks: Sequence[Block], checked: Iterable[Checked]) -> tuple[PairIndex, list[Problem]]:
    """The index of checked blocks, given in order, and every problem in them."""
    pairs: list[Preference] = []
    problems: list[Problem] = []
    ties = unlabelled = 0
    for found in checked:
        pairs += found.pairs
        problems += found.problems
        ties, unlabelled = ties + found.ties, unlabelled + found.unlabelled
    table = pa.Table.from_pylist([asdict(pair) for pair in pairs], schema=SCHEMA)
    return PairIndex(blocks=tuple(blocks), table=table, ties=ties, unlabelled=unlabelled), problems


def write_index(file: Path, index: PairIndex) -> None:
    """Whole or not at all."""
    about = {"format": FORMAT, "ties": index.ties, "unlabelled": index.unlabelled}
    metadata = {"index": json.dumps(about | {"blocks": [asdict(block) for block in index.blocks]})}
    table = index.table.replace_schema_metadata(metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    with durable(file) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_index(file: Path) -> PairIndex:
    """Map an index into memory."""
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    about = json.loads(table.schema.metadata[b"index"])
    blocks = tuple(Block(**block) for block in about["blocks"])
    return PairIndex(
        blocks=blocks, table=table.replace_schema_metadata(None), ties=about["ties"], unlabelled=about["unlabelled"]
    )
