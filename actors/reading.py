"""Reads an evaluation's pictures for the judges, and measures them.

Kept apart from `actors.scoring` because its process imports this module: it comes without diffusers and the families.
"""

from pathlib import Path

import numpy as np

from rlhf.data.media import decode_image
from rlhf.evaluation.duels import source_distance


class Reader:
    """Reads painted pictures. One actor and not tasks: Ray would start a process for each that waits."""

    def read(self, file: Path, source: Path | None) -> tuple[np.ndarray, float | None]:
        """uint8 (H, W, 3) and its source distance."""
        picture = decode_image(file.read_bytes())
        return picture, None if source is None else source_distance(picture, decode_image(source.read_bytes()))
