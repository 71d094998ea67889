"""What a run writes down for people: scalars as JSON lines and in TensorBoard, and contact sheets.

metrics.jsonl is the record (one row per call, flushed, {"step": …, "area/name": …}); TensorBoard is a view of it. Left out:
remote trackers. Sheets use Pillow's built-in font, no files; they are drawn beside the data (`actors/reporting.py`).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z0-9_]+")
MARGIN, LONGEST, SHORTEST = 8, 384, 192


class FileTracker:
    """`folder`/metrics.jsonl and `folder`/tensorboard/."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        """`resumed_at`: the committed step that the run goes on from; TensorBoard then hides what it drew after it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        undone = None if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=undone)

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
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._rows.close()
        self._board.close()


def contact_sheet(rows: Sequence[Sequence[tuple[np.ndarray, str]]]) -> Image.Image:
    """Pictures, uint8 (H, W, 3), scaled alike to at most 384 pixels (tiny ones up to 192), each over the lines of its caption."""
    font = ImageFont.load_default(12)
    largest = max(max(image.shape[:2]) for row in rows for image, _ in row)
    target = min(max(largest, SHORTEST), LONGEST)
    lines = max(caption.count("\n") + 1 for row in rows for _, caption in row)
    scaled = [[(_scaled(image, target / largest), caption) for image, caption in row] for row in rows]
    width = max(picture.width for row in scaled for picture, _ in row)
    height = max(picture.height for row in scaled for picture, _ in row)
    cell_height = height + 16 * lines + 2 * MARGIN
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(rows) * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(scaled):
        for c, (picture, caption) in enumerate(row):
            x, y = MARGIN + c * (width + MARGIN), MARGIN + r * cell_height
            sheet.paste(picture, (x, y))
            for number, line in enumerate(caption.split("\n")):
                draw.text((x, y + height + 4 + 16 * number), _cut(line, font, width), fill="black", font=font)
    return sheet


def _scaled(image: np.ndarray, factor: float) -> Image.Image:
    picture = Image.fromarray(image)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
