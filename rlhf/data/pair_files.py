"""Files of preference pairs: Parquet and Arrow in Pick-a-Pic's columns, or a JSONL of winner, loser, prompt[, source].

A file is read by blocks (a Parquet row group, an Arrow record batch, some lines), so that nobody ever holds a data set, and
every block can be read anywhere. A row comes out as it is in the file: what is wrong with it, `rlhf.data.examples` says.
Left out: fetching pictures by URL, columns that are not listed here (they are ignored).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.data.records import BadInput, Problem

COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
"""Pick-a-Pic v2: two picture files as bytes, 1 where the first is preferred (0 the second, 0.5 neither), the prompt."""
OPTIONAL = ("has_label",)
"""False where nobody chose."""
LINES_PER_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of one file that are read together."""

    file: str
    part: int
    """Row group, record batch, or chunk of lines."""
    first: int
    """Number of its first row (line) in the file, from 1."""
    count: int
    offset: int = 0
    """JSONL: where its first line begins, in bytes."""


@dataclass(frozen=True, kw_only=True)
class RawPair:
    """A row as it is in its file."""

    number: int
    """Of the row in its file, from 1."""
    fields: Mapping[str, Any]
    """caption, label_0, has_label, image_id: whatever the row has of them."""
    pictures: tuple[bytes | None, bytes | None]
    """The bytes of two picture files; None where the row has none."""
    paths: Mapping[str, str]
    """JSONL: winner, loser and source as written."""


def find_files(path: Path, split: str, key: str = "data.path") -> list[Path]:
    """The pair files of a file or folder, sorted. In a folder whose files name splits, those of `split`.

    Raises: BadInput.
    """
    remedy = f"set {key} to a .parquet, .arrow or .jsonl file, or to a folder of .parquet or .arrow files"
    if path.is_file():
        if path.suffix not in READERS:
            raise BadInput([_whole(path, f"is a {path.suffix or 'nameless'} file, no table of pairs", remedy)])
        return [path]
    if not path.is_dir():
        raise BadInput([_whole(path, "no such file or folder", remedy)])
    files = sorted(file for suffix in (".parquet", ".arrow") for file in path.rglob(f"*{suffix}"))
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise BadInput([_whole(path, "holds no .parquet or .arrow file", remedy)])
    named = {file: _split_of(file.relative_to(path)) for file in files}
    splits = sorted({name for name in named.values() if name})
    if not splits:
        return files
    chosen = [file for file, name in named.items() if name == split]
    setting = key.replace("path", "split")
    if not chosen:
        what = f"has the splits {', '.join(splits)}, but {setting} = {split!r}"
        raise BadInput([_whole(path, what, f"set {setting} to one of them")])
    if unnamed := [file for file, name in named.items() if name is None]:
        what = f"lies beside files of the splits {', '.join(splits)}, but its name says none"
        raise BadInput([_whole(file, what, f"move it away, or name it {split}-1.parquet") for file in unnamed])
    return chosen


SPLIT_NAME = re.compile(r"((?:train|validation|valid|val|dev|test)(?:_[a-z]+)*)[-_.]?\d*")


def _split_of(file: Path) -> str | None:
    """`train` of data/train-00000-of-00012.parquet, with or without a hash behind it, train.parquet or train_1.parquet (as the

    hub reads them), default/train/0000.parquet (as it converts them), train/data-00000-of-00001.arrow (`save_to_disk`);
    None: no split.
    """
    numbered = re.fullmatch(r"(.+)-\d+-of-\d+(?:-[0-9a-f]+)?", file.stem)
    if numbered and numbered[1] != "data":
        return numbered[1]
    for name in (file.stem, *(folder.name for folder in file.parents)):
        if found := SPLIT_NAME.fullmatch(name):
            return found[1]
    return file.parent.name if numbered and file.parent.name else None


def blocks_of(file: Path) -> list[Block]:
    """The blocks of one file, in order. Raises: BadInput for a file that is unreadable or lacks a column."""
    return READERS[file.suffix].blocks(file)


def read_block(block: Block) -> list[RawPair]:
    """Every row of a block, in order, pictures of Parquet and Arrow files included."""
    return READERS[Path(block.file).suffix].read(block)


# --- Parquet and Arrow -------------------------------------------------------------------------------------------------


def _parquet_blocks(file: Path) -> list[Block]:
    try:
        table = pq.ParquetFile(file)
        _check_columns(file, table.schema_arrow)
        counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise BadInput([_whole(file, f"is no Parquet file: {error}", "replace it")]) from error
    return _blocks(file, counts)


def _parquet_rows(block: Block) -> list[RawPair]:
    table = pq.ParquetFile(block.file)
    names = [name for name in (*COLUMNS, *OPTIONAL) if name in table.schema_arrow.names]
    return _rows(block, table.read_row_group(block.part, columns=names))


def _arrow_reader(file: Path) -> list[pa.RecordBatch]:
    """Record batches of a file of `datasets`, which writes Arrow's stream format. Their buffers stay in the mapped file."""
    return list(pa.ipc.open_stream(pa.memory_map(str(file))))


def _arrow_blocks(file: Path) -> list[Block]:
    try:
        batches = _arrow_reader(file)
        with pa.memory_map(str(file)) as source:
            _check_columns(file, pa.ipc.open_stream(source).schema)
    except (pa.ArrowException, OSError) as error:
        raise BadInput([_whole(file, f"is no Arrow stream: {error}", "replace it")]) from error
    return _blocks(file, [batch.num_rows for batch in batches])


def _arrow_rows(block: Block) -> list[RawPair]:
    batch = _arrow_reader(Path(block.file))[block.part]
    return _rows(block, pa.table(batch).select([n for n in (*COLUMNS, *OPTIONAL) if n in batch.schema.names]))


def _check_columns(file: Path, schema: pa.Schema) -> None:
    absent = [name for name in COLUMNS if name not in schema.names]
    if absent:
        remedy = f"give Pick-a-Pic's columns {', '.join(COLUMNS)}, or the pairs/ folder of an online run"
        raise BadInput([_whole(file, f"has no column {', '.join(absent)}; it has {', '.join(schema.names)}", remedy)])
    for field in schema:
        if isinstance(field.type, pa.BaseExtensionType):
            raise BadInput(
                [_whole(file, f"column {field.name} has the extension type {field.type}", "use plain types")]
            )


def _blocks(file: Path, counts: list[int]) -> list[Block]:
    return [
        Block(file=str(file), part=part, first=first, count=count)
        for part, (first, count) in enumerate(zip(accumulate(counts, initial=1), counts, strict=False))
        if count
    ]


def _rows(block: Block, table: pa.Table) -> list[RawPair]:
    rows = table.to_pylist()
    return [
        RawPair(
            number=block.first + i,
            fields={name: row[name] for name in ("caption", "label_0", "has_label") if name in row},
            pictures=(_bytes(row["jpg_0"]), _bytes(row["jpg_1"])),
            paths={},
        )
        for i, row in enumerate(rows)
    ]


def _bytes(value: Any) -> bytes | None:
    """A picture column holds bytes or, as `datasets` writes its Image feature, {bytes, path}."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


# --- JSONL -------------------------------------------------------------------------------------------------------------


def _jsonl_blocks(file: Path) -> list[Block]:
    starts: list[int] = []
    count = position = 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                if count % LINES_PER_BLOCK == 0:
                    starts.append(position)
                count, position = count + 1, position + len(line)
    except OSError as error:
        raise BadInput([_whole(file, f"cannot be read: {error.strerror}", "give a readable file")]) from error
    return [
        Block(
            file=str(file),
            part=part,
            first=1 + part * LINES_PER_BLOCK,
            count=min(LINES_PER_BLOCK, count - part * LINES_PER_BLOCK),
            offset=start,
        )
        for part, start in enumerate(starts)
    ]


def _jsonl_rows(block: Block) -> list[RawPair]:
    """Rows of non-empty lines. A line that is no JSON object has the field `broken`, which says what it is."""
    with open(block.file, "rb") as stream:
        stream.seek(block.offset)
        lines = [stream.readline() for _ in range(block.count)]
    if block.first == 1:
        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    return [_jsonl_row(number, raw) for number, raw in enumerate(lines, block.first) if raw.strip()]


def _jsonl_row(number: int, raw: bytes) -> RawPair:
    try:
        row = json.loads(raw.decode())
        broken = None if isinstance(row, dict) else f"is {type(row).__name__}, not an object"
    except UnicodeDecodeError as error:
        broken = f"is not UTF-8 ({error.reason})"
    except (ValueError, RecursionError) as error:
        broken = f"is not JSON: {error}"
    if broken:
        return RawPair(number=number, fields={"broken": broken}, pictures=(None, None), paths={})
    fields = {"caption": row.get("prompt"), "label_0": 1.0} | {k: row[k] for k in ("image_id",) if k in row}
    paths = {name: row[name] for name in ("winner", "loser", "source") if name in row}
    return RawPair(number=number, fields=fields, pictures=(None, None), paths=paths)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How files of one suffix are read."""

    blocks: Callable[[Path], list[Block]]
    read: Callable[[Block], list[RawPair]]


READERS = {
    ".parquet": Reader(blocks=_parquet_blocks, read=_parquet_rows),
    ".arrow": Reader(blocks=_arrow_blocks, read=_arrow_rows),
    ".jsonl": Reader(blocks=_jsonl_blocks, read=_jsonl_rows),
}
"""By suffix."""


def _whole(file: Path, what: str, remedy: str) -> Problem:
    return Problem(file=str(file), line=None, field=None, what=what, remedy=remedy)
