"""What there is to encode, and the Ray Data task that reads pictures for the encoders.

Kept apart from `actors.encoders` because every loader process imports this module: it costs numpy and Pillow, not torch
and diffusers. Left out: keeping decoded pictures, which are read once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlhf.data.images import Fit, fit_image
from rlhf.rewards.images import decode_image


@dataclass(frozen=True, kw_only=True)
class Text:
    """An instruction to encode."""

    key: str
    instruction: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source picture to encode at (H, W)."""

    key: str
    path: str
    content: str
    """xxh3-128 of the file when it was checked."""
    height: int
    width: int
    fit: Fit


def load(row: dict[str, Any]) -> dict[str, Any]:
    """Add `pixels` to a work item of `actors.encoders.plan`: the bytes of uint8 (rows, H, W, 3), none for texts.

    `error` says which picture cannot be read any more, or is empty: between processes an exception loses its cause.
    """
    sources = [Source(**source) for source in json.loads(row["item"]).get("sources", ())]
    try:
        return {"item": row["item"], "pixels": b"".join(_pixels(source).tobytes() for source in sources), "error": ""}
    except (OSError, ValueError) as error:
        return {"item": row["item"], "pixels": b"", "error": str(error)}


def _pixels(source: Source) -> np.ndarray:
    data = Path(source.path).read_bytes()
    if xxhash.xxh3_128_hexdigest(data) != source.content:
        raise ValueError(f"{source.path} changed while preprocess ran; start it again")
    return fit_image(decode_image(data), source.height, source.width, source.fit)
