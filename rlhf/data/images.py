"""A source picture of any size → the exact (H, W) that the model works on.

`crop` fills the frame and cuts the rest off evenly, `pad` shows all of it on white, `stretch` changes the aspect.
Resampling is Lanczos, as in diffusers' `VaeImageProcessor`. Left out: saliency-aware cropping.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from rlhf.rewards.images import check_array, decode_image

Fit = Literal["crop", "pad", "stretch"]
Box = tuple[float, float, float, float]

KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""(width, height) that Kontext was trained on: diffusers' PREFERRED_KONTEXT_RESOLUTIONS, copied as its import takes
seconds; a test compares the two."""


def kontext_size(height: int, width: int) -> tuple[int, int]:
    """(H, W) of Kontext's own sizes that is nearest to a picture's aspect, chosen as `FluxKontextPipeline` does."""
    aspect = width / height
    _, nearest_width, nearest_height = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_SIZES)
    return nearest_height, nearest_width


def load_image(path: str | Path, height: int, width: int, fit: Fit) -> np.ndarray:
    """uint8 (H, W, 3) of a picture file. Raises: OSError, ImageError."""
    return fit_image(decode_image(Path(path).read_bytes()), height, width, fit)


CENTRE = (0.5, 0.5)


def fit_image(image: np.ndarray, height: int, width: int, fit: Fit, crop: tuple[float, float] = CENTRE) -> np.ndarray:
    """uint8 (H, W, 3) of a uint8 picture of any size; one that has the size already is returned unchanged.

    `crop`: where a "crop" lies in what it may cut off, (down, across), each 0 … 1.
    """
    check_array(image)
    if image.shape[:2] == (height, width):
        return image
    picture = Image.fromarray(image)
    if fit == "stretch":
        return _resize(picture, width, height)
    scale = (max if fit == "crop" else min)(width / picture.width, height / picture.height)
    if fit == "crop":
        w, h = width / scale, height / scale
        top, left = (picture.height - h) * crop[0], (picture.width - w) * crop[1]
        box = (max(left, 0.0), max(top, 0.0), min(left + w, picture.width), min(top + h, picture.height))
        return _resize(picture, width, height, box)
    if fit == "pad":
        w, h = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        top, left = (height - h) // 2, (width - w) // 2
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        canvas[top : top + h, left : left + w] = _resize(picture, w, h)
        return canvas
    raise ValueError(f"data.fit = {fit!r}; use crop, pad or stretch")


def _resize(picture: Image.Image, width: int, height: int, box: Box | None = None) -> np.ndarray:
    return np.array(picture.resize((width, height), Image.Resampling.LANCZOS, box=box), dtype=np.uint8)
