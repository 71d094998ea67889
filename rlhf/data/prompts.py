"""Rows of the input files with verified pictures, and the resumable stream of prompts that a run draws from.

Every picture is really decoded before any model loads; all that is wrong is raised at once as `BadInput`, or, with
`on_bad_row="skip"`, handed back beside the good rows. A problem with a file as a whole always stops.

The stream is a pure function of (seed, cursor): a permutation per epoch made from hashes, so that a resumed run needs
nothing but the cursor and no library's random generator can change the order.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import xxhash

from rlhf.data.media import ImageError, ImageTooLarge, UnsupportedImage, decode_image
from rlhf.data.records import BadInput, Line, Problem, parse_items, parse_prompts
from rlhf.types import Item, Prompt, seed_from


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt of the input files whose picture was read and decoded."""

    image_id: str
    instruction: str
    image: str
    """Absolute path."""
    item: Item | None
    content: str
    """xxh3-128 of the picture file's bytes."""
    height: int
    """Pixels of the decoded picture."""
    width: int


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


def read_rows(
    path: str | Path,
    *,
    item_metadata: str | Path | None = None,
    prompt_column: str = "prompt",
    on_bad_row: Literal["stop", "skip"] = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Read a JSONL (and the item CSV, in which every image_id must then have a row) and decode every picture.

    Pictures must lie, links followed, inside the folder of the JSONL. `progress(done, total)` counts decoded pictures.
    Raises: BadInput with every problem.
    """
    path = Path(path)
    lines, problems = parse_prompts(path, prompt_column)
    items: dict[str, Item] | None = None
    if item_metadata is not None:
        items, item_problems = parse_items(Path(item_metadata))
        problems += item_problems
        if items or not item_problems:
            problems += [_without_item(path, line, Path(item_metadata)) for line in lines if line.image_id not in items]
    root = path.parent.resolve()
    rows: list[Row] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        pictures = pool.map(lambda line: check_picture(path, root, line.number, "image", line.image), lines)
        for done, (line, found) in enumerate(zip(lines, pictures, strict=True), start=1):
            if isinstance(found, Problem):
                problems.append(found)
            elif items is None or line.image_id in items:
                image, content, height, width = found
                rows.append(
                    Row(
                        image_id=line.image_id,
                        instruction=line.instruction,
                        image=image,
                        item=items[line.image_id] if items is not None else None,
                        content=content,
                        height=height,
                        width=width,
                    )
                )
            if progress is not None:
                progress(done, len(lines))
    problems.sort(key=lambda problem: (problem.file != str(path), problem.file, problem.line or 0))
    fatal = any(problem.line is None for problem in problems)
    if problems and (fatal or on_bad_row == "stop" or not rows):
        raise BadInput(problems)
    return Rows(rows=tuple(rows), left_out=tuple(problems))


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


def check_picture(path: Path, root: Path, number: int, field: str, name: str) -> tuple[str, str, int, int] | Problem:
    """(absolute path, content hash, H, W) of the picture that `field` of line `number` of the file `path` names.

    It must lie, links followed, inside `root` and is really decoded.
    """

    def problem(what: str, remedy: str) -> Problem:
        return Problem(file=str(path), line=number, field=field, what=f"{name!r} {what}", remedy=remedy)

    if "://" in name:
        return problem("is a URL", "pictures are never fetched: save it beside the JSONL and give its relative path")
    try:
        image = (root / name).resolve()
        inside = image.is_relative_to(root)
        data = image.read_bytes() if inside and image.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:
        return problem(f"cannot be read: {error}", "give a readable file")
    if not inside:
        remedy = "move the picture into that folder, without links out of it"
        return problem(f"lies outside the data root {root}", remedy)
    if data is None:
        return problem("does not exist", f"put the picture at {image} or mend the path")
    checked = check_bytes(data)
    return problem(*checked) if isinstance(checked[0], str) else (str(image), xxhash.xxh3_128_hexdigest(data), *checked)


def check_bytes(data: bytes) -> tuple[int, int] | tuple[str, str]:
    """(H, W) of a picture file, which is really decoded; or what is wrong with it and the remedy."""
    try:
        height, width = decode_image(data).shape[:2]
    except ImageTooLarge as error:
        return f"is too large: {error}", "scale it down"
    except UnsupportedImage as error:
        return f"is of a kind that is not read: {error}", "save it as a still 8-bit PNG, JPEG or WEBP"
    except ImageError as error:
        return f"is unreadable: {error}", "replace the file"
    return height, width


def _without_item(path: Path, line: Line, items: Path) -> Problem:
    return Problem(
        file=str(path),
        line=line.number,
        field="image_id",
        what=f"{line.image_id!r} has no row in {items}",
        remedy="add its item metadata there or remove this row",
    )
