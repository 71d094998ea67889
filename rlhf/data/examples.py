"""Checked examples: what is wrong with each row, and the index that training draws from.

Pairs lie in tables with Pick-a-Pic's columns (Parquet, Arrow), or in a JSONL or CSV of winner, loser, prompt[, source][, mask]. A
source is a path or a list of paths. Where no loser is needed (SFT), a line may have a winner alone or, with the same meaning, a
target; so may a table of target, prompt[, source][, mask] with the pictures in it; and a folder of pictures (`layouts`) does.
Columns go by the names of other trainers too (`columns`).

Every picture is really decoded before any model loads. The index keeps no pixels: captions, which picture won, where the
pictures lie, and the hash of their bytes, in one Arrow file that any number of processes map into memory.
Left out: the order of training (`stream`), AI feedback (`actors.feedback`), pictures by URL, further columns (ignored).
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from rlhf.data import columns, formats
from rlhf.data.checks import check
from rlhf.data.clips import Asked, ClipError, clip_of
from rlhf.data.files import LISTS, TABLES
from rlhf.data.formats import FOLDER, Block
from rlhf.data.media import PictureFile, clip_file, mask_range
from rlhf.data.records import BadInput, Field, Problem, Record, whole
from rlhf.runs.durable import durable
from rlhf.types import Cell, Clip, Example, Prompt, Sized, Source

FORMAT = 8
MEDIA = ("picture_0", "picture_1", "sources", "mask")
ROWS_AT_ONCE = 10_000
PICTURES = Asked(frames=1)
TIE = 0.5
"""`label_0` of a row that prefers neither picture."""
MEDIUM = pa.struct(
    [
        ("path", pa.string()),
        ("column", pa.string()),
        ("item", pa.int32()),
        ("content", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("clip", pa.struct([("first", pa.int32()), ("stride", pa.int32()), ("box", pa.list_(pa.int32()))])),
    ]
)
"""A picture: its file, or the column of its row's table and its number in a list there; the rest as in `PictureFile`."""
SCHEMA = pa.schema(
    [
        ("block", pa.int32()),
        ("row", pa.int32()),
        ("number", pa.int64()),
        ("caption", pa.string()),
        ("winner", pa.int8()),
        ("picture_0", MEDIUM),
        ("picture_1", MEDIUM),
        ("sources", pa.list_(MEDIUM)),
        ("mask", MEDIUM),
        ("image_id", pa.string()),
    ]
)


def blocks_of(file: Path) -> list[Block]:
    """The blocks of one file of pairs. Raises: BadInput for a file that is unreadable or lacks a column."""
    fields = columns.table_fields(file) if file.suffix in TABLES and file.is_file() else ()
    give = f"Pick-a-Pic's columns {', '.join(field.name for field in columns.TABLE if field.required)}, or target and prompt"
    blocks = formats.blocks_of(file, fields, otherwise=FOLDER, give=f"{give}, or the pairs/ folder of an online run")
    if blocks and blocks[0].format == ".csv":
        found = formats.FORMATS[".csv"].columns(file) or ()
        names = {columns.ALIASES.get(name, name) for name in found}
        if not any(needed <= names for needed in ({"prompt", "target"}, {"prompt", "winner"})):
            what = f"has the columns {', '.join(found)}"
            remedy = (
                "the first line must name, in small letters and separated by commas, prompt and target (or path_target), or "
                "prompt, winner and loser"
            )
            raise BadInput([whole(file, what, remedy)])
    return blocks


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

    def examples(self, rows: range, sized: Sized) -> Iterator[Example]:
        """The pairs of some rows, read some thousands at a time. Roles come in the order of the two pictures; one alone is a
        target. sized: of the prompts, by the winner.
        """
        for start in range(rows.start, rows.stop, ROWS_AT_ONCE):
            for row in self.table.slice(start, min(ROWS_AT_ONCE, rows.stop - start)).to_pylist():
                source = partial(_source, self.blocks[row["block"]], row["row"], row["number"])
                roles = ("winner", "loser") if row["winner"] == 0 else ("loser", "winner")
                sides = enumerate(roles if row["picture_1"] else ("target",))
                preferred = row[f"picture_{row['winner']}"]
                prompt = Prompt(
                    key=row["image_id"] or str(row["number"]),
                    instruction=row["caption"],
                    sources=tuple(map(source, row["sources"])),
                    geometry=sized(preferred["height"], preferred["width"]),
                )
                yield Example(
                    prompt=prompt,
                    targets={role: source(row[f"picture_{side}"]) for side, role in sides},
                    mask=source(row["mask"]) if row["mask"] else None,
                )

    def relabelled(self, winners: np.ndarray, keep: np.ndarray) -> "PairIndex":
        """The pairs where `keep` (bool) is true, with these winners (int8); both (pairs,)."""
        place = SCHEMA.get_field_index("winner")
        table = self.table.set_column(place, SCHEMA.field("winner"), pa.array(winners, pa.int8())).filter(
            pa.array(keep)
        )
        sizes = np.bincount(table["block"].to_numpy(), minlength=len(self.blocks))
        return replace(self, table=table, sizes=tuple(sizes.tolist()))

    def digest(self) -> str:
        """Of what training sees: pictures, captions, masks and winners, in order, and the blocks that the order is made of."""
        digest = xxhash.xxh3_128(repr(list(self.sizes)).encode())
        for values in (*map(self.contents, MEDIA), self.table["caption"], self.table["winner"]):
            digest.update("\x1f".join(map(str, values.to_pylist())).encode())
        return digest.hexdigest()

    def contents(self, column: str) -> pa.ChunkedArray:
        """The contents of the pictures in one of MEDIA, of videos with their clips: of a row one or None, in "sources" a list."""
        whole = self.table[column].combine_chunks()
        if column != "sources":
            contents, clips = (pc.struct_field(whole, name) for name in ("content", "clip"))
            if clips.null_count == len(clips):
                return contents
            both = zip(contents.to_pylist(), clips.to_pylist(), strict=True)
            return pa.array([f"{content} {clip}" if clip else content for content, clip in both], pa.string())
        return pa.ListArray.from_arrays(whole.offsets, pc.struct_field(whole.values, "content"))

    def report(self) -> str:
        """What is in it and what was left out, a line per problem."""
        count, others = len(self.table), f"; without a preference: {self.ties} ties, {self.unlabelled} unlabelled"
        lines = [f"{count} examples in {len(self.blocks)} blocks{others if self.ties or self.unlabelled else ''}"]
        if again := self._repeated():
            lines.append(f"{again} examples repeat an earlier one with its caption, or turn it round")
        if self.problems:
            lines.append(f"left out: {len(self.problems)} problems; going on with {count} examples")
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])

    def _repeated(self) -> int:
        """Pairs of the same two pictures and caption as one before, whichever won."""
        found = (*map(self.contents, ("picture_0", "picture_1")), self.table["caption"])
        rows = zip(*(column.to_pylist() for column in found), strict=True)
        pairs = [(*sorted((first, second or "")), caption) for first, second, caption in rows]
        return len(pairs) - len(set(pairs))


def _source(block: Block, row: int, number: int, medium: Mapping[str, Any]) -> Source:
    seen = {name: medium[name] for name in ("content", "height", "width")}
    if clip := medium["clip"]:
        seen["clip"] = Clip(**clip | {"box": clip["box"] and tuple(clip["box"])})
    if medium["path"]:
        return Source(path=medium["path"], **seen)
    cell = Cell(part=block.part, row=row, column=medium["column"], number=number, item=medium["item"])
    return Source(path=block.file, cell=cell, **seen)


# --- checking ----------------------------------------------------------------------------------------------------------


def check_block(
    block: Block,
    *,
    source_counts: range,
    items: Collection[str] | None,
    needs_loser: bool = True,
    root: Path | None = None,
    asked: Asked = PICTURES,
) -> PairIndex:
    """The index of one block, every picture of which is decoded. source_counts: how many sources a row may have, see `Family`;
    `items`, where given, must hold every image_id; root: what paths start from, unless it is the folder of their file; asked: of
    examples that are videos.
    """
    is_table, is_targets = block.format in TABLES, columns.is_target_table(Path(block.file))
    root = Path(block.file) if block.format == FOLDER else root
    if asked.frames > 1 and block.format not in LISTS:
        what = f"is no list of videos, but model.frames = {asked.frames}"
        problem = whole(block.file, what, "give a JSONL or CSV of target (or winner, loser), prompt, source")
        return PairIndex(blocks=(block,), sizes=(0,), table=SCHEMA.empty_table(), problems=(problem,))
    fields, target_fields = columns.fields_of(block.format, source_counts, needs_loser, items, asked)
    rows, problems, ties, unlabelled = list[dict[str, Any]](), list[Problem](), 0, 0
    records: Sequence[Record | Problem]
    try:
        records = formats.read_block(block, columns.table_fields(Path(block.file)) if is_table else columns.LINE)
    except BadInput as error:
        records = error.problems
    for place, given in enumerate(records):
        record = columns.renamed(given) if isinstance(given, Record) else given
        if not isinstance(given, Record) or not isinstance(record, Record):
            problems.append(cast(Problem, record))
        elif is_table and record.fields.get("has_label") is False:
            unlabelled += 1
        elif is_table and record.fields.get("label_0") in (TIE, str(TIE)):
            ties += 1
        else:
            theirs = {columns.ALIASES.get(name, name): name for name in given.fields}
            wanted = target_fields if is_targets or "target" in record.fields else fields
            row, faults = _row(record, wanted, root, theirs, asked)
            problems += faults
            rows += [] if faults else [{"block": 0, "row": place, **row}]
    table, found = pa.Table.from_pylist(rows, schema=SCHEMA), tuple(problems)
    return PairIndex(blocks=(block,), sizes=(len(rows),), table=table, problems=found, ties=ties, unlabelled=unlabelled)


def _row(
    record: Record, fields: Sequence[Field], root: Path | None, theirs: Mapping[str, str], asked: Asked
) -> tuple[dict[str, Any], list[Problem]]:
    """A record as a row of the index, but for its place; and what is wrong with it, where the row is no good.

    theirs: the columns of its table, by our names.
    """
    values, faults = check(record, fields, root)
    if asked.frames > 1:
        faults += _open_clips(record, values, root or Path(record.file).parent, asked)
    label, mask, sources = values.get("label_0", 1.0), values.pop("mask", None), values.get("source", ())
    named = {name: value for name, value in values.items() if isinstance(value, PictureFile)}
    pictures = list(named.values())
    if label not in (0, 1):
        faults.append(record.problem("label_0", f"is {label:g}", columns.LABEL))
    if len(pictures) == 2 and pictures[0].content == pictures[1].content:
        faults.append(record.problem(None, "both pictures are the same", "leave the row out: it prefers neither"))
    if not faults and mask:
        data = record.fields["mask"] if mask.path is None else Path(mask.path).read_bytes()
        faults += [record.problem("mask", *fault) for fault in _mask_faults(mask, data, pictures)]
    if "target" in values and {"winner", "loser"} & record.fields.keys():
        faults.append(record.problem("target", "stands beside winner or loser", "give a target, or a pair"))
    if faults:
        return {}, faults
    row = {
        "number": record.number,
        "image_id": values.get("image_id"),
        "caption": values["caption" if "caption" in values else "prompt"],
        "winner": 0 if label == 1 else 1,
        "sources": [_medium(source, theirs.get("source", ""), item) for item, source in enumerate(sources)],
        "mask": mask and _medium(mask, theirs.get("mask", "")),
    }
    for side, (name, picture) in enumerate(named.items()):
        row[f"picture_{side}"] = _medium(picture, theirs.get(name, ""))
    return row, []


def _open_clips(record: Record, values: dict[str, Any], root: Path, asked: Asked) -> Iterator[Problem]:
    """Put the files of a row's videos in the place of their paths; yields what is wrong with them."""
    try:
        clip = clip_of(record.fields.get("clip"), asked)
    except ClipError as error:
        what, _, remedy = str(error).partition("; ")
        yield record.problem("clip", what, remedy)
        return
    for name in [name for name in columns.PREFERRED if name in values]:
        found = clip_file(values.pop(name), root, clip, asked.frames)
        if isinstance(found, tuple):
            yield record.problem(name, *found)
        else:
            values[name] = found


def _medium(picture: PictureFile, column: str, item: int | None = None) -> dict[str, Any]:
    return asdict(picture) if picture.path else asdict(picture) | {"column": column, "item": item}


def _mask_faults(mask: PictureFile, data: bytes, pictures: Sequence[PictureFile]) -> Iterator[tuple[str, str]]:
    """What is wrong with a mask, and the remedy. data: its file."""
    for picture in pictures:
        if _size(mask) != _size(picture):
            mine, its = (f"{one.height} × {one.width}" for one in (mask, picture))
            yield (
                f"is {mine} pixels, but the picture {its}",
                "give a mask of the picture's size, upright as that is shown",
            )
            return
    if (brightest := mask_range(data)) is None:
        yield "is transparent somewhere", "save it as grey without transparency, white where errors count more"
    elif brightest[0] == brightest[1]:
        yield (
            f"is {brightest[0]} of 255 everywhere, which masks nothing",
            "make it white where errors count more, else black",
        )
    elif brightest[1] < 128:
        what = f"is nowhere brighter than {brightest[1]} of 255"
        yield what, "make it white, which is 255, where errors count more"


def _size(picture: PictureFile) -> tuple[int, int]:
    return picture.height, picture.width


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
