"""Rows of the input files with verified pictures, and the resumable stream of prompts that a run draws from.

Every picture is really decoded before any model loads; all that is wrong is raised at once as `BadInput`, or, with
`on_bad_row="skip"`, handed back beside the good rows. A problem with a file as a whole always stops.

The stream is a pure function of (seed, cursor): a permutation per epoch made from hashes, so that a resumed run needs
nothing but the cursor and no library's random generator can change the order.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rlhf.data.checks import OnBadRow, check_file, no_rows, refuse
from rlhf.data.items import parse_items
from rlhf.data.media import PictureFile
from rlhf.data.records import Field, Problem
from rlhf.types import Fit, Geometry, Item, Prompt, Source, seed_from


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt of the input files whose pictures were read and decoded."""

    image_id: str
    instruction: str
    images: tuple[PictureFile, ...]
    """At least one."""
    item: Item
    """Empty where the data set has none."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows to work on and what was left out of them."""

    rows: tuple[Row, ...]
    left_out: tuple[Problem, ...] = ()
    """Empty unless `on_bad_row="skip"`."""

    def report(self) -> str:
        """What was left out, a line per problem; empty if nothing was."""
        if not self.left_out:
            return ""
        head = f"left out: {len(self.left_out)} problems; going on with {len(self.rows)} rows"
        return "\n".join([head, *(f"  {problem}" for problem in self.left_out)])


def prompt_fields(
    prompt_column: str, items: Collection[str] | None, items_path: str | Path | None
) -> tuple[Field, ...]:
    """What a row needs. Where `items` (image_ids of the file `items_path`) is given, every row must be among them."""
    remedy = (
        f'add "{prompt_column}": "Make it brighter." or set data.prompt_column, now {prompt_column!r}, to the field that '
        "holds the instruction"
    )
    return (
        Field(name="image_id", unique=True, known=items, known_in=str(items_path), example='"10001"'),
        Field(name=prompt_column, may_be_empty=True, example='"Make it brighter."', remedy=remedy),
        Field(name="image", kind="picture paths", example='"images/10001.jpg"'),
    )


def read_rows(
    path: str | Path,
    *,
    item_metadata: str | Path | None = None,
    prompt_column: str = "prompt",
    on_bad_row: OnBadRow = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Read a JSONL or table of prompts (and the item CSV, in which every image_id must then have a row); decode all pictures.

    Pictures must lie, links followed, inside the folder of the file. `progress(done, total)` counts rows. A file whose name
    ends in nothing known is read as JSONL. Raises: BadInput with every problem.
    """
    path = Path(path)
    items: dict[str, Item] | None = None
    item_problems: list[Problem] = []
    if item_metadata is not None:
        items, item_problems = parse_items(Path(item_metadata))
    # Where the items cannot be read at all, that alone is told, and not of every row that it has none.
    known = None if item_problems and not items else items
    fields = prompt_fields(prompt_column, known, item_metadata)
    records, problems = check_file(path, fields, key="data.path", otherwise=".jsonl", progress=progress)
    if not records and not problems:
        problems = [no_rows(path, ".jsonl")]
    rows = []
    for record in records:
        image_id = record.fields["image_id"]
        if items is not None and image_id not in items:
            continue
        rows.append(
            Row(
                image_id=image_id,
                instruction=record.fields[prompt_column],
                images=record.fields["image"],
                item=items[image_id] if items is not None else {},
            )
        )
    problems = [*problems, *item_problems]
    refuse(problems, rows, on_bad_row)
    return Rows(rows=tuple(rows), left_out=tuple(problems))


def prompts_of(rows: Sequence[Row], fit: Fit, geometry: Callable[[int, int], Geometry]) -> list[Prompt]:
    """The prompts of rows, in order. `geometry` says what is generated where the first source has (H, W) pixels."""
    return [
        Prompt(
            key=row.image_id,
            instruction=row.instruction,
            sources=tuple(Source(path=str(image.path), content=image.content, fit=fit) for image in row.images),
            item=row.item,
            geometry=geometry(row.images[0].height, row.images[0].width),
        )
        for row in rows
    ]


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
