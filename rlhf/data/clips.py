"""Video files → uint8 arrays and back, by PyAV: some frames of a clip, in one box; a file is decoded from its beginning.

A row of a data set may say which part of its videos is meant: "clip": {"first": 24, "frames": 61, "box": [0, 640, 20, 340]} are
61 frames from number 24 on (counted from 0), columns 0 to 639 and rows 20 to 339. Of these the first is taken, and then every
stride-th. Left out: sound, videos that are stored turned, more than 8 bits per channel.

Shapes: F frames, H W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import xxhash

from rlhf.errors import Refused
from rlhf.runs.durable import durable
from rlhf.types import Clip

CLIPS = (".mp4", ".mov", ".mkv", ".webm")
FPS = 16
"""Of videos that are written: what Wan's are shown at."""
_CHUNK = 16 * 2**20


class ClipError(Refused):
    """A file is no video that is read, or has too few frames."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How examples that are videos are used."""

    frames: int
    """F; 1: examples are pictures."""
    stride: int = 1


def content_of(file: Path) -> str:
    """xxh3-128 of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_clip(file: Path, clip: Clip, count: int) -> np.ndarray:
    """uint8 (F, H, W, 3): `count` frames of a clip. Raises: OSError, ClipError."""
    last, found = clip.first + (count - 1) * clip.stride, list[np.ndarray]()
    for number, frame in enumerate(_frames(file)):
        if number >= clip.first and (number - clip.first) % clip.stride == 0:
            found.append(_boxed(frame, clip.box))
        if number == last:
            return np.stack(found)
    raise ClipError(f"has {number + 1} frames, but number {last} (from 0) is asked for")


def _frames(file: Path) -> Iterator[np.ndarray]:
    """All frames, uint8 (H, W, 3). Raises: OSError, ClipError."""
    try:
        with av.open(str(file), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ClipError("holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number == 0 and frame.rotation:
                    raise ClipError(f"is stored turned by {frame.rotation}°")
                yield frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise ClipError(f"cannot be decoded: {error.strerror}") from error


def _boxed(frame: np.ndarray, box: Sequence[int] | None) -> np.ndarray:
    """Raises ClipError for a box that is not inside."""
    if box is None:
        return frame
    (left, right, top, bottom), (height, width) = box, frame.shape[:2]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ClipError(f"is {height} × {width} pixels, which does not hold the box {list(box)}")
    return frame[top:bottom, left:right]


def clip_of(given: Any, asked: Asked) -> Clip:
    """What a row's "clip" means. Raises ClipError, whose message follows its name."""
    if given is None:
        return Clip(stride=asked.stride)
    if not isinstance(given, dict) or (unknown := given.keys() - {"first", "frames", "box"}):
        what = f"has {min(unknown)!r}" if isinstance(given, dict) else f"is {given!r}"
        raise ClipError(
            f'{what}; write {{"first": 0, "frames": 81, "box": [left, right, top, bottom]}}, of which any may be absent'
        )
    first, frames, box = given.get("first", 0), given.get("frames"), given.get("box")
    corners = box if isinstance(box, list) else [] if box is None else [box]
    numbers = [first, *([] if frames is None else [frames]), *corners]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(corners) not in (0, 4):
        raise ClipError(f"is {given}; give whole numbers from 0 on, four of them for a box")
    need = (asked.frames - 1) * asked.stride + 1
    if frames is not None and frames < need:
        what = f"has {frames} frames, but {asked.frames} of them, every {asked.stride}. one, are {need}"
        raise ClipError(f"{what}; leave the row out, or lower model.frames or data.frame_stride")
    return Clip(first=first, stride=asked.stride, box=tuple(box) if box else None)


def write_mp4(file: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """uint8 (F, H, W, 3) as H.264, whole or not at all; sides that are odd lose a row or column."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with durable(file) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[:, :height, :width]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
