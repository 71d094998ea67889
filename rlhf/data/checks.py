"""Records held against the fields that their kind of file needs: every way in which a row can be wrong.

All problems are collected, and nothing raises at the first. Left out: what fields mean together (that clicks are fewer than
impressions, that a label is a tie), which is for whoever reads that kind of file.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rlhf.data.formats import FORMATS, blocks_of, format_of, read_block, type_name
from rlhf.data.media import picture_file
from rlhf.data.records import BadInput, Field, Problem, Record, whole

SEVERAL = ("pictures", "picture paths")
OnBadRow = Literal["stop", "skip"]


def refuse(problems: Sequence[Problem], good: Collection[object], on_bad_row: OnBadRow) -> None:
    """Raise BadInput with all problems, unless bad rows are to be skipped, no file as a whole is bad, and some are good."""
    if problems and (on_bad_row == "stop" or not good or any(problem.line is None for problem in problems)):
        raise BadInput(problems)


def no_rows(file: Path, otherwise: str = "") -> Problem:
    """The problem of a file without rows."""
    return whole(file, "has no rows", FORMATS[format_of(file, otherwise)].add_rows)


def check(record: Record, fields: Sequence[Field], root: Path | None = None) -> tuple[dict[str, Any], list[Problem]]:
    """(value by field, problems of the other fields); optional fields that the record lacks are in neither.

    Text is a str, a number a float, a picture a `PictureFile` (picture paths are a tuple of them): it was decoded, and lies,
    links followed, inside `root` (by default the folder of the record's file).
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for field in fields:
        given = record.fields.get(field.name)
        several, member = [given], field
        if field.kind in SEVERAL and isinstance(given, list):
            several, member = (
                given or [""],
                replace(field, required=True) if given else field,
            )  # a list holds what is there
        found = [_check_field(record, member, value, root or Path(record.file).parent) for value in several]
        faults = [value for value in found if isinstance(value, Problem)]
        if field.counts is not None and not faults and given and len(found) not in field.counts:
            fewest, most = min(field.counts), max(field.counts)
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            faults = [
                record.problem(
                    field.name, f"names {len(found)} pictures, but the model takes {wanted}", "give that many"
                )
            ]
        problems += faults
        if not faults and found[0] is not None:
            values[field.name] = tuple(found) if field.kind in SEVERAL else found[0]
    return values, problems


def _check_field(record: Record, field: Field, value: Any, root: Path) -> Any:
    """The value, a Problem, or None for what an optional field may lack."""

    def problem(what: str, remedy: str) -> Problem:
        return record.problem(field.name, what, remedy)

    if not field.required and (value is None or value == ""):
        return None
    if field.kind == "any":
        return value
    not_a_number = isinstance(value, float) and math.isnan(value)  # how pandas writes a number that is absent
    if field.name not in record.fields or not_a_number:
        return problem("is missing", field.remedy or f'add "{field.name}": {field.example}')
    if field.kind == "number":
        number = _number(value)
        return problem(f"is {value!r}", field.remedy or "give a finite number") if number is None else number
    if field.kind in ("picture", "pictures") and isinstance(value, bytes):
        found = picture_file(value)
        return problem(*found) if isinstance(found, tuple) else found
    if not isinstance(value, str):
        return problem(f"is {type_name(value)}, not a string", f"write it in quotes, like {field.example}")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can hold them, UTF-8 cannot
        return problem("holds half of a surrogate pair, which is no character", "write the character itself")
    value = value.strip() if field.stripped else value
    if not value.strip() and not field.may_be_empty:
        return problem("is empty", field.remedy or f"write for example {field.example}")
    if field.kind in ("picture", "picture path", *SEVERAL):
        if "://" in value:
            beside = root == Path(record.file).parent
            where = f"beside {Path(record.file).name}" if beside else f"below {root}"
            remedy = f"pictures are never fetched: save it {where} and give its path from there"
            return problem(f"{value!r} is a URL", remedy)
        found = picture_file(value, root)
        return problem(*found) if isinstance(found, tuple) else found
    if field.known is not None and value not in field.known:
        what = f"{value!r} has no row in {field.known_in}"
        return problem(what, field.remedy or "add its row there or remove this one")
    return value


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_file(
    file: Path, fields: Sequence[Field], *, key: str, otherwise: str, root: Path | None = None, others: bool = False
) -> tuple[list[Record], list[Problem]]:
    """The good rows of a file, with checked values (see `check`), and every problem of the others, in their order.

    `key`, `otherwise`: see `blocks_of`. `others`: keep fields that are not described, as they are. Of rows with the
    same value of a unique field the first counts. Pictures are decoded in threads, the rows of one block at a time.
    """
    good: list[Record] = []
    problems: list[Problem] = []
    seen: dict[tuple[str, str], int] = {}

    def checked(row: Record | Problem) -> tuple[dict[str, Any], list[Problem]]:
        return check(row, fields, root) if isinstance(row, Record) else ({}, [row])

    try:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for block in blocks_of(file, fields, key=key, otherwise=otherwise):
                rows = read_block(block, () if others else fields)
                for row, (values, faults) in zip(rows, pool.map(checked, rows), strict=True):
                    if isinstance(row, Record):
                        faults = faults + _repeated(row, values, fields, seen)
                    problems += faults
                    if isinstance(row, Record) and not faults:
                        good.append(replace(row, fields={**row.fields, **values} if others else values))
    except BadInput as error:
        problems += error.problems
    return good, problems


def _repeated(
    record: Record, values: Mapping[str, Any], fields: Sequence[Field], seen: dict[tuple[str, str], int]
) -> list[Problem]:
    """Values of unique fields that an earlier row has too; a row counts only if all its fields but pictures are good."""
    if any(field.required and "picture" not in field.kind and field.name not in values for field in fields):
        return []
    problems = []
    for field in fields:
        if field.unique and field.name in values:
            first = seen.setdefault((field.name, values[field.name]), record.number)
            if first != record.number:
                what = f"{values[field.name]!r} is already on line {first}"
                problems.append(record.problem(field.name, what, f"give every row its own {field.name}"))
    return problems
