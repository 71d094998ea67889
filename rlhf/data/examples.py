"""Checked preference pairs: what is wrong with each row, and the index that training draws from.

Every picture is really decoded before any model loads. The index keeps no pixels: captions, which picture won, where the
pictures lie, and the hash of their bytes, in one Arrow file that any number of processes map into memory.
Left out: reading files (`pair_files`), the order of training (`pair_stream`), AI feedback (`actors.feedback`).
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from rlhf.data.pair_files import Block, RawPair, read_block
from rlhf.data.prompts import check_bytes, check_picture
from rlhf.data.records import Problem, is_text
from rlhf.errors import Refused
from rlhf.types import Item

FORMAT = 1
TIE = 0.5
"""`label_0` of a row that prefers neither picture."""
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
        ("source", pa.string()),
        ("source_content", pa.string()),
        ("image_id", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One usable row."""

    block: int
    """Index of its block."""
    row: int
    """Place in the block, from 0."""
    number: int
    """Of the row (line) in its file, from 1."""
    caption: str
    winner: int
    """0 or 1: which of the two pictures is preferred."""
    content_0: str
    """xxh3-128 of the first picture's file."""
    content_1: str
    path_0: str | None = None
    """Where a picture is a file of its own: its absolute path."""
    path_1: str | None = None
    source: str | None = None
    """Absolute path of the source picture, for edit families."""
    source_content: str | None = None
    image_id: str | None = None


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
    number: int, block: Block, *, needs_source: bool, items: Mapping[str, Item] | None, needs_loser: bool = True
) -> Checked:
    """Read a block and decode every picture. `number` is the block's index; `items`, where given, must know every row.

    Where no loser is needed, a line without one has its winner twice.
    """
    pairs, problems, ties, unlabelled = [], [], 0, 0
    try:
        rows = read_block(block)
    except (pa.ArrowException, OSError) as error:
        what = f"rows {block.first} to {block.first + block.count - 1} cannot be read: {error}"
        return Checked(
            pairs=(), problems=(Problem(file=block.file, line=block.first, field=None, what=what, remedy="replace it"),)
        )
    for row, raw in enumerate(rows):
        if raw.fields.get("has_label") is False:
            unlabelled += 1
            continue
        if raw.fields.get("label_0") == TIE:
            ties += 1
            continue
        found = _check_row(block, raw, needs_source, items, needs_loser)
        if isinstance(found, list):
            problems += found
        else:
            pairs.append(Preference(block=number, row=row, number=raw.number, **found))
    return Checked(pairs=tuple(pairs), problems=tuple(problems), ties=ties, unlabelled=unlabelled)


def _check_row(
    block: Block, raw: RawPair, needs_source: bool, items: Mapping[str, Item] | None, needs_loser: bool
) -> dict[str, Any] | list[Problem]:
    def problem(field: str | None, what: str, remedy: str) -> Problem:
        return Problem(file=block.file, line=raw.number, field=field, what=what, remedy=remedy)

    if "broken" in raw.fields:
        return [problem(None, raw.fields["broken"], 'write {"winner": …, "loser": …, "prompt": …}')]
    jsonl = block.file.endswith(".jsonl")
    problems: list[Problem] = []
    caption, label, image_id = (raw.fields.get(field) for field in ("caption", "label_0", "image_id"))
    name = "prompt" if jsonl else "caption"
    if caption is None:
        problems.append(problem(name, "is missing", "give the text that the pictures were made for"))
    elif not isinstance(caption, str):
        problems.append(problem(name, f"is {caption!r}, not text", "give the text that the pictures were made for"))
    elif not is_text(caption):
        problems.append(problem(name, "holds half of a surrogate pair, which is no character", "write the character"))
    elif not caption.strip():
        problems.append(problem(name, "is empty", "give the text that the pictures were made for"))
    if label is None or label != label:
        problems.append(problem("label_0", "is missing", "1 prefers jpg_0, 0 prefers jpg_1, 0.5 neither"))
    elif label not in (0, 1):
        problems.append(problem("label_0", f"is {label!r}", "1 prefers jpg_0, 0 prefers jpg_1, 0.5 neither"))
    if jsonl:
        fields = (
            "winner",
            *(["loser"] if needs_loser or "loser" in raw.paths else []),
            *(["source"] if needs_source else []),
        )
        pictures = _check_files(block, raw, problems, fields)
    else:
        pictures = _check_bytes(raw, problem, problems)
    if needs_source and not jsonl:
        remedy = "an edit family learns from a JSONL of winner, loser, prompt, source"
        problems.append(problem("source", "is missing", remedy))
    if image_id is not None and not (isinstance(image_id, str) and is_text(image_id)):
        problems.append(problem("image_id", f"is {image_id!r}, not text", f'write it in quotes, like "{image_id}"'))
    elif items is not None and image_id not in items:
        what = (
            f"{raw.fields['image_id']!r} has no row in data.item_metadata" if "image_id" in raw.fields else "is missing"
        )
        problems.append(problem("image_id", what, "give every pair the image_id of an item"))
    if problems:
        return problems
    assert label is not None
    return {"caption": caption, "winner": 0 if label == 1 else 1, "image_id": image_id, **pictures}


def _check_bytes(raw: RawPair, problem: Any, problems: list[Problem]) -> dict[str, str]:
    found = {}
    for side, data in enumerate(raw.pictures):
        if data is None:
            problems.append(problem(f"jpg_{side}", "is missing", "give the bytes of a PNG, JPEG or WEBP file"))
            continue
        checked = check_bytes(data)
        if isinstance(checked[0], str):
            problems.append(problem(f"jpg_{side}", *checked))
        found[f"content_{side}"] = xxhash.xxh3_128_hexdigest(data)
    return found


def _check_files(block: Block, raw: RawPair, problems: list[Problem], fields: Sequence[str]) -> dict[str, str]:
    file = Path(block.file)
    found: dict[str, str] = {}
    for field in fields:
        name = raw.paths.get(field)
        if not isinstance(name, str) or not name:
            what = "is missing" if name is None else f"is {name!r}, no path"
            remedy = f'add "{field}": "pictures/1.png", relative to the file'
            problems.append(Problem(file=block.file, line=raw.number, field=field, what=what, remedy=remedy))
            continue
        checked = check_picture(file, file.parent.resolve(), raw.number, field, name)
        if isinstance(checked, Problem):
            problems.append(checked)
        elif field == "source":
            found |= {"source": checked[0], "source_content": checked[1]}
        else:
            side = 0 if field == "winner" else 1
            found |= {f"path_{side}": checked[0], f"content_{side}": checked[1]}
            if "loser" not in fields:
                found |= {"path_1": checked[0], "content_1": checked[1]}
    return found


def pictures_of(pair: Preference, block: Block, read: Callable[[Block], Sequence[RawPair]]) -> list[bytes]:
    """The files of a pair's two pictures and, where it has one, of its source; `read` gives the rows of its block.

    Raises Refused where one changed since it was checked.
    """
    if pair.path_0 and pair.path_1:
        files = [Path(path).read_bytes() for path in (pair.path_0, pair.path_1)]
    else:
        files = [data or b"" for data in read(block)[pair.row].pictures]
    contents = [pair.content_0, pair.content_1]
    if pair.source and pair.source_content:
        files.append(Path(pair.source).read_bytes())
        contents.append(pair.source_content)
    if [xxhash.xxh3_128_hexdigest(data) for data in files] != contents:
        raise Refused(f"{block.file} row {pair.number} changed since it was checked; start the job again")
    return files


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

    def captions(self) -> list[str]:
        """Every caption once."""
        return self.table["caption"].unique().to_pylist()

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
        for name in ("content_0", "content_1", "source_content", "caption", "winner"):
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
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    partial.rename(file)


def read_index(file: Path) -> PairIndex:
    """Map an index into memory."""
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    about = json.loads(table.schema.metadata[b"index"])
    blocks = tuple(Block(**block) for block in about["blocks"])
    return PairIndex(
        blocks=blocks,
        table=table.replace_schema_metadata(None),
        ties=about["ties"],
        unlabelled=about["unlabelled"],
    )
