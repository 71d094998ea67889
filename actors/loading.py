"""What there is to encode, and the Ray Data task that reads pictures for the encoders.

Kept apart from `actors.encoders` because every loader process imports this module: it costs no diffusers and
no encoder. Left out: keeping decoded pictures, which are read once.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from rlhf.data.media import Fit, decode_image, fit_image
from rlhf.data.pair_files import Block, RawPair, read_block
from rlhf.errors import Refused

BLOCKS_HELD = 2
"""Row groups that a loader process keeps: the pictures of a work item follow each other in their file."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """An instruction to encode."""

    key: str
    instruction: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture inside a table of pairs."""

    block: Block
    row: int
    """In the block, from 0."""
    side: int
    """0 or 1: jpg_0 or jpg_1."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to encode at (H, W), as what the model is shown (source) or as what it is to make (target)."""

    key: str
    role: Literal["source", "target"]
    place: str | Cell
    """Its file, or its place in a table."""
    content: str
    """xxh3-128 of the file when it was checked."""
    height: int
    width: int
    fit: Fit
    mirrored: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Picture":
        place = values["place"]
        if isinstance(place, dict):
            place = Cell(**{**place, "block": Block(**place["block"])})
        return cls(**{**values, "place": place})


def load(row: dict[str, Any]) -> dict[str, Any]:
    """Add `pixels` to a work item of `actors.encoders.plan`: the bytes of uint8 (rows, H, W, 3), none for texts.

    `error` says which picture cannot be read any more, or is empty: between processes an exception loses its cause.
    """
    pictures = [Picture.from_json(values) for values in json.loads(row["item"]).get("pictures", ())]
    try:
        pixels = b"".join(_pixels(picture).tobytes() for picture in pictures)
        return {"item": row["item"], "pixels": pixels, "error": ""}
    except (OSError, Refused) as error:
        return {"item": row["item"], "pixels": b"", "error": str(error)}


def _pixels(picture: Picture) -> np.ndarray:
    data = _file(picture.place)
    if xxhash.xxh3_128_hexdigest(data) != picture.content:
        raise Refused(f"{_name(picture.place)} changed since it was checked; start the job again")
    pixels = fit_image(decode_image(data), picture.height, picture.width, picture.fit)
    return pixels[:, ::-1] if picture.mirrored else pixels


def _file(place: str | Cell) -> bytes:
    if isinstance(place, str):
        return Path(place).read_bytes()
    return _block(place.block)[place.row].pictures[place.side] or b""


def _name(place: str | Cell) -> str:
    return place if isinstance(place, str) else f"{place.block.file} row {place.block.first + place.row}"


@lru_cache(maxsize=BLOCKS_HELD)
def _block(block: Block) -> list[RawPair]:
    return read_block(block)
