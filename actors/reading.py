"""Tasks that read pictures for the judges, beside the data: what they found out first, then the pictures one by one.

Kept apart from those who start them because a task's process imports this module: it comes without diffusers and the
families.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from rlhf.data.media import decode_image
from rlhf.data.sources import file_bytes
from rlhf.evaluation.duels import source_distance
from rlhf.types import Source

READER_CPUS = 0.1


def start_painted(files: Sequence[tuple[Path, Path | None]]) -> list[ray.ObjectRef]:
    """Start reading (picture, source or none) files: a reference to their source distances, then one to each picture."""
    return _painted.options(num_returns=1 + len(files)).remote(list(files))


def start_sources(sources: Sequence[Source]) -> list[ray.ObjectRef]:
    """Start reading pictures of a data set at their own size: their (H, W), then the pictures."""
    return _sources.options(num_returns=1 + len(sources)).remote(list(sources))


@ray.remote(num_cpus=READER_CPUS, max_retries=2)
def _painted(files: list[tuple[Path, Path | None]]) -> tuple[Any, ...]:
    pictures, distances = [], []
    for file, source in files:
        picture = decode_image(file.read_bytes())
        pictures.append(picture)
        distances.append(None if source is None else source_distance(picture, decode_image(source.read_bytes())))
    return distances, *pictures


@ray.remote(num_cpus=READER_CPUS, max_retries=2)
def _sources(sources: list[Source]) -> tuple[Any, ...]:
    pictures = [decode_image(file_bytes(source)) for source in sources]
    return [picture.shape[:2] for picture in pictures], *pictures
