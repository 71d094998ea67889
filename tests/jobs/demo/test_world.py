"""The generated world is readable by the real readers, has a click log with a truth in it, and is built once."""

import csv

import numpy as np
import pytest

from jobs.demo.world import EVAL, TRAIN, VARIANTS, build, true_rate
from rlhf.data.media import decode_image
from rlhf.data.prompts import read_prompts
from rlhf.types import Geometry


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world") / "world")


def test_the_real_readers_accept_it(world):
    metadata = world / "ctr_metadata.csv"
    train, held_out = (
        read_prompts(
            world / f"{name}_metadata.jsonl",
            "crop",
            lambda height, width: Geometry(height=height, width=width),
            item_metadata=metadata,
        ).prompts
        for name in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (TRAIN, EVAL)
    assert not {row.key for row in train} & {row.key for row in held_out}
    assert len({row.sources[0].content for row in (*train, *held_out)}) == TRAIN + EVAL
    assert len({row.geometry for row in train}) > 1 and "" in {row.instruction for row in train}


def clicks(world, name):
    with open(world / name, newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_click_log_follows_the_true_rate(world):
    rows = clicks(world, "ctr_train.csv")
    assert len(rows) == TRAIN * (VARIANTS + 1) and len(clicks(world, "ctr_test.csv")) == EVAL * (VARIANTS + 1)
    errors = []
    for row in rows:
        picture = decode_image((world / row["image_url"]).read_bytes())
        item = {field: row[field] for field in ("food_name", "food_type", "city_name", "shop_name")}
        rate, impressions = true_rate(picture, item), int(row["impressions"])
        assert float(row["pv_ctr"]) == pytest.approx(int(row["clicks"]) / impressions, abs=1e-6)
        errors.append((int(row["clicks"]) - rate * impressions) / (rate * (1 - rate) * impressions) ** 0.5)
    assert 0.7 < np.std(errors) < 1.4 and abs(np.mean(errors)) < 0.4  # standard normal, if the log is what it says
    observed = [float(row["pv_ctr"]) for row in rows]
    assert 0.02 < np.mean(observed) < 0.12 and np.std(observed) > 0.01


def test_warmer_and_brighter_is_clicked_more():
    item = {"food_name": "Lemons", "food_type": "Fruit", "city_name": "", "shop_name": ""}
    grey = np.full((8, 8, 3), 120, np.uint8)
    warm = grey + np.array([20, 0, -20]).astype(np.uint8)
    assert true_rate(warm, item) > true_rate(grey, item) and true_rate(grey + np.uint8(30), item) > true_rate(
        grey, item
    )


def test_it_is_built_once_deterministic_and_leaves_other_things_alone(world, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    assert build(world) == world
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before
    (tmp_path / "kontext").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/half.jpg").write_bytes(b"of a build that was cut off")
    again = build(tmp_path)
    for file in world.rglob("*"):
        if file.is_file():
            assert (again / file.relative_to(world)).read_bytes() == file.read_bytes()
    assert (tmp_path / "kontext").is_dir() and not (tmp_path / "images/half.jpg").exists()
