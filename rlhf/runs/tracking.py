"""What a run writes down for people: scalars as JSON lines and in TensorBoard.

metrics.jsonl is the record (one row per call, flushed, {"step": …, "area/name": …}); TensorBoard is a view of it, as is
`rlhf.runs.wandb_run`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9_]+")


class FileTracker:
    """`folder`/metrics.jsonl and, with `board`, `folder`/tensorboard/."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None, board: bool = True) -> None:
        """`resumed_at`: the committed step that the run goes on from; TensorBoard then hides what it drew after it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        undone = None if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=undone) if board else None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises ValueError, before anything is written, for a name that is not `area/name`, and for a value that is not finite:
        JSON could not read the row, and it hides a bug."""
        values = {name: float(value) for name, value in scalars.items()}
        for name, value in values.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"scalar {name!r}: names are area/name in lower case, such as train/loss")
            if not math.isfinite(value):
                raise ValueError(f"scalar {name!r} is {value}: only finite values are recorded")
        self._rows.write(json.dumps({"step": step} | values, allow_nan=False) + "\n")
        self._rows.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        self._rows.close()
        if self._board:
            self._board.close()
