"""What a run writes down for people: scalars as JSON lines and in TensorBoard.

metrics.jsonl is the record (one row per call, flushed, {"step": …, "area/name": …}); TensorBoard is a view of it. A
value that is not finite is refused instead of written: it would make the row unreadable for JSON, and it hides a bug.
Left out: remote trackers, and pictures, which are drawn beside the data (`actors/reporting.py`).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9_]+")


class FileTracker:
    """`folder`/metrics.jsonl and `folder`/tensorboard/."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        """`resumed_at`: the committed step that the run goes on from; TensorBoard then hides what it drew after it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        purge = None if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        refuse_unwritable(scalars)
        row = {"step": step} | {name: float(value) for name, value in scalars.items()}
        self._rows.write(json.dumps(row, allow_nan=False) + "\n")
        self._rows.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, float(value), step)
        self._board.flush()

    def close(self) -> None:
        self._rows.close()
        self._board.close()


def refuse_unwritable(scalars: Mapping[str, float]) -> None:
    """Raise ValueError, before anything is written, for a name that is not `area/name` or a value not finite."""
    for name, value in scalars.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"scalar {name!r}: names are area/name in lower case, such as train/loss")
        if not math.isfinite(value):
            raise ValueError(f"scalar {name!r} is {float(value)}: only finite values are recorded")
