"""Input rows and what is wrong with them: records, the fields that a kind of file must have, and problems.

A problem is a value that says where (file, line, field), what is wrong and how to mend it. `rlhf.data.formats` reads files into
records; `rlhf.data.checks` holds records against a tuple of `Field`s, which describes a kind of file once.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with the input, and its remedy."""

    file: str
    line: int | None
    """Or row of a table, from 1; 0 of a file that is a row itself; None where the whole input cannot be used."""
    field: str | None
    what: str
    remedy: str

    def __str__(self) -> str:
        table = self.file.endswith((".parquet", ".arrow"))
        where = f"{self.file}{' row ' if table else ':'}{self.line}" if self.line else self.file
        return f"{where}: {f'{self.field}: ' if self.field else ''}{self.what}; {self.remedy}"


class BadInput(Refused):
    """The input files cannot be used; the message has one line per problem.

    skippable: whether the job can go on without bad rows.
    """

    def __init__(self, problems: Sequence[Problem], skippable: bool = True):
        self.problems, self.skippable = tuple(problems), skippable
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        of_rows = skippable and any(problem.line is not None for problem in self.problems)
        hint = _SKIP_HINT if of_rows else ""
        super().__init__("\n".join([f"the input has {count}:", *(f"  {p}" for p in self.problems)]) + hint)

    def __reduce__(self):
        return BadInput, (self.problems, self.skippable)


_SKIP_HINT = '\nTo go on without the bad rows set data.on_bad_row = "skip"; they are then listed and recorded.'


def whole(file: Path | str, what: str, remedy: str) -> Problem:
    """A problem of a file as a whole."""
    return Problem(file=str(file), line=None, field=None, what=what, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Field:
    """What one field of a kind of file must hold."""

    name: str
    kind: Literal["text", "number", "picture", "pictures", "picture path", "picture paths", "any"] = "text"
    """A number may be written as text and is finite. A picture is its path or, in a table, the bytes of its file; a picture path
    is never bytes; pictures and picture paths are a list of them, or one. `any` is not checked."""
    required: bool = True
    """One that is not may be left out, null or empty: all the same."""
    counts: range | None = None
    """Of picture paths: how many there may be; None: any number but none."""
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
    is_file: bool = False
    """Whether the row is the file itself, one of many in a folder: `number` is its place there."""

    def problem(self, field: str | None, what: str, remedy: str) -> Problem:
        line = 0 if self.is_file else self.number
        return Problem(file=self.file, line=line, field=field, what=what, remedy=remedy)
