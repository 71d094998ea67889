"""The one reader of input rows: any file of `rlhf.data.formats` becomes blocks, and a block becomes records or problems.

A problem is a value that says where (file, line, field), what is wrong and how to mend it. What a kind of file needs is
described once, as a tuple of `Field`s; `rlhf.data.checks` holds records against it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rlhf.data.formats import FORMATS, Block, Fault, UnreadableFile
from rlhf.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with the input, and its remedy."""

    file: str
    line: int | None
    """Or row of a table, from 1; None where the file as a whole is meant."""
    field: str | None
    what: str
    remedy: str

    def __str__(self) -> str:
        table = self.file.endswith((".parquet", ".arrow"))
        where = self.file if self.line is None else f"{self.file}{' row ' if table else ':'}{self.line}"
        return f"{where}: {f'{self.field}: ' if self.field else ''}{self.what}; {self.remedy}"


class BadInput(Refused):
    """The input files cannot be used; the message has one line per problem."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        hint = "" if all(problem.line is None for problem in self.problems) else _SKIP_HINT
        super().__init__("\n".join([f"the input has {count}:", *(f"  {p}" for p in self.problems)]) + hint)

    def __reduce__(self):
        return BadInput, (self.problems,)


_SKIP_HINT = '\nTo go on without the bad rows set data.on_bad_row = "skip"; they are then listed and recorded.'


def whole(file: Path | str, what: str, remedy: str) -> Problem:
    """A problem of a file as a whole."""
    return Problem(file=str(file), line=None, field=None, what=what, remedy=remedy)


# --- what a file needs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Field:
    """What one field of a kind of file must hold."""

    name: str
    kind: Literal["text", "number", "picture", "picture path", "picture paths", "any"] = "text"
    """A number may be written as text and is finite. A picture is its path or, in a table, the bytes of its file; a picture path
    is never bytes; picture paths are a list of them, or one. `any` is not checked."""
    required: bool = True
    """One that is not may be left out, null or empty: all the same."""
    may_be_empty: bool = False
    """A text of blanks alone is a value too."""
    stripped: bool = False
    """Blanks around a text are no part of it."""
    unique: bool = False
    """No two rows of a file may have the same."""
    known: Collection[str] | None = None
    """The only values there are: ids of another file, `known_in`."""
    known_in: str = ""
    example: str = '"…"'
    """As JSON writes it."""
    remedy: str = ""
    """What to do where it is missing, empty or not known, if that is not to write something like the example."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A row as it is in its file or, once it was checked, with the values that its fields stand for."""

    file: str
    number: int
    """Of the row (line) in its file, from 1."""
    fields: Mapping[str, Any]

    def problem(self, field: str | None, what: str, remedy: str) -> Problem:
        return Problem(file=self.file, line=self.number, field=field, what=what, remedy=remedy)


# --- reading -----------------------------------------------------------------------------------------------------------


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
        columns = kind.columns(file)
        absent = [field.name for field in fields if field.required and field.name not in (columns or ())]
        if columns is not None and absent:
            raise UnreadableFile(f"has no column {', '.join(absent)}", _columns_remedy(name, columns, fields, give))
        return kind.blocks(file)
    except UnreadableFile as error:
        problem = whole(file, error.fault.what, error.fault.remedy)
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
    if file.suffix in FORMATS:
        return file.suffix
    if not otherwise:
        raise BadInput([whole(file, f"is a {file.suffix or 'nameless'} file", f"give one of {', '.join(FORMATS)}")])
    return otherwise


def _columns_remedy(name: str, columns: Sequence[str], fields: Sequence[Field], give: str) -> str:
    wanted = [field.name for field in fields if field.required]
    if name == ".csv":
        return f"the first line must name {','.join(wanted)}"
    if name == ".txt":
        return "a .txt file holds a text a line; end the name with what the file is, .csv or .jsonl"
    return f"it has {', '.join(columns)}; give {give or 'the columns ' + ', '.join(wanted)}"


def read_block(block: Block, fields: Sequence[Field] = ()) -> list[Record | Problem]:
    """The rows of a block, in order, or what is wrong with them; blank lines are none.

    `fields`: those to read; all, if none is given. Null in a table is a field that the row lacks.
    Raises: BadInput for a block that cannot be read as a whole.
    """
    example = ", ".join(f'"{field.name}": {field.example}' for field in fields if field.required)
    names = {field.name for field in fields}
    try:
        rows = list(FORMATS[block.format].rows(block, names, f"{{{example}}}" if example else ""))
    except UnreadableFile as error:
        raise BadInput([whole(block.file, error.fault.what, error.fault.remedy)]) from error
    except (pa.ArrowException, OSError) as error:
        what = f"rows {block.first} to {block.first + block.count - 1} cannot be read: {_line(error)}"
        problem = Problem(file=block.file, line=block.first, field=None, what=what, remedy="replace it")
        raise BadInput([problem]) from error
    return [
        Problem(file=block.file, line=number, field=None, what=row.what, remedy=row.remedy)
        if isinstance(row, Fault)
        else Record(file=block.file, number=number, fields=row)
        for number, row in rows
    ]


def _line(error: Exception) -> str:
    """What pyarrow says, on one line: a problem has one."""
    return " ".join(str(error).split())
