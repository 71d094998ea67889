"""Rows of the input files with verified pictures, and the resumable stream of prompts that a run draws from.

Every picture is really decoded before any model loads; all that is wrong is raised at once as `BadInput`, or, with
`on_bad_row="skip"`, handed back beside the good rows. A problem with a file as a whole always stops.

The stream is a pure function of (seed, cursor): a permutation per epoch made from hashes, so that a resumed run needs
nothing but the cursor and no library's random generator can change the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rlhf.data.checks import OnBadRow, check_file, no_rows, refuse
from rlhf.data.media import PictureFile
from rlhf.data.records import Field, Problem
from rlhf.models.family import Family
from rlhf.tables import EditModelTable
from rlhf.types import Fit, Geometry, Item, Prompt, Sized, Source, seed_from

ITEM_COLUMNS = ("food_name", "food_type", "city_name", "shop_name")
ITEM_FIELDS = (
    Field(name="image_id", unique=True, remedy="give the image_id of a JSONL row"),
    *(Field(name=name, may_be_empty=True) for name in ITEM_COLUMNS),
)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts to work on and what was left out of them."""

    prompts: tuple[Prompt, ...]
    left_out: tuple[Problem, ...] = ()
    """Empty unless `on_bad_row="skip"`."""

    def report(self) -> str:
        """What was left out, a line per problem; empty if nothing was."""
        if not self.left_out:
            return ""
        head = f"left out: {len(self.left_out)} problems; going on with {len(self.prompts)} rows"
        return "\n".join([head, *(f"  {problem}" for problem in self.left_out)])


def read_items(path: str | Path | None) -> tuple[dict[str, Item] | None, list[Problem]]:
    """Items by image_id, None where there is no file; and the problems of the other rows. Of rows with one image_id the first
    counts. A file whose name ends in nothing known is read as CSV.
    """
    if path is None:
        return None, []
    rows, problems = check_file(Path(path), ITEM_FIELDS, key="data.item_metadata", otherwise=".csv", others=True)
    return {
        row.fields["image_id"]: {name: _text(value) for name, value in row.fields.items() if name != "image_id"}
        for row in rows
    }, problems


def _text(value: object) -> str:
    """A value of a column that is no text; one that is absent (null, or pandas' NaN) is blank."""
    return "" if value is None or value != value else str(value)


def read_prompts(
    path: str | Path,
    fit: Fit,
    geometry: Sized,
    *,
    item_metadata: str | Path | None = None,
    prompt_column: str | None = None,
    on_bad_row: OnBadRow = "stop",
    key: str = "data.path",
    source_counts: range | None = None,
) -> Prompts:
    """Read a JSONL or table of prompts (and the item CSV, in which every image_id must then have a row); decode all pictures.

    prompt_column: data.prompt_column; None: the job has no such key, and it is "prompt". source_counts: how many pictures a row
    may have, see `Family`. They must lie, links followed, inside the folder of the file. A file whose name ends in nothing
    known is read as JSONL. Raises: BadInput with every problem.
    """
    path = Path(path)
    items, item_problems = read_items(item_metadata)
    # Where the items cannot be read at all, that alone is told, and not of every row that it has none.
    known = None if item_problems and not items else items
    column = prompt_column or "prompt"
    remedy = f'add "{column}": "Make it brighter."'
    if prompt_column:
        remedy += f" or set data.prompt_column, now {prompt_column!r}, to the field that holds the instruction"
    fields = (
        Field(name="image_id", unique=True, known=known, known_in=str(item_metadata), example='"10001"'),
        Field(name=column, may_be_empty=True, example='"Make it brighter."', remedy=remedy),
        Field(
            name="image",
            kind="picture paths",
            counts=source_counts,
            required=source_counts is None or 0 not in source_counts,
            example='"images/10001.jpg"',
        ),
    )
    records, problems = check_file(path, fields, key=key, otherwise=".jsonl")
    if not records and not problems:
        problems = [no_rows(path, ".jsonl")]
    prompts = []
    for record in records:
        key, images = record.fields["image_id"], record.fields.get("image") or ()
        if items is None or key in items:
            item = items[key] if items is not None else {}
            prompts.append(prompt_of(key, record.fields[column], images, item, fit, geometry))
    problems = [*problems, *item_problems]
    refuse(problems, prompts, on_bad_row)
    return Prompts(prompts=tuple(prompts), left_out=tuple(problems))


def sized(model: EditModelTable, family: Family, frames: int = 1) -> Sized:
    """The edit's geometry by a recipe's model.size: the recipe's own, or the family's nearest to each source."""

    def geometry(height: int, width: int) -> Geometry:
        height, width = family.nearest_size(height, width) if model.size == "auto" else (model.height, model.width)
        return Geometry(height=height, width=width, frames=frames)

    return geometry


def prompt_of(
    key: str, instruction: str, images: Sequence[PictureFile], item: Item, fit: Fit, geometry: Sized
) -> Prompt:
    """The prompt of picture files; without one it is as large as of a square one."""
    return Prompt(
        key=key,
        instruction=instruction,
        sources=tuple(
            Source(path=str(one.path), content=one.content, height=one.height, width=one.width, fit=fit)
            for one in images
        ),
        item=item,
        geometry=geometry(images[0].height, images[0].width) if images else geometry(1, 1),
    )


class PromptStream:
    """`stream[cursor]` for any cursor ≥ 0: every epoch visits each prompt once, in an order made from (seed, epoch)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt")
        self.prompts = tuple(prompts)
        self.seed = seed

    def __getitem__(self, cursor: int) -> Prompt:
        if cursor < 0:
            raise IndexError(f"cursor = {cursor}: the stream starts at 0")
        epoch, place = divmod(cursor, len(self.prompts))
        return self.prompts[_order(self.seed, epoch, len(self.prompts))[place]]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(sorted(range(count), key=lambda i: (seed_from(seed, "prompt order", epoch, i), i)))
