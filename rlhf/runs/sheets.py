"""Contact sheets: rows of pictures, each over its caption, in a font that knows Latin, Cyrillic, Chinese, Japanese and Korean.

Left out: scripts that are written from right to left or need shaping (Arabic, Devanagari), and emoji.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LONGEST, SHORTEST, LINE = 8, 384, 192, 16
FONT = Path(__file__).parent / "font" / "wqy-microhei.ttf"
PIECES = re.compile(r"\s+|[\u2e80-\uffff]|[^\s\u2e80-\uffff]+")
"""Where a line may end: at blanks, and beside every character of a script that has none."""


Cell = tuple[np.ndarray, str]
"""A picture, uint8 (H, W, 3), and its caption."""


def strip(media: np.ndarray) -> np.ndarray:
    """The picture that uint8 (F, H, W, 3) is or, of a video, its first, middle and last frame side by side."""
    if len(media) == 1:
        return media[0]
    return np.concatenate([media[0], media[len(media) // 2], media[-1]], axis=1)


def contact_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Pictures scaled alike to at most 384 pixels (tiny ones up to 192), each over its caption.

    A line of a caption that is wider than its picture goes on in the next.
    """
    largest = max(max(image.shape[:2]) for row in rows for image, _ in row)
    factor = min(max(largest, SHORTEST), LONGEST) / largest
    scaled = [[(_scaled(image, factor), caption) for image, caption in row] for row in rows]
    width = max(picture.width for row in scaled for picture, _ in row)
    cells = [[(picture, [*wrapped(caption, width)]) for picture, caption in row] for row in scaled]
    height = max(picture.height for row in scaled for picture, _ in row)
    heights = [height + LINE * max(len(lines) for _, lines in row) + 2 * MARGIN for row in cells]
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for row, row_height in zip(cells, heights, strict=True):
        for column, (picture, lines) in enumerate(row):
            x = MARGIN + column * (width + MARGIN)
            sheet.paste(picture, (x, y))
            for number, line in enumerate(lines):
                draw.text((x, y + height + 4 + LINE * number), line, fill="black", font=_font())
        y += row_height
    return sheet


def wrapped(text: str, width: float) -> Iterator[str]:
    """The lines of a text, none of them wider than `width` pixels unless one character is."""
    for line in text.split("\n"):
        done = ""
        for piece in _pieces(line, width):
            if done and _font().getlength((done + piece).rstrip()) > width:
                yield done.rstrip()
                done = ""
            done += piece if done else piece.lstrip()
        yield done.rstrip()


def _pieces(line: str, width: float) -> Iterator[str]:
    """What stays together in a line: words, of which one that is wider than `width` is cut into characters."""
    for piece in PIECES.findall(line):
        if _font().getlength(piece) > width:
            yield from piece
        else:
            yield piece


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, 12)


def _scaled(image: np.ndarray, factor: float) -> Image.Image:
    picture = Image.fromarray(image)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
