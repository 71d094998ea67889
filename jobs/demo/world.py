"""The demo's data: product photos, their metadata and a click log, all generated here.

    images/  train_metadata.jsonl  eval_metadata.jsonl  ctr_metadata.csv      what preference training reads
    variants/  ctr_train.csv  ctr_test.csv                                    the click log

The click log is simulated: a picture's true click rate rises with its warmth and brightness and differs between items;
impressions and clicks are binomial draws. So it is known what a click model should find, and preference training on it should
make pictures visibly warmer and brighter. Deterministic in the seed; built once.
"""

import csv
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.demo.photos import Colour, photo, relight
from rlhf.data.prompts import ITEM_COLUMNS
from rlhf.types import Item

FORMAT = 1
TRAIN, EVAL, VARIANTS = 24, 6, 3
SIZES = ((288, 192), (240, 240), (288, 216), (216, 288))
"""(H, W), so that fitting has something to do."""

PRODUCTS: tuple[tuple[str, str, str, Colour], ...] = (
    ("Red apples", "Fruit", "fruit", (0.78, 0.13, 0.12)),
    ("Oranges", "Fruit", "fruit", (0.95, 0.52, 0.1)),
    ("Limes", "Fruit", "fruit", (0.45, 0.68, 0.2)),
    ("Plums", "Fruit", "fruit", (0.42, 0.16, 0.36)),
    ("Lemons", "Fruit", "fruit", (0.95, 0.83, 0.2)),
    ("番茄汤", "Soup", "soup", (0.82, 0.28, 0.12)),
    ("Pumpkin soup", "Soup", "soup", (0.92, 0.58, 0.16)),
    ("牛肉面", "Noodles", "soup", (0.62, 0.38, 0.18)),
    ("Oat milk", "Dairy", "boxes", (0.84, 0.78, 0.66)),
    ("Tea box", "Drinks", "boxes", (0.25, 0.46, 0.36)),
)
PLACES = (("杭州", "老王小铺"), ("上海", "兰州饭店"), ("北京", "蜀香居"), ("Utrecht", "Corner shop"))
INSTRUCTIONS = (
    "Make the food look fresh and appetizing.",
    "Give the picture a warm, sunny light.",
    "Brighten the photo and keep the product unchanged.",
    "",
    "Blur the background a little.",
    "让颜色更鲜艳。",
)


def build(folder: str | Path, seed: int = 0) -> Path:
    """Write the data into `folder` unless it is complete there already, and return the folder.

    Other files in the folder are not touched; the marker of a complete folder is written last.
    """
    folder = Path(folder)
    marker = folder / "world.json"
    content = json.dumps({"format": FORMAT, "seed": seed})
    if marker.is_file() and marker.read_text() == content:
        return folder
    marker.unlink(missing_ok=True)
    for name in ("images", "variants"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    rows, metadata, clicks = list[dict[str, str]](), list[dict[str, str]](), list[dict[str, object]]()
    for index in range(TRAIN + EVAL):
        image_id, random = str(10001 + index), np.random.default_rng((seed, index))
        food_name, food_type, scene, colour = PRODUCTS[index % len(PRODUCTS)]
        item = dict(zip(ITEM_COLUMNS, (food_name, food_type, *PLACES[index % len(PLACES)]), strict=True))
        picture = photo(scene, colour, *SIZES[index % len(SIZES)], random)
        file = f"images/{image_id}.{'png' if index % 4 == 3 else 'jpg'}"
        Image.fromarray(picture).save(folder / file, quality=92)  # PNG has none
        rows.append({"image_id": image_id, "prompt": INSTRUCTIONS[index % len(INSTRUCTIONS)], "image": file})
        metadata.append({"image_id": image_id, **item})
        clicks.append(_clicks(file, picture, item, random))
        for variant in range(1, VARIANTS + 1):
            light = random.uniform(-0.9, 0.9), random.uniform(0.7, 1.25)
            relit = (relight(picture / 255, *light) * 255).astype(np.uint8)
            file = f"variants/{image_id}_{variant}.jpg"
            Image.fromarray(relit).save(folder / file, quality=92)
            clicks.append(_clicks(file, relit, item, random))
    for name, part in (("train", slice(TRAIN)), ("eval", slice(TRAIN, None))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[part]]
        (folder / f"{name}_metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    _write_csv(folder / "ctr_metadata.csv", metadata)
    _write_csv(folder / "ctr_train.csv", clicks[: TRAIN * (1 + VARIANTS)])
    _write_csv(folder / "ctr_test.csv", clicks[TRAIN * (1 + VARIANTS) :])
    marker.write_text(content)
    return folder


def true_rate(picture: np.ndarray, item: Item) -> float:
    """The simulated probability of a click on a uint8 (H, W, 3) picture of an item."""
    red, green, blue = picture.reshape(-1, 3).mean(axis=0) / 255
    warmth, brightness = red - blue, (red + green + blue) / 3
    names = [name for name, *_ in PRODUCTS]
    taste = 0.5 * math.sin(2.4 * names.index(item["food_name"]))
    return float(1 / (1 + math.exp(-(-2.9 + 3.0 * (warmth - 0.15) + 3.0 * (brightness - 0.5) + taste))))


def _clicks(file: str, picture: np.ndarray, item: Item, random: np.random.Generator) -> dict[str, object]:
    impressions = int(random.integers(300, 900))
    clicks = int(random.binomial(impressions, true_rate(picture, item)))
    log = {"pv_ctr": f"{clicks / impressions:.6f}", "impressions": impressions, "clicks": clicks}
    return {"image_url": file, **item, **log}


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
