"""The click log that trains the CTR model: a CSV row per picture, with every bad row found before anything loads.

Columns: image_url (a path relative to the CSV; nothing is fetched), food_name, food_type, city_name, shop_name, pv_ctr,
and where present impressions and clicks. Further columns are ignored.
"""

import csv
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.data.media import ImageError, decode_image
from rlhf.data.records import ITEM_FIELDS, BadInput, Problem
from rlhf.errors import Refused
from rlhf.types import Item, seed_from

COLUMNS = ("image_url", *ITEM_FIELDS, "pv_ctr")


@dataclass(frozen=True, kw_only=True)
class Click:
    """How often one picture of one product was clicked."""

    image: Path
    item: Item
    rate: float
    """Click rate in [0, 1]; clicks / impressions where these are known."""
    impressions: int | None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A click log by use; no product of `train` is in `validation`."""

    train: Sequence[Click]
    validation: Sequence[Click] = ()
    """Decide which epoch was best and when to stop; empty: all epochs are trained."""
    held_out: Sequence[Click] = ()
    """Scored once, at the end, and never looked at before."""

    @property
    def counted(self) -> bool:
        """Whether impressions are known for all rows that training reads."""
        return all(click.impressions is not None for click in (*self.train, *self.validation))


def read_clicks(path: Path, on_bad_row: Literal["stop", "skip"] = "stop") -> tuple[list[Click], list[Problem]]:
    """The rows of the CSV with readable pictures, and (only with `on_bad_row="skip"`) what was left out.

    Raises: BadInput with all problems at once.
    """
    clicks, problems = _parse(path)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda row: _picture_problem(path, *row), clicks)
    unreadable = {line: problem for (line, _), problem in zip(clicks, found, strict=True) if problem}
    problems = sorted([*problems, *unreadable.values()], key=lambda problem: problem.line or 0)
    good = [click for line, click in clicks if line not in unreadable]
    if not good and not problems:
        problems = [_problem(path, None, None, "has no rows", "add one row per picture")]
    if problems and (on_bad_row == "stop" or not good or any(problem.line is None for problem in problems)):
        raise BadInput(problems)
    return good, problems


def _parse(path: Path) -> tuple[list[tuple[int, Click]], list[Problem]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        remedy = "set data.path (data.eval_path) to a readable CSV"
        return [], [_problem(path, None, None, f"cannot be read: {error.strerror}", remedy)]
    except UnicodeDecodeError as error:
        return [], [_problem(path, None, None, f"is not UTF-8 ({error.reason})", "save the file as UTF-8")]
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="")
    try:
        header = reader.fieldnames or ()
        absent = [name for name in COLUMNS if name not in header]
        if absent:
            remedy = f"the first line must name {','.join(COLUMNS)}"
            return [], [_problem(path, None, None, f"has no column {', '.join(absent)}", remedy)]
        counted = {"impressions", "clicks"} <= set(header)
        clicks, problems = [], []
        for row in reader:
            found = _parse_row(path, reader.line_num, row, counted)
            if isinstance(found, Click):
                clicks.append((reader.line_num, found))
            else:
                problems += found
    except csv.Error as error:
        return [], [_problem(path, None, None, f"line {reader.line_num} is no CSV: {error}", "mend its quotes")]
    return clicks, problems


def _parse_row(path: Path, line: int, row: dict[str, str | None], counted: bool) -> Click | list[Problem]:
    problems: list[Problem] = []
    if "" in row or None in row.values():
        what, remedy = "does not have as many fields as the header", "add the missing; quote fields that hold commas"
        return [_problem(path, line, None, what, remedy)]
    values = {name: text.strip() for name, text in row.items() if text is not None}
    image = _resolve(path, line, values["image_url"], problems)
    rate = _number(path, line, "pv_ctr", values["pv_ctr"], problems)
    if rate is not None and not 0 <= rate <= 1:
        problems.append(_problem(path, line, "pv_ctr", f"is {rate:g}", "give a rate from 0 to 1, not a percentage"))
    impressions = None
    if counted:
        views = _number(path, line, "impressions", values["impressions"], problems)
        hits = _number(path, line, "clicks", values["clicks"], problems)
        if views is not None and hits is not None:
            if views < 1 or views % 1 or hits % 1 or not 0 <= hits <= views:
                what = f"{hits:g} of impressions {views:g}"
                problems.append(_problem(path, line, "clicks", what, "give whole numbers, clicks ≤ impressions"))
            else:
                impressions, rate = int(views), hits / views
    if problems:
        return problems
    assert image is not None and rate is not None
    item = Item(**{name: values[name] for name in ITEM_FIELDS})
    return Click(image=image, item=item, rate=rate, impressions=impressions)


def _number(path: Path, line: int, field: str, text: str, problems: list[Problem]) -> float | None:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problems.append(_problem(path, line, field, f"is {text!r}", "give a finite number"))
        return None
    return value


def _resolve(path: Path, line: int, text: str, problems: list[Problem]) -> Path | None:
    if "://" in text:
        problems.append(_problem(path, line, "image_url", "is a URL", "download the picture; give its path from here"))
        return None
    root = path.parent.resolve()
    image = (root / text).resolve()
    if not text or not image.is_relative_to(root):
        what = f"{text!r} is outside {root}" if text else "is empty"
        problems.append(_problem(path, line, "image_url", what, "give a path inside the CSV's folder"))
        return None
    return image


def _picture_problem(path: Path, line: int, click: Click) -> Problem | None:
    try:
        decode_image(click.image.read_bytes())
    except OSError as error:
        what = f"{click.image}: {error.strerror}"
        return _problem(path, line, "image_url", what, "put the picture there or remove the row")
    except ImageError as error:
        return _problem(path, line, "image_url", f"{click.image}: {error}", "replace the picture or remove the row")
    return None


def _problem(path: Path, line: int | None, field: str | None, what: str, remedy: str) -> Problem:
    return Problem(file=str(path), line=line, field=field, what=what, remedy=remedy)


def split(clicks: Sequence[Click], fraction: float, seed: int, key: str) -> tuple[list[Click], list[Click]]:
    """(kept, held out): `fraction` of the products, at least one, with all their rows; so no product is in both.

    Which ones depends on the seed and the product alone. Raises: Refused, naming `key`, for fewer than two products.
    """
    products = sorted({click.item for click in clicks}, key=lambda item: seed_from(seed, *vars(item).values()))
    if len(products) < 2:
        raise Refused(
            f"{key} = {fraction:g}: the click log has {len(products)} product (rows with equal {', '.join(ITEM_FIELDS)}), "
            "and products are held out whole; add rows of others, or hold out nothing here"
        )
    held_out = set(products[: min(max(1, round(fraction * len(products))), len(products) - 1)])
    return [click for click in clicks if click.item not in held_out], [c for c in clicks if c.item in held_out]
