"""Opens the media of a data set: from their files or from tables, checked against what they were, brought to a size."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlhf.data.clips import ClipError, content_of, read_clip
from rlhf.data.formats import FORMATS, Block
from rlhf.data.media import decode_image, fit_image
from rlhf.data.records import Field, Record
from rlhf.errors import Refused
from rlhf.types import Clip, Geometry, Source

COLUMNS_HELD = 4
"""Columns of blocks that a process keeps: the media of one piece of work follow each other in their file."""
ReadColumn = Callable[[str, int, str], Sequence[Any]]
"""(table, part, column) → the values of one row group or record batch."""


def read_column(table: str, part: int, column: str) -> list[Any]:
    """One column of a row group or record batch; None where a row has no value. Raises: OSError, pyarrow's exceptions."""
    block = Block(file=table, format=Path(table).suffix, part=part, first=1, count=0)
    rows = FORMATS[block.format].rows(block, [Field(name=column)])
    return [row.fields.get(column) for row in rows if isinstance(row, Record)]


read_held = lru_cache(maxsize=COLUMNS_HELD)(read_column)
"""`read_column`, with the last few kept."""


def open_source(source: Source, geometry: Geometry | None = None, read: ReadColumn = read_held) -> np.ndarray:
    """uint8 (F, H, W, 3) of a medium as a model is shown it; without a geometry as it is in its file. Raises: OSError; Refused
    where the bytes are not what was checked, and for several frames of a picture. A clip always has a geometry.
    """
    if source.clip is not None:
        assert geometry is not None, "how many frames are meant"
        return _open_clip(source, source.clip, geometry)
    if geometry is not None and geometry.frames != 1:
        raise Refused(f"{source.path} is a picture, but {geometry.frames} frames of it are asked for")
    cell = source.cell
    data = Path(source.path).read_bytes() if cell is None else read(source.path, cell.part, cell.column)[cell.row]
    if cell is not None and cell.item is not None and isinstance(data, list):
        data = data[cell.item] if cell.item < len(data) else None
    if xxhash.xxh3_128_hexdigest(data or b"") != source.content:
        where = source.path if cell is None else f"{source.path} row {cell.number}"
        raise Refused(f"{where} changed since it was checked; start the job again")
    picture = decode_image(data)
    return (picture if geometry is None else _shown(picture, source, geometry))[None]


def _shown(picture: np.ndarray, source: Source, geometry: Geometry) -> np.ndarray:
    """uint8 (H, W, 3), fitted and mirrored."""
    picture = fit_image(picture, geometry.height, geometry.width, source.fit, source.crop)
    return np.ascontiguousarray(picture[:, ::-1] if source.mirrored else picture)


def _open_clip(source: Source, clip: Clip, geometry: Geometry) -> np.ndarray:
    file = Path(source.path)
    if content_of(file) != source.content:
        raise Refused(f"{source.path} changed since it was checked; start the job again")
    try:
        frames = read_clip(file, clip, geometry.frames)
    except ClipError as error:
        raise Refused(f"{source.path} {error}") from error
    return np.stack([_shown(frame, source, geometry) for frame in frames])


def seen_source(source: Source, geometry: Geometry) -> np.ndarray:
    """uint8 (F, H, W, 3) of a prompt's source at the height and width of what is made of it, for judges and eyes.

    Raises: OSError, Refused.
    """
    return open_source(source, replace(geometry, frames=1))
