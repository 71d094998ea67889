"""Clips of the miniature world in OpenS2V's form: a coloured shape that moves over a grey ground, its mask and its caption.

Shapes: F frames, H W pixels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.clips import write_mp4

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
}
SHAPES = ("square", "disc", "diamond")


@dataclass(frozen=True, kw_only=True)
class Moving:
    """One clip."""

    colour: str
    shape: str
    radius: float
    """Pixels."""
    start: tuple[float, float]
    """(down, across) of its middle, in pixels."""
    speed: tuple[float, float]
    """Pixels a frame."""
    ground: int
    """Grey."""

    def masks(self, frames: int, height: int, width: int) -> np.ndarray:
        """bool (F, H, W)."""
        down, across = np.mgrid[:height, :width]
        time = np.arange(frames)[:, None, None]
        y, x = (
            np.abs(grid - start - time * speed)
            for grid, start, speed in zip((down, across), self.start, self.speed, strict=True)
        )
        distance = {"square": np.maximum(y, x), "disc": np.hypot(y, x), "diamond": y + x}[self.shape]
        return distance <= self.radius

    def frames(self, frames: int, height: int, width: int) -> np.ndarray:
        """uint8 (F, H, W, 3)."""
        masks = self.masks(frames, height, width)[..., None]
        return np.where(masks, np.array(COLOURS[self.colour], np.uint8), np.uint8(self.ground))


def draw(count: int, frames: int, height: int, width: int, seed: int) -> Iterator[Moving]:
    """Clips whose shapes stay inside, of colours and shapes in turn."""
    random = np.random.default_rng(seed)
    for i in range(count):
        radius = random.uniform(0.2, 0.3) * min(height, width)
        ends = [tuple(random.uniform(radius, side - radius) for side in (height, width)) for _ in range(2)]
        speed = tuple((end - start) / frames for start, end in zip(*ends, strict=True))
        colour = [*COLOURS][i % len(COLOURS)]
        yield Moving(
            colour=colour,
            shape=SHAPES[i // len(COLOURS) % len(SHAPES)],
            radius=radius,
            start=(ends[0][0], ends[0][1]),
            speed=(speed[0], speed[1]),
            ground=int(random.integers(90, 200)),
        )


def write_part(folder: Path, clips: Sequence[Moving], *, frames: int, height: int, width: int) -> Path:
    """Write folder/part.json and folder/videos/I.mp4 of clips, and return the JSON. Captions say neither colour nor shape."""
    (folder / "videos").mkdir(parents=True)
    entries = {}
    for i, clip in enumerate(clips):
        write_mp4(folder / "videos" / f"{i}.mp4", clip.frames(frames, height, width))
        entries[f"clip{i}"] = entry(clip, f"{i}.mp4", frames, height, width)
    (folder / "part.json").write_text(json.dumps(entries))
    return folder / "part.json"


def entry(clip: Moving, path: str, frames: int, height: int, width: int) -> dict[str, Any]:
    """As OpenS2V's annotation says it, with the mask of the first frame."""
    (mask,) = clip.masks(1, height, width)
    return {
        "metadata": {
            "path": path,
            "face_cut": [0, frames],
            "crop": [0, width, 0, height],
            "face_cap_qwen": "A thing moves over a grey ground.",
            "fps": 16.0,
            "num_frames": frames,
            "resolution": {"height": height, "width": width},
        },
        "word_tags": {"background": ["ground"], "subject": [clip.shape]},
        "annotation": {
            "ann_frame_data": {"ann_frame_idx": 0, "annotations": [{"class_name": clip.shape, "aes_score": 5.0}]},
            "mask_map": {"1": {"class_name": clip.shape}},
            "mask_annotation": {"0": {"1": {"size": [height, width], "counts": run_lengths(mask)}}},
        },
    }


def run_lengths(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of bool (H, W): see `rlhf.data.opens2v.mask_of`."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *([0] if flat[0] else []), *edges, len(flat)]).tolist()
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr((digit | 32 if more else digit) + 48)
    return text
