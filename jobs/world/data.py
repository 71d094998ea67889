"""The data of the miniature world, drawn and not downloaded: photos, metadata, a click log and pairs of photos before and after.

    images/  train_metadata.jsonl  eval_metadata.jsonl  ctr_metadata.csv      what preference training reads
    edits/control_images/  edits/training_images/                             pairs of an edit that the model does not know yet
    clicks/  ctr_train.csv  ctr_test.csv                                      the click log

Impressions and clicks are binomial draws of `truth.true_rate`, of which models see no more. Deterministic in the seed.
"""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.world.looks import INSTRUCTIONS, KINDS, SATURATION, draw_source, edit, render, to_uint8
from jobs.world.photos import photo
from jobs.world.truth import PRODUCTS, Product, true_rate
from rlhf.data.prompts import ITEM_COLUMNS
from rlhf.errors import Refused
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import made
from rlhf.types import seed_from

PACKAGE = Path(__file__).parent / "package"
"""The models that `jobs.build_world` trained, as they are shipped, with their manifest."""
FORMAT = 3
MARKER = "world.json"
SIZE = 64
"""Height and width of every photo, in pixels."""
TRAIN, EVAL, PAIRS = 96, 96, 20
CLICKED, CLICK_TEST, LOOKS = 440, 44, 6
"""Items of the click log, and pictures of each under different looks."""
NEW_EDIT = "Take the colours away."
"""Of the pairs, in words that the edit model's encoder knows."""
PLACES = (("杭州", "老王小铺"), ("上海", "兰州饭店"), ("北京", "蜀香居"), ("Utrecht", "Corner shop"))


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Photos of products, before any look."""

    photos: Tensor
    """uint8 (B, 2, H, W, 3), see `photos.photo`."""
    products: tuple[Product, ...]

    def __len__(self) -> int:
        return len(self.products)

    def take(self, rows: Tensor) -> "Shots":
        return Shots(photos=self.photos[rows], products=tuple(self.products[row] for row in rows.tolist()))


def shoot(count: int, *what: int | str) -> Shots:
    """`count` photos of the products in turn. what: tells these photos from others, for the seed."""
    products = tuple(PRODUCTS[index % len(PRODUCTS)] for index in range(count))
    pictures = [
        photo(product.scene, product.colour, SIZE, SIZE, np.random.default_rng(seed_from(*what, index)))
        for index, product in enumerate(products)
    ]
    return Shots(photos=torch.from_numpy(np.stack(pictures)), products=products)


def random_of(*what: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(*what))


def write_photos(folder: Path, seed: int = 0) -> Path:
    """Write photos, metadata and pairs into `folder` unless they are complete there already, and return the folder.

    Other files are not touched. Raises: Refused where the folder cannot be made, or holds such names of somebody else.
    """
    made(folder, "--dir")
    marker, names = folder / MARKER, ("images", "edits")
    content, whole = ({"format": FORMAT, "seed": seed, "complete": complete} for complete in (False, True))
    if marker.is_file():
        if marker.read_text() == json.dumps(whole):
            return folder
    elif theirs := [name for name in names if (folder / name).exists()]:
        raise Refused(
            f"{folder} holds {' and '.join(theirs)}, which would be overwritten, and no {MARKER} says that they are of a "
            "miniature world: give another folder"
        )
    write_durably(marker, json.dumps(content))
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
    _write_prompts(folder, seed)
    _write_edits(folder / "edits", seed)
    write_durably(marker, json.dumps(whole))
    return folder


def _write_prompts(folder: Path, seed: int) -> None:
    shots, random = shoot(TRAIN + EVAL, seed, "prompts"), random_of(seed, "prompts")
    pictures = to_uint8(render(shots.photos, draw_source(len(shots), random)))
    words = [text for kind in INSTRUCTIONS.values() for text in kind.trained]
    order = np.random.default_rng(seed).permutation(len(shots)).tolist()
    rows, metadata = list[dict[str, str]](), list[dict[str, str]]()
    (folder / "images").mkdir(parents=True)
    for index, (picture, product) in enumerate(zip(pictures, shots.products, strict=True)):
        image_id = str(10001 + index)
        file = f"images/{image_id}.{'png' if index % 4 else 'jpg'}"
        Image.fromarray(picture.numpy()).save(folder / file, quality=95)  # PNG has none
        rows.append({"image_id": image_id, "prompt": words[order[index] % len(words)], "image": file})
        metadata.append({"image_id": image_id, **item_of(product, index)})
    for name, part in (("train", slice(TRAIN)), ("eval", slice(TRAIN, None))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[part]]
        (folder / f"{name}_metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    _write_csv(folder / "ctr_metadata.csv", metadata)


def write_clicks(folder: Path, seed: int) -> None:
    """A click log and its pictures, in a folder that is there: each item under looks of which half are edits."""
    shots, random = shoot(CLICKED, seed, "clicks"), random_of(seed, "clicks")
    rows, draws = list[dict[str, object]](), np.random.default_rng(seed_from(seed, "clicks"))
    shown = list[Tensor]()
    for number in range(LOOKS):
        look = draw_source(len(shots), random)
        kinds = torch.randint(len(KINDS), (len(shots),), generator=random)
        shown.append(to_uint8(render(shots.photos, look if number % 2 else edit(look, kinds, random))))
    rates = [true_rate(pictures, shots.products) for pictures in shown]
    for index, product in enumerate(shots.products):
        for number, (pictures, rate) in enumerate(zip(shown, rates, strict=True)):
            file = f"{index:03d}_{number}.png"
            Image.fromarray(pictures[index].numpy()).save(folder / file)
            impressions = int(draws.integers(300, 900))
            clicks = int(draws.binomial(impressions, rate[index].item()))
            log = {"pv_ctr": f"{clicks / impressions:.6f}", "impressions": impressions, "clicks": clicks}
            rows.append({"image_url": file, **item_of(product, index), **log})
    first = (CLICKED - CLICK_TEST) * LOOKS
    _write_csv(folder / "ctr_train.csv", rows[:first])
    _write_csv(folder / "ctr_test.csv", rows[first:])


def _write_edits(folder: Path, seed: int) -> None:
    shots, random = shoot(PAIRS, seed, "edits"), random_of(seed, "edits")
    look = draw_source(PAIRS, random)
    grey = look.clone()
    grey[:, SATURATION] = 0
    sides = (render(shots.photos, look), render(shots.photos, grey))
    sources, targets = (to_uint8(pictures).numpy() for pictures in sides)
    control, training = folder / "control_images", folder / "training_images"
    for side in (control, training):
        side.mkdir(parents=True)
    for index in range(PAIRS):
        name = f"image_{index + 1:03d}"
        Image.fromarray(sources[index]).save(control / f"{name}.jpg", quality=95)
        Image.fromarray(targets[index]).save(training / f"{name}.png")
        (training / f"{name}.txt").write_text(NEW_EDIT + "\n")


def item_of(product: Product, index: int) -> dict[str, str]:
    return dict(zip(ITEM_COLUMNS, (product.name, product.type, *PLACES[index % len(PLACES)]), strict=True))


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
