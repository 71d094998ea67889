"""Files of rows: JSONL, CSV, Parquet, Arrow (the stream that `datasets` writes) and .txt with one text a line.

A file is cut into blocks: a Parquet row group, an Arrow record batch, 64 lines of JSONL or text, 64 rows of CSV. Every block
can be read alone, by any process that sees the file, so that nobody holds a data set. Rows come out as they are in the file;
what they must hold, `rlhf.data.records` says.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_BLOCK = 64
"""Of text files. The order of training depends on the sizes of blocks."""
_BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = "save the file as UTF-8"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of one file that are read together."""

    file: str
    format: str
    """A key of `FORMATS`."""
    part: int
    """Row group, record batch, or chunk of rows."""
    first: int
    """Number of its first row (line) in the file, from 1."""
    count: int
    """Rows; of JSONL and text lines, of CSV rows, blank ones included."""
    offset: int = 0
    """Text files: where its first line begins, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a row cannot be read, and what to do about it."""

    what: str
    remedy: str


class UnreadableFile(Exception):
    """The file as a whole cannot be read; `fault` says why."""

    def __init__(self, what: str, remedy: str):
        super().__init__(what)
        self.fault = Fault(what=what, remedy=remedy)


Rows = Iterator[tuple[int, Mapping[str, Any] | Fault]]
"""(number of the row or line in its file, from 1; its fields or what is wrong with it)."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of file is read. All may raise OSError, pyarrow's exceptions and UnreadableFile."""

    noun: str
    columns: Callable[[Path], Sequence[str] | None]
    """The fields that all rows have; None where each row names its own."""
    blocks: Callable[[Path], list[Block]]
    rows: Callable[[Block, Collection[str], str], Rows]
    """Rows of a block, of which only the named fields (all if none is named), and an example row for remedies in JSON."""
    add_rows: str
    """What to do about a file without rows."""


# --- Parquet and Arrow -------------------------------------------------------------------------------------------------


def _parquet_columns(file: Path) -> list[str]:
    return _plain_columns(pq.read_schema(file))


def _parquet_blocks(file: Path) -> list[Block]:
    with pq.ParquetFile(file) as table:
        return _table_blocks(
            file, ".parquet", [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        )


def _parquet_rows(block: Block, names: Collection[str], example: str) -> Rows:
    with pq.ParquetFile(block.file) as table:
        columns = [name for name in table.schema_arrow.names if not names or name in names]
        return _table_rows(block, table.read_row_group(block.part, columns=columns))


def _arrow_batches(file: Path) -> list[pa.RecordBatch]:
    """Their buffers stay in the mapped file."""
    return list(pa.ipc.open_stream(pa.memory_map(str(file))))


def _arrow_columns(file: Path) -> list[str]:
    with pa.memory_map(str(file)) as source:
        return _plain_columns(pa.ipc.open_stream(source).schema)


def _arrow_blocks(file: Path) -> list[Block]:
    return _table_blocks(file, ".arrow", [batch.num_rows for batch in _arrow_batches(file)])


def _arrow_rows(block: Block, names: Collection[str], example: str) -> Rows:
    batch = _arrow_batches(Path(block.file))[block.part]
    columns = [name for name in batch.schema.names if not names or name in names]
    return _table_rows(block, pa.Table.from_batches([batch]).select(columns))


def _plain_columns(schema: pa.Schema) -> list[str]:
    for field in schema:
        if isinstance(field.type, pa.BaseExtensionType):
            raise UnreadableFile(f"column {field.name} has the extension type {field.type}", "use plain types")
    return schema.names


def _table_blocks(file: Path, name: str, counts: list[int]) -> list[Block]:
    return [
        Block(file=str(file), format=name, part=part, first=first, count=count)
        for part, (first, count) in enumerate(zip(accumulate(counts, initial=1), counts, strict=False))
        if count
    ]


def _table_rows(block: Block, table: pa.Table) -> Rows:
    for number, row in enumerate(table.to_pylist(), block.first):
        values = {name: _plain(value) for name, value in row.items()}
        yield number, {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """A picture that `datasets` wrote as its Image feature, {bytes, path}: the bytes or, without any, the path."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


# --- CSV ---------------------------------------------------------------------------------------------------------------


def _csv_rows(file: Path, offset: int = 0, line: int = 0) -> Iterator[tuple[int, int, list[str]]]:
    """(number of its last line, where the next row begins in bytes, its values) of every row from `offset` on.

    `line` lines come before `offset`. A blank row has no values.
    """
    position = offset

    def lines() -> Iterator[str]:
        nonlocal position
        for raw in stream:
            for part in raw.splitlines(keepends=True):
                text = part.removeprefix(_BOM) if position == 0 else part
                position += len(part)
                yield text.decode()

    with file.open("rb") as stream:
        stream.seek(offset)
        reader = csv.reader(lines(), strict=True)
        try:
            for values in reader:
                yield line + reader.line_num, position, values
        except UnicodeDecodeError as error:
            number = line + reader.line_num + 1
            raise UnreadableFile(f"line {number} is not UTF-8 ({error.reason})", _NOT_UTF8) from error
        except csv.Error as error:
            raise UnreadableFile(f"line {line + reader.line_num} is no CSV: {error}", "mend its quotes") from error


def _csv_columns(file: Path) -> list[str]:
    _, _, names = next(_csv_rows(file), (0, 0, []))
    return [name.strip() for name in names]


def _csv_blocks(file: Path) -> list[Block]:
    rows = _csv_rows(file)
    number, position, _ = next(rows, (0, 0, []))
    starts, counts = [(number + 1, position)], [0]
    for number, position, _ in rows:
        counts[-1] += 1
        if counts[-1] == ROWS_PER_BLOCK:
            starts.append((number + 1, position))
            counts.append(0)
    return [
        Block(file=str(file), format=".csv", part=part, first=first, count=count, offset=offset)
        for part, ((first, offset), count) in enumerate(zip(starts, counts, strict=True))
        if count
    ]


def _csv_block(block: Block, names: Collection[str], example: str) -> Rows:
    header = _csv_columns(Path(block.file))
    rows = _csv_rows(Path(block.file), block.offset, block.first - 1)
    for number, _, values in islice(rows, block.count):
        if values and len(values) != len(header):
            what = f"has {len(values)} fields, the header {len(header)}"
            yield number, Fault(what=what, remedy="add the missing; quote fields that hold commas")
        elif values:
            yield number, _chosen(dict(zip(header, values, strict=True)), names)


# --- JSONL and text ----------------------------------------------------------------------------------------------------


def _line_blocks(file: Path, name: str) -> list[Block]:
    starts: list[int] = []
    count = position = 0
    with file.open("rb") as lines:
        for line in lines:
            if count % ROWS_PER_BLOCK == 0:
                starts.append(position)
            count, position = count + 1, position + len(line)
    return [
        Block(
            file=str(file),
            format=name,
            part=part,
            first=1 + part * ROWS_PER_BLOCK,
            count=min(ROWS_PER_BLOCK, count - part * ROWS_PER_BLOCK),
            offset=start,
        )
        for part, start in enumerate(starts)
    ]


def _lines(block: Block) -> Iterator[tuple[int, str | Fault]]:
    """Lines that are not blank, each with its number."""
    with open(block.file, "rb") as stream:
        stream.seek(block.offset)
        lines = [stream.readline() for _ in range(block.count)]
    if block.first == 1:
        lines[0] = lines[0].removeprefix(_BOM)
    for number, raw in enumerate(lines, block.first):
        try:
            if raw.strip():
                yield number, raw.decode()
        except UnicodeDecodeError as error:
            yield number, Fault(what=f"is not UTF-8 ({error.reason})", remedy=_NOT_UTF8)


def _jsonl_rows(block: Block, names: Collection[str], example: str) -> Rows:
    remedy = f"write one JSON object per line{f', like {example}' if example else ''}"
    for number, line in _lines(block):
        if isinstance(line, Fault):
            yield number, line
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, Fault(what=f"is not JSON: {error}", remedy=remedy)
            continue
        if isinstance(row, dict):
            yield number, _chosen(row, names)
        else:
            yield number, Fault(what=f"is {type_name(row)}, not an object", remedy=remedy)


def _text_rows(block: Block, names: Collection[str], example: str) -> Rows:
    for number, line in _lines(block):
        yield number, line if isinstance(line, Fault) else {"text": line.strip()}


def _chosen(row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not names or name in names}


def type_name(value: object) -> str:
    """A value's type in the words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


FORMATS = {
    ".jsonl": Format(
        noun="JSONL",
        columns=lambda file: None,
        blocks=lambda file: _line_blocks(file, ".jsonl"),
        rows=_jsonl_rows,
        add_rows="add one JSON object per line",
    ),
    ".csv": Format(
        noun="CSV",
        columns=_csv_columns,
        blocks=_csv_blocks,
        rows=_csv_block,
        add_rows="add one row per line below the names of the columns",
    ),
    ".parquet": Format(
        noun="Parquet file",
        columns=_parquet_columns,
        blocks=_parquet_blocks,
        rows=_parquet_rows,
        add_rows="give a table with rows",
    ),
    ".arrow": Format(
        noun="Arrow stream",
        columns=_arrow_columns,
        blocks=_arrow_blocks,
        rows=_arrow_rows,
        add_rows="give a table with rows",
    ),
    ".txt": Format(
        noun="text",
        columns=lambda file: ("text",),
        blocks=lambda file: _line_blocks(file, ".txt"),
        rows=_text_rows,
        add_rows="write one text per line",
    ),
}
"""By the ending of a file's name."""
