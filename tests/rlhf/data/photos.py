"""A small set of real picture files with its metadata, for tests to break."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from rlhf.data.media import decode_image, fit_image
from rlhf.types import Fit

COLUMNS = ("image_id", "food_name", "food_type", "city_name", "shop_name")


def picture(seed: int, height: int = 48, width: int = 40) -> np.ndarray:
    """uint8 (H, W, 3): a smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def load(file: str | Path, height: int, width: int, fit: Fit) -> np.ndarray:
    """uint8 (H, W, 3) of a picture file at a size."""
    return fit_image(decode_image(Path(file).read_bytes()), height, width, fit)


def write(folder: Path, count: int = 3, size: tuple[int, int] = (48, 40)) -> Path:
    """`count` good rows with PNG pictures of (H, W) and metadata; returns the JSONL's path."""
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(i, *size)).save(folder / f"images/{i}.png")
    write_rows(folder, [{"image_id": str(i), "prompt": f"edit {i}", "image": f"images/{i}.png"} for i in range(count)])
    write_items(folder, [[str(i), f"food {i}", "type", "上海", "shop, the"] for i in range(count)])
    return folder / "train_metadata.jsonl"


def write_rows(folder: Path, rows: list) -> None:
    """The JSONL: objects as JSON, strings as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "train_metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_items(
    folder: Path, rows: list[list[str]], encoding: str = "utf-8", header: tuple[str, ...] = COLUMNS
) -> None:
    with open(folder / "ctr_metadata.csv", "w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows([header, *rows])
