"""The click log that trains the CTR model: a row per picture, with every bad row found before anything loads.

Columns: image_url (a path relative to the file; nothing is fetched), food_name, food_type, city_name, shop_name, pv_ctr, and
where present impressions and clicks. Further columns are ignored.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.data.checks import OnBadRow, check, check_file, no_rows, refuse
from rlhf.data.prompts import ITEM_COLUMNS
from rlhf.data.records import Field, Problem, Record
from rlhf.errors import Refused
from rlhf.rewards.ctr.model import Product
from rlhf.types import seed_from

FIELDS = (
    Field(name="image_url", kind="picture path", stripped=True, remedy="give a path inside the folder of the file"),
    *(Field(name=name, may_be_empty=True, stripped=True) for name in ITEM_COLUMNS),
    Field(name="pv_ctr", kind="number", example="0.05"),
)
COUNTS = [Field(name=name, kind="number", example=rows) for name, rows in (("impressions", "200"), ("clicks", "10"))]
"""Needed in every row where the file has both."""


@dataclass(frozen=True, kw_only=True)
class Click:
    """How often one picture of one product was clicked."""

    image: Path
    item: Product
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


def read_clicks(path: Path, on_bad_row: OnBadRow = "stop") -> tuple[list[Click], list[Problem]]:
    """The rows of the log with readable pictures, and (only with `on_bad_row="skip"`) what was left out.

    A file whose name ends in nothing known is read as CSV. Raises: BadInput with all problems at once.
    """
    key = "data.path (data.eval_path)"
    records, problems = check_file(path, FIELDS, key=key, otherwise=".csv", others=True)
    found = [_click(record) for record in records]
    clicks = [click for click in found if isinstance(click, Click)]
    problems += itertools.chain(*(faults for faults in found if isinstance(faults, list)))
    problems.sort(key=lambda problem: problem.line or 0)
    if not found and not problems:
        problems = [no_rows(path, ".csv")]
    refuse(problems, clicks, on_bad_row)
    return clicks, problems


def _click(record: Record) -> Click | list[Problem]:
    rate, impressions, problems = record.fields["pv_ctr"], None, []
    if not 0 <= rate <= 1:
        problems.append(record.problem("pv_ctr", f"is {rate:g}", "give a rate from 0 to 1, not a percentage"))
    if all(field.name in record.fields for field in COUNTS):
        counts, faults = check(record, COUNTS)
        problems += faults
        if not faults:
            views, hits = counts["impressions"], counts["clicks"]
            if views < 1 or views % 1 or hits % 1 or not 0 <= hits <= views:
                what = f"{hits:g} of impressions {views:g}"
                problems.append(record.problem("clicks", what, "give whole numbers, clicks ≤ impressions"))
            else:
                impressions, rate = int(views), hits / views
    item = Product(**{name: record.fields[name] for name in ITEM_COLUMNS})
    image = Path(record.fields["image_url"].path)
    return problems or Click(image=image, item=item, rate=rate, impressions=impressions)


def split(clicks: Sequence[Click], fraction: float, seed: int, key: str) -> tuple[list[Click], list[Click]]:
    """(kept, held out): `fraction` of the products, at least one, with all their rows; so no product is in both.

    Which ones depends on the seed and the product alone. Raises: Refused, naming `key`, for fewer than two products.
    """
    products = sorted({click.item for click in clicks}, key=lambda item: seed_from(seed, *vars(item).values()))
    if len(products) < 2:
        raise Refused(
            f"{key} = {fraction:g} takes whole products (rows with equal {', '.join(ITEM_COLUMNS)}), and there are "
            f"{len(products)} to take from; add rows of others, or hold out less here or before"
        )
    held_out = set(products[: min(max(1, round(fraction * len(products))), len(products) - 1)])
    return [click for click in clicks if click.item not in held_out], [c for c in clicks if c.item in held_out]
