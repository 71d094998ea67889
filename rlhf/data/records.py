"""What the input files must look like, and every way in which a row can be wrong.

`train_metadata.jsonl`: one object a line with `image_id`, an instruction (its column is configurable) and `image`, a
path relative to the file. `ctr_metadata.csv`: image_id,food_name,food_type,city_name,shop_name; UTF-8, BOM or not.

A problem is a value that says where (file, line, field), what is wrong and how to mend it; parsing collects them all
and never raises at the first. Left out: reading the pictures (`rlhf.data.prompts`), further columns, which are ignored.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import Refused
from rlhf.types import Item

ITEM_FIELDS = ("food_name", "food_type", "city_name", "shop_name")


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


@dataclass(frozen=True, kw_only=True)
class Line:
    """A well-formed line of the JSONL, before its picture was looked at."""

    number: int
    image_id: str
    instruction: str
    image: str
    """As written in the file."""


def parse_prompts(path: Path, prompt_column: str) -> tuple[list[Line], list[Problem]]:
    """The well-formed lines of a JSONL and the problems of the others. Of lines with one image_id the first counts."""
    data, problem = _read(path, "data.path")
    if data is None:
        return [], [problem] if problem else []
    lines: list[Line] = []
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        found = _parse_line(raw, str(path), number, prompt_column)
        if isinstance(found, list):
            problems += found
        elif found.image_id in first:
            what = f"{found.image_id!r} is already on line {first[found.image_id]}"
            problems.append(_problem(path, number, "image_id", what, "give every row its own image_id"))
        else:
            first[found.image_id] = number
            lines.append(found)
    if not lines and not problems:
        problems.append(_problem(path, None, None, "has no rows", "add one JSON object per line"))
    return lines, problems


def parse_items(path: Path) -> tuple[dict[str, Item], list[Problem]]:
    """Items by image_id, and the problems of the other rows. Of rows with one image_id the first counts."""
    data, problem = _read(path, "data.item_metadata")
    if data is None:
        return {}, [problem] if problem else []
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return {}, [_problem(path, None, None, f"line {line} is not UTF-8 ({error.reason})", "save the file as UTF-8")]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    first: dict[str, int] = {}
    try:
        header = [name.strip() for name in next(reader, [])]
        absent = [name for name in ("image_id", *ITEM_FIELDS) if name not in header]
        if absent:
            remedy = f"the first line must name image_id,{','.join(ITEM_FIELDS)}"
            return {}, [_problem(path, None, None, f"has no column {', '.join(absent)}", remedy)]
        for row in reader:
            number = reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                what = f"has {len(row)} fields, the header {len(header)}"
                problems.append(_problem(path, number, None, what, "add the missing; quote fields that hold commas"))
                continue
            values = dict(zip(header, row, strict=True))
            image_id = values["image_id"]
            if not image_id:
                problems.append(_problem(path, number, "image_id", "is empty", "give the image_id of a JSONL row"))
            elif image_id in first:
                what = f"{image_id!r} is already on line {first[image_id]}"
                problems.append(_problem(path, number, "image_id", what, "keep one row per image_id"))
            else:
                first[image_id] = number
                items[image_id] = Item(**{name: values[name] for name in ITEM_FIELDS})
    except csv.Error as error:
        problems.append(_problem(path, None, None, f"line {reader.line_num} is no CSV: {error}", "mend its quotes"))
    return items, problems


def _read(path: Path, key: str) -> tuple[bytes | None, Problem | None]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, _problem(path, None, None, "no such file", f"set {key} to an existing file")
    except OSError as error:
        return None, _problem(path, None, None, f"cannot be read: {error.strerror}", f"set {key} to a readable file")
    return data.removeprefix(b"\xef\xbb\xbf"), None


def _parse_line(raw: bytes, file: str, number: int, prompt_column: str) -> Line | list[Problem]:
    def problem(field: str | None, what: str, remedy: str) -> Problem:
        return Problem(file=file, line=number, field=field, what=what, remedy=remedy)

    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return [problem(None, f"is not UTF-8 ({error.reason})", "save the file as UTF-8")]
    except (ValueError, RecursionError) as error:
        return [problem(None, f"is not JSON: {error}", "write one JSON object per line")]
    if not isinstance(row, dict):
        return [problem(None, f"is {_json_type(row)}, not an object", 'write {"image_id": …, …}')]
    problems = []
    examples = {"image_id": '"10001"', prompt_column: '"Make it brighter."', "image": '"images/10001.jpg"'}
    for field, example in examples.items():
        if field not in row:
            remedy = f'add "{field}": {example}'
            if field == prompt_column:
                remedy += f" or set data.prompt_column, now {prompt_column!r}, to the field that holds the instruction"
            problems.append(problem(field, "is missing", remedy))
        elif not isinstance(row[field], str):
            what = f"is {_json_type(row[field])}, not a string"
            problems.append(problem(field, what, f"write it in quotes, like {example}"))
        elif not row[field] and field != prompt_column:
            problems.append(problem(field, "is empty", f"write for example {example}"))
        elif not is_text(row[field]):
            what = "holds half of a surrogate pair, which is no character"
            problems.append(problem(field, what, "write the character itself"))
    if problems:
        return problems
    return Line(number=number, image_id=row["image_id"], instruction=row[prompt_column], image=row["image"])


def is_text(text: str) -> bool:
    """Whether every character can be written: JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_type(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return kinds.get(type(value), json.dumps(value))


def _problem(path: Path, line: int | None, field: str | None, what: str, remedy: str) -> Problem:
    return Problem(file=str(path), line=line, field=field, what=what, remedy=remedy)
