"""Contact sheets: rows of pictures with captions, for eyes. Uses Pillow's built-in font, no files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LONGEST, SHORTEST = 8, 384, 192


@dataclass(frozen=True, kw_only=True)
class Cell:
    image: np.ndarray
    """uint8 (H, W, 3)."""
    caption: str
    """Lines below the picture; long ones are cut."""


def contact_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """All cells scaled alike to at most 384 pixels (tiny ones up to at least 192), captions below each picture."""
    font = ImageFont.load_default(12)
    largest = max(max(cell.image.shape[:2]) for row in rows for cell in row)
    target = min(max(largest, SHORTEST), LONGEST)
    lines = max(cell.caption.count("\n") + 1 for row in rows for cell in row)
    pictures = [[_scaled(cell.image, target / largest) for cell in row] for row in rows]
    width = max(picture.width for row in pictures for picture in row)
    height = max(picture.height for row in pictures for picture in row)
    cell_height = height + 16 * lines + 2 * MARGIN
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(rows) * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, scaled) in enumerate(zip(rows, pictures, strict=True)):
        for c, (cell, picture) in enumerate(zip(row, scaled, strict=True)):
            x, y = MARGIN + c * (width + MARGIN), MARGIN + r * cell_height
            sheet.paste(picture, (x, y))
            for number, line in enumerate(cell.caption.split("\n")):
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
