"""What is known of the products on the photos: a file of `image_id` and further columns, `ctr_metadata.csv` by custom."""

from pathlib import Path

from rlhf.data.checks import check_file
from rlhf.data.records import Field, Problem
from rlhf.types import Item

ITEM_COLUMNS = ("food_name", "food_type", "city_name", "shop_name")
FIELDS = (
    Field(name="image_id", unique=True, remedy="give the image_id of a JSONL row"),
    *(Field(name=name, may_be_empty=True) for name in ITEM_COLUMNS),
)


def parse_items(path: Path) -> tuple[dict[str, Item], list[Problem]]:
    """Items by image_id, and the problems of the other rows. Of rows with one image_id the first counts.

    A file whose name ends in nothing known is read as CSV.
    """
    rows, problems = check_file(path, FIELDS, key="data.item_metadata", otherwise=".csv", others=True)
    return {
        row.fields["image_id"]: {name: str(value) for name, value in row.fields.items() if name != "image_id"}
        for row in rows
    }, problems
