"""The one reader of input rows: JSONL, CSV, Parquet, Arrow (the stream that `datasets` writes), .txt with one text a line, and
folders of pictures (`layouts`).

A file is cut into blocks: a Parquet row group, an Arrow record batch, 64 lines of JSONL or text, 64 rows of CSV, 64 stems of a
folder. Every block can be read alone, by any process that sees the file, so that nobody holds a data set. Rows come out as they
are in the file.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.data import layouts
from rlhf.data.records import BadInput, Field, Problem, Record, whole
from rlhf.shards.files import is_pointer

FOLDER = "folder"
ROWS_PER_BLOCK = 64
"""Of text files and folders. The order of training depends on the sizes of blocks."""
_BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = "save the file as UTF-8"
_SEPARATORS = {";": "semicolons", "\t": "tabs", "sep=": 'a line "sep="'}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of one file that are read together."""

    file: str
    """Or the folder."""
    format: str
    """A key of `FORMATS`."""
    part: int
    """Row group, record batch, or chunk of rows."""
    first: int
    """Number of its first row (line, stem) in the file, from 1."""
    count: int
    """Rows of a table or CSV, lines of JSONL or text, stems of a folder; blank ones are counted."""
    offset: int = 0
    """Text files: where its first line begins, in bytes."""

    def problem(self, number: int, what: str, remedy: str) -> Problem:
        return Problem(file=self.file, line=number, field=None, what=what, remedy=remedy)


Rows = Iterator[Record | Problem]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of file is read. All may raise OSError, pyarrow's exceptions and BadInput."""

    noun: str
    columns: Callable[[Path], Sequence[str] | None]
    """The fields that all rows have; None where each row names its own."""
    blocks: Callable[[Path], list[Block]]
    rows: Callable[[Block, Sequence[Field]], Rows]
    """Rows of a block; of a table only these columns are read (all, if none is given), blank rows are left out."""
    add_rows: str
    """What to do about a file without rows."""


def blocks_of(
    file: Path, fields: Sequence[Field] = (), *, key: str = "", otherwise: str = "", give: str = ""
) -> list[Block]:
    """The blocks of a file, in order.

    `key`: the configuration key that names the file, for remedies. `otherwise`: the format of a file whose name has an ending
    that is not in FORMATS; by default it is refused. `give`: what to give in place of a table without the right columns.
    Raises: BadInput for a file that cannot be read as a whole or lacks the column of a required field.
    """
    name = format_of(file, otherwise)
    kind = FORMATS[name]
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise BadInput([whole(file, "is no file but a pipe or device", "give a file")])
        if file.is_file() and is_pointer(file):
            raise BadInput(
                [whole(file, "is a Git LFS pointer, not the file itself", f"run `git lfs pull` in {file.parent}")]
            )
        columns = kind.columns(file)
        absent = [field.name for field in fields if field.required and field.name not in (columns or ())]
        if columns is None or not absent:
            return kind.blocks(file)
        problem = whole(file, f"has no column {', '.join(absent)}", _columns_remedy(name, columns, fields, give))
    except FileNotFoundError:
        problem = whole(file, "no such file", f"set {key} to an existing file" if key else "give a file that exists")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            remedy = f"set {key} to a readable file" if key else "give a readable file"
            problem = whole(file, f"cannot be read: {error.strerror}", remedy)
        else:
            problem = whole(file, f"is no {kind.noun}: {_line(error)}", "replace it")
    raise BadInput([problem])


def format_of(file: Path, otherwise: str = "") -> str:
    """A key of FORMATS. Raises: BadInput for a file with another ending, if there is no `otherwise`."""
    if file.suffix in FORMATS and not (otherwise == FOLDER and file.is_dir()):
        return file.suffix
    if not otherwise:
        endings = ", ".join(name for name in FORMATS if name != FOLDER)
        raise BadInput([whole(file, f"is a {file.suffix or 'nameless'} file", f"give one of {endings}")])
    return otherwise


def _columns_remedy(name: str, columns: Sequence[str], fields: Sequence[Field], give: str) -> str:
    wanted = [field.name for field in fields if field.required]
    if name == ".csv":
        by = next(
            (f" and not by {say}" for mark, say in _SEPARATORS.items() if any(mark in name for name in columns)), ""
        )
        return f"the first line must name {','.join(wanted)}, separated by commas{by}"
    if name == ".txt":
        return "a .txt file holds a text a line; end the name with what the file is, .csv or .jsonl"
    return f"it has {', '.join(columns)}; give {give or 'the columns ' + ', '.join(wanted)}"


def read_block(block: Block, fields: Sequence[Field] = ()) -> list[Record | Problem]:
    """The rows of a block, in order, or what is wrong with them; blank lines are left out.

    `fields`: those to read of a table; all, if none is given. Null in a table is a field that the row lacks.
    Raises: BadInput for a block that cannot be read as a whole.
    """
    try:
        return list(FORMATS[block.format].rows(block, fields))
    except (pa.ArrowException, OSError) as error:
        what = f"rows {block.first} to {block.first + block.count - 1} cannot be read: {_line(error)}"
        raise BadInput([block.problem(block.first, what, "replace it")]) from error


def _line(error: Exception) -> str:
    """What pyarrow says, on one line: a problem has one."""
    return " ".join(str(error).split())


# --- Parquet and Arrow -------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    schema: pa.Schema
    counts: Callable[[], list[int]]
    """Rows of each part."""
    read: Callable[[int, list[str]], pa.Table]
    """Some columns of a part."""


_Open = Callable[[str | Path], AbstractContextManager[_Table]]


@contextmanager
def _parquet(file: str | Path) -> Iterator[_Table]:
    with pq.ParquetFile(file) as table:
        yield _Table(
            schema=table.schema_arrow,
            counts=lambda: [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)],
            read=lambda part, columns: table.read_row_group(part, columns=columns),
        )


@contextmanager
def _arrow(file: str | Path) -> Iterator[_Table]:
    stream = pa.ipc.open_stream(pa.memory_map(str(file)))  # record batches stay in the mapped file
    yield _Table(
        schema=stream.schema,
        counts=lambda: [batch.num_rows for batch in stream],
        read=lambda part, columns: pa.Table.from_batches([list(stream)[part]]).select(columns),
    )


def _table_columns(opened: _Open, file: Path) -> list[str]:
    with opened(file) as table:
        for field in table.schema:
            if isinstance(field.type, pa.BaseExtensionType):
                what = f"column {field.name} has the extension type {field.type}"
                raise BadInput([whole(file, what, "use plain types")])
        return _named_once(file, table.schema.names)


def _named_once(file: Path, names: list[str]) -> list[str]:
    """The names of columns. Raises: BadInput for a name that two of them have: which is meant would be a guess."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise BadInput(
            [whole(file, f"names a column twice: {', '.join(twice)}", "give every column a name of its own")]
        )
    return names


def _table_blocks(opened: _Open, name: str, file: Path) -> list[Block]:
    with opened(file) as table:
        counts = table.counts()
    return [
        Block(file=str(file), format=name, part=part, first=first, count=count)
        for part, (first, count) in enumerate(zip(accumulate(counts, initial=1), counts, strict=False))
        if count
    ]


def _table_rows(opened: _Open, block: Block, fields: Sequence[Field]) -> Rows:
    wanted = {field.name for field in fields}
    with opened(block.file) as table:
        rows = table.read(block.part, [name for name in table.schema.names if not wanted or name in wanted])
    for number, row in enumerate(rows.to_pylist(), block.first):
        values = {name: _plain(value) for name, value in row.items()}
        given = {name: value for name, value in values.items() if value is not None}
        yield Record(file=block.file, number=number, fields=given)


def _plain(value: Any) -> Any:
    """A picture that `datasets` wrote as its Image feature, {bytes, path}: the bytes or, without any, the path. Lists of them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


# --- folders -----------------------------------------------------------------------------------------------------------


def _folder_blocks(folder: Path) -> list[Block]:
    count = layouts.count(folder)
    return [
        Block(file=str(folder), format=FOLDER, part=part, first=start + 1, count=min(ROWS_PER_BLOCK, count - start))
        for part, start in enumerate(range(0, count, ROWS_PER_BLOCK))
    ]


def _folder_rows(block: Block, fields: Sequence[Field]) -> Rows:
    return layouts.rows(Path(block.file), block.first, block.first + block.count - 1)


# --- text files --------------------------------------------------------------------------------------------------------


def _text_blocks(name: str, starts: Callable[[Path], Iterable[tuple[int, int]]], file: Path) -> list[Block]:
    """`starts` gives of every row, blank ones included, its number and where it begins, in bytes."""
    rows, blocks = iter(starts(file)), list[Block]()
    while some := list(islice(rows, ROWS_PER_BLOCK)):
        first, offset = some[0]
        blocks.append(Block(file=str(file), format=name, part=len(blocks), first=first, count=len(some), offset=offset))
    return blocks


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
            what = f"line {line + reader.line_num + 1} is not UTF-8 ({error.reason})"
            raise BadInput([whole(file, what, _NOT_UTF8)]) from error
        except csv.Error as error:
            what = f"line {line + reader.line_num} is no CSV: {error}"
            raise BadInput([whole(file, what, "mend its quotes")]) from error


def _csv_columns(file: Path) -> list[str]:
    _, _, names = next(_csv_rows(file), (0, 0, []))
    return _named_once(file, [name.strip() for name in names])


def _csv_starts(file: Path) -> Iterator[tuple[int, int]]:
    rows = _csv_rows(file)
    number, position, _ = next(rows, (0, 0, []))
    for last, end, _ in rows:
        yield number + 1, position
        number, position = last, end


def _csv_block(block: Block, fields: Sequence[Field]) -> Rows:
    header = _csv_columns(Path(block.file))
    rows = _csv_rows(Path(block.file), block.offset, block.first - 1)
    for number, _, values in islice(rows, block.count):
        if values and len(values) != len(header):
            what = f"has {len(values)} fields, the header {len(header)}"
            yield block.problem(number, what, "add the missing; quote fields that hold commas")
        elif values:
            yield Record(file=block.file, number=number, fields=dict(zip(header, values, strict=True)))


def _line_starts(file: Path) -> Iterator[tuple[int, int]]:
    position = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, position
            position += len(line)


def _line_rows(parse: Callable[[str], Any], block: Block, fields: Sequence[Field]) -> Rows:
    """Rows of lines, one each; `parse` makes an object of a line."""
    example = ", ".join(f'"{field.name}": {field.example}' for field in fields if field.required)
    remedy = f"write one JSON object per line{f', like {{{example}}}' if example else ''}"
    with open(block.file, "rb") as stream:
        stream.seek(block.offset)
        lines = [stream.readline() for _ in range(block.count)]
    if block.first == 1:
        lines[0] = lines[0].removeprefix(_BOM)
    for number, line in enumerate(lines, block.first):
        if not line.strip():
            continue
        try:
            row = parse(line.decode())
        except UnicodeDecodeError as error:
            yield block.problem(number, f"is not UTF-8 ({error.reason})", _NOT_UTF8)
        except (ValueError, RecursionError) as error:
            yield block.problem(number, f"is not JSON: {error}", remedy)
        else:
            if isinstance(row, dict):
                yield Record(file=block.file, number=number, fields=row)
            else:
                yield block.problem(number, f"is {type_name(row)}, not an object", remedy)


def type_name(value: object) -> str:
    """A value's type in the words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises: ValueError for a key that it has twice, of which `json` would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _table_format(name: str, noun: str, opened: _Open) -> Format:
    return Format(
        noun=noun,
        columns=partial(_table_columns, opened),
        blocks=partial(_table_blocks, opened, name),
        rows=partial(_table_rows, opened),
        add_rows="give a table with rows",
    )


FORMATS = {
    ".jsonl": Format(
        noun="JSONL",
        columns=lambda file: None,
        blocks=partial(_text_blocks, ".jsonl", _line_starts),
        rows=partial(_line_rows, partial(json.loads, object_pairs_hook=_object)),
        add_rows="add one JSON object per line",
    ),
    ".csv": Format(
        noun="CSV",
        columns=_csv_columns,
        blocks=partial(_text_blocks, ".csv", _csv_starts),
        rows=_csv_block,
        add_rows="add one row per line below the names of the columns",
    ),
    ".parquet": _table_format(".parquet", "Parquet file", _parquet),
    ".arrow": _table_format(".arrow", "Arrow stream", _arrow),
    ".txt": Format(
        noun="text",
        columns=lambda file: ("text",),
        blocks=partial(_text_blocks, ".txt", _line_starts),
        rows=partial(_line_rows, lambda line: {"text": line.strip()}),
        add_rows="write one text per line",
    ),
    FOLDER: Format(
        noun="folder of pictures",
        columns=lambda folder: None,
        blocks=_folder_blocks,
        rows=_folder_rows,
        add_rows="put pictures and their captions into it",
    ),
}
"""By the ending of a file's name."""
