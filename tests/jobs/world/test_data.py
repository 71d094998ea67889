"""The drawn data is readable by the real readers, has a click log with a truth in it, and is built once."""

import csv

import numpy as np
import pytest

from jobs.world.data import CLICK_TEST, CLICKED, EVAL, LOOKS, PAIRS, SIZE, TRAIN, write_clicks, write_photos
from jobs.world.truth import true_rate_judge
from rlhf.data.media import decode_image
from rlhf.data.prompts import read_prompts
from rlhf.errors import Refused
from rlhf.types import Geometry


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks")
    write_clicks(folder, 0)
    return folder


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
    instructions = {row.instruction for row in train}
    assert "" in instructions and any(not text.isascii() for text in instructions)


def clicks(folder, name):
    with open(folder / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_click_log_follows_the_true_rate(log):
    rows = clicks(log, "ctr_train.csv")
    assert len(rows) == (CLICKED - CLICK_TEST) * LOOKS and len(clicks(log, "ctr_test.csv")) == CLICK_TEST * LOOKS
    errors = []
    for row in rows[::5]:
        picture = decode_image((log / row["image_url"]).read_bytes())
        item = {field: row[field] for field in ("food_name", "food_type", "city_name", "shop_name")}
        (rate,), impressions = true_rate_judge([picture], [""], [item]), int(row["impressions"])
        assert float(row["pv_ctr"]) == pytest.approx(int(row["clicks"]) / impressions, abs=1e-6)
        errors.append((int(row["clicks"]) - rate * impressions) / (rate * (1 - rate) * impressions) ** 0.5)
    # Standard normal, if the log is what it says: 476 rows give the mean a deviation of 0.05, and the deviation one of 0.03.
    assert 0.85 < np.std(errors) < 1.15 and abs(np.mean(errors)) < 0.2
    observed = [float(row["pv_ctr"]) for row in rows]
    assert 0.05 < np.mean(observed) < 0.3 and np.std(observed) > 0.05


def test_pairs_lie_in_the_layout_of_control_and_training_images(world):
    control, training = (sorted((world / "edits" / name).iterdir()) for name in ("control_images", "training_images"))
    names = [f"image_{number:03d}" for number in range(1, PAIRS + 1)]
    assert [file.name for file in control] == [f"{name}.jpg" for name in names]
    assert [file.name for file in training] == [f"{name}.{end}" for name in names for end in ("png", "txt")]
    assert decode_image(control[0].read_bytes()).shape == (SIZE, SIZE, 3)


def test_it_is_built_once_deterministic_and_leaves_other_things_alone(world, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    assert write_photos(world) == world
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before
    write_photos(tmp_path, seed=1)
    (tmp_path / "kontext").mkdir()
    (tmp_path / "images/half.jpg").write_bytes(b"of photos that were cut off")
    (tmp_path / "world.json").write_text((tmp_path / "world.json").read_text().replace("true", "false"))
    again = write_photos(tmp_path)
    for file in world.rglob("*"):
        if file.is_file():
            assert (again / file.relative_to(world)).read_bytes() == file.read_bytes()
    assert (tmp_path / "kontext").is_dir() and not (tmp_path / "images/half.jpg").exists()


def test_somebody_elses_files_are_refused_and_stay(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/mine.jpg").write_bytes(b"mine")
    with pytest.raises(Refused, match=r"holds images, which would be overwritten, and no world\.json"):
        write_photos(tmp_path)
    assert [file.name for file in tmp_path.rglob("*")] == ["images", "mine.jpg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"--dir: the folder .*file/world cannot be made"):
        write_photos(tmp_path / "file" / "world")
