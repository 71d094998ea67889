"""Tasks that read pictures for the judges, beside the data.

A module of its own because a task's process imports it: it comes without diffusers and the families.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from rlhf.data.media import decode_image
from rlhf.data.sources import open_source
from rlhf.evaluation.duels import source_distance
from rlhf.types import Source

READER_CPUS = 0.1
P = TypeVar("P")


def start(read: Callable[[P], tuple[Any, np.ndarray]], places: Sequence[P]) -> list[ray.ObjectRef]:
    """Start a task: a reference to what `read` found out at each place, then one to each picture."""
    return _read.options(num_returns=1 + len(places)).remote(read, list(places))


@ray.remote(num_cpus=READER_CPUS, max_retries=2)
def _read(read: Callable[[P], tuple[Any, np.ndarray]], places: list[P]) -> tuple[Any, ...]:
    found, pictures = zip(*map(read, places), strict=True)
    return found, *pictures


def painted(place: tuple[Path, Path | None]) -> tuple[float | None, np.ndarray]:
    """A picture, and its distance from its source where there is one."""
    file, source = place
    picture = decode_image(file.read_bytes())
    return (None if source is None else source_distance(picture, decode_image(source.read_bytes()))), picture


def of_data_set(source: Source) -> tuple[tuple[int, int], np.ndarray]:
    """A picture at its own size, and its (H, W)."""
    (picture,) = open_source(source)
    return picture.shape[:2], picture
