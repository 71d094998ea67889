"""jobs.train_ctr as users start it: dry run, bad input, a checkpoint that the CTR judge loads."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from rlhf.data.schema import BadInput
from rlhf.rewards.ctr import CTRReward
from rlhf.rewards.ctr_config import TrainCTRConfig
from rlhf.rewards.images import encode_png
from rlhf.types import Item

ROW = "{}.png,苹果,水果,上海,小铺,{:.3f},100,{}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = ["image_url,food_name,food_type,city_name,shop_name,pv_ctr,impressions,clicks"]
    for index in range(40):
        (folder / f"{index}.png").write_bytes(encode_png(np.full((16, 16, 3), 6 * index, np.uint8)))
        clicks = int(rng.integers(0, 30))
        lines.append(ROW.format(index, clicks / 100, clicks))
    (folder / "train.csv").write_text("\n".join(lines[:33]))
    (folder / "eval.csv").write_text("\n".join([lines[0], *lines[33:]]))
    (folder / "bad.csv").write_text("\n".join([lines[0], ROW.format("gone", 0.1, 10), ROW.format(1, 7.5, 10)]))
    return folder


def recipe(data, output, **changes):
    return TrainCTRConfig.model_validate(
        {
            "output": str(output),
            "data": {"path": str(data / "train.csv"), "eval_path": str(data / "eval.csv")} | changes,
            "model": {"image_size": 32, "max_tokens": 40},
            "train": {"epochs": 2, "batch_size": 8, "num_cpus": 0.5},
        }
    )


def test_all_bad_rows_of_both_files_at_once(data, tmp_path):
    from jobs.train_ctr import load_rows

    with pytest.raises(BadInput) as caught:
        load_rows(recipe(data, tmp_path / "out", path=str(data / "bad.csv"), eval_path=str(data / "none.csv")))
    assert [problem.line for problem in caught.value.problems] == [2, 3, None]


def test_an_existing_output_is_never_overwritten(data, tmp_path):
    from jobs.train_ctr import OutputExists, load_rows

    with pytest.raises(OutputExists, match="never overwritten"):
        load_rows(recipe(data, tmp_path))


def test_without_an_eval_file_products_are_held_out(data, tmp_path):
    from jobs.train_ctr import load_rows

    rows, held_out = load_rows(recipe(data, tmp_path / "out", eval_path=None, eval_fraction=0.5))
    assert len(rows) + len(held_out) == 32


def run(*arguments):
    environment = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.train_ctr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
def test_the_command_line(data, tmp_path):
    common = [
        "--data.path", str(data / "train.csv"), "--data.eval_path", str(data / "eval.csv"),
        "--model.image_size", "32", "--model.max_tokens", "40", "--train.epochs", "2", "--train.batch_size", "8",
        "--output", str(tmp_path / "ctr"), "--train.num_cpus", "0.5",
    ]  # fmt: skip
    dry = run(*common, "--dry-run")
    assert dry.returncode == 0 and "32 training rows, 8 held-out rows" in dry.stdout and "[train]" in dry.stdout
    assert not (tmp_path / "ctr").exists()

    done = run(*common)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "ctr" / "metrics.json").read_text())
    assert metrics["rows"] == 8 and metrics["train_rows"] == 32 and "correlation" in metrics
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctr"]
    item = Item(food_name="苹果", food_type="水果", city_name="上海", shop_name="小铺")
    score = CTRReward(tmp_path / "ctr").score([np.zeros((9, 9, 3), np.uint8)], [""], [item])[0]
    assert 0.02 < score < 0.4

    bad = run(*common, "--data.path", str(data / "bad.csv"), "--output", str(tmp_path / "other"))
    assert bad.returncode == 2 and "bad.csv:2" in bad.stderr and "bad.csv:3" in bad.stderr
    assert "Traceback" not in bad.stderr
