"""jobs.train_ctr as users start it: dry run, bad input, a checkpoint that the CTR judge loads, more than one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jobs
from jobs.cli import parse
from rlhf.data.media import encode_png
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.rewards.ctr.config import TrainCTRConfig
from tests.rlhf.rewards.asking import ctr_reward

ROW = "{}.png,苹果{},水果,上海,小铺,{:.3f},100,{}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = ["image_url,food_name,food_type,city_name,shop_name,pv_ctr,impressions,clicks"]
    for index in range(40):
        (folder / f"{index}.png").write_bytes(encode_png(np.full((16, 16, 3), 6 * index, np.uint8)))
        clicks = int(rng.integers(0, 30))
        lines.append(ROW.format(index, index // 4, clicks / 100, clicks))
    (folder / "train.csv").write_text("\n".join(lines[:33]))
    (folder / "eval.csv").write_text("\n".join([lines[0], *lines[33:]]))
    (folder / "bad.csv").write_text("\n".join([lines[0], ROW.format("gone", 0, 0.1, 10), ROW.format(1, 0, 7.5, 10)]))
    (folder / "one.csv").write_text("\n".join(lines[:5]))
    return folder


def recipe(data, output, train=None, **changes):
    return TrainCTRConfig.model_validate(
        {
            "output": str(output),
            "data": {"path": str(data / "train.csv"), "eval_path": str(data / "eval.csv")} | changes,
            "model": {"image_size": 32, "max_tokens": 40},
            "train": {"epochs": 2, "batch_size": 8, "num_cpus": 0.5} | (train or {}),
        }
    )


def test_all_bad_rows_of_both_files_at_once(data, tmp_path):
    from jobs.train_ctr import load_rows

    with pytest.raises(BadInput) as caught:
        load_rows(recipe(data, tmp_path / "out", path=str(data / "bad.csv"), eval_path=str(data / "none.csv")))
    assert [problem.line for problem in caught.value.problems] == [2, 3, None]


def test_an_existing_output_is_never_overwritten(data, tmp_path):
    from jobs.train_ctr import load_rows

    with pytest.raises(Refused, match="never overwritten"):
        load_rows(recipe(data, tmp_path))


def test_validation_products_come_out_of_the_training_rows_alone(data, tmp_path):
    from jobs.train_ctr import load_rows

    whole = load_rows(recipe(data, tmp_path / "out", validation_fraction=0))
    assert len(whole.train) == 32 and not whole.validation and len(whole.held_out) == 8
    rows = load_rows(recipe(data, tmp_path / "out", validation_fraction=0.25))
    assert len(rows.train) == 24 and len(rows.validation) == 8 and rows.held_out == whole.held_out
    assert {click.image for click in (*rows.train, *rows.validation)} == {click.image for click in whole.train}
    assert not {click.item for click in rows.train} & {click.item for click in rows.validation}


def test_without_an_eval_file_products_are_held_out_for_either_use(data, tmp_path):
    from jobs.train_ctr import load_rows

    rows = load_rows(recipe(data, tmp_path / "out", eval_path=None, eval_fraction=0.25, validation_fraction=0.25))
    parts = [{click.item for click in part} for part in (rows.train, rows.validation, rows.held_out)]
    assert [len(part) for part in parts] == [4, 2, 2] and len(set.union(*parts)) == 8


def test_keys_that_do_not_fit_the_rows(data, tmp_path):
    from jobs.train_ctr import load_rows

    with pytest.raises(Refused, match=r"data\.validation_fraction = 0\.1 takes whole products .* there are 1 to take"):
        load_rows(recipe(data, tmp_path / "out", path=str(data / "one.csv")))


def test_pictures_that_are_trained_on_are_not_held_out(data, tmp_path):
    from jobs.train_ctr import load_rows

    with pytest.raises(
        Refused, match=r"32 of 32 pictures of data\.eval_path = .* are in data\.path = .* too: hold out others"
    ):
        load_rows(recipe(data, tmp_path / "out", eval_path=str(data / "train.csv")))


@pytest.mark.slow
def test_ranks_that_the_cluster_can_never_hold(cluster, data, tmp_path):
    from jobs.train_ctr import train_ctr

    with pytest.raises(Refused, match=r"train\.ranks = 2 × train\.num_gpus = 1 is more than the cluster's 0 GPU"):
        train_ctr(recipe(data, tmp_path / "out", train={"ranks": 2, "num_gpus": 1.0}))
    assert not list(tmp_path.iterdir())


def test_the_recipe_of_the_seeds_model_parses(tmp_path):
    """It stands in the comments of the shipped recipe."""
    shipped = Path(jobs.__file__).parent / "configs" / "train_ctr.toml"
    small = parse(TrainCTRConfig, ["--config", str(shipped)]).config
    assert small.model.text is None and small.train.ranks == 1 and small.train.learning_rate is None
    head, _, tables = shipped.read_text().partition("# [model]")
    tables = "\n".join(line.removeprefix("# ") for line in f"# [model]{tables}".splitlines() if line != "#")
    (tmp_path / "seed.toml").write_text(head[: head.index("[train]")] + tables)
    train = parse(TrainCTRConfig, ["--config", str(tmp_path / "seed.toml")]).config.train
    assert (train.learning_rate, train.text_learning_rate, train.image_learning_rate) == (1e-3, 2e-5, 5e-6)
    assert (train.gradient_accumulation_steps, train.mixed_precision, train.max_grad_norm) == (4, "fp16", 1.0)


def run(*arguments):
    environment = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.train_ctr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
def test_the_command_line(data, tmp_path):
    common = [
        "--data.path", str(data / "train.csv"), "--data.eval_path", str(data / "eval.csv"),
        "--data.validation_fraction", "0.25", "--model.image_size", "32", "--model.max_tokens", "40",
        "--train.epochs", "2", "--train.batch_size", "8", "--output", str(tmp_path / "ctr"), "--train.num_cpus", "0.5",
    ]  # fmt: skip
    dry = run(*common, "--dry-run")
    assert dry.returncode == 0 and "24 training rows, 8 validation rows, 8 held-out rows" in dry.stdout
    assert "[train]" in dry.stdout and "ranks: 1 × 0.5 CPU, 0 GPU" in dry.stdout
    assert not (tmp_path / "ctr").exists()
    small = run(*common, "--dry-run", "--cluster.num_cpus", "1", "--train.ranks", "4")
    assert (
        small.returncode == 2
        and "train.ranks = 4 × train.num_cpus = 0.5 is more than the cluster's 1 CPU" in small.stderr
    )

    done = run(*common)
    assert done.returncode == 0, done.stderr
    assert "ctr epoch 2/2 loss" in done.stdout
    metrics = json.loads((tmp_path / "ctr" / "metrics.json").read_text())
    assert (metrics["rows"], metrics["train_rows"], metrics["validation_rows"]) == (8, 24, 8)
    figures = {"correlation", "rank_correlation", "mae", "calibration_error", "pair_accuracy", "pairs", "best_epoch"}
    assert figures <= metrics.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctr"]
    assert {"calibration.png", "predicted_vs_actual.png"} <= {path.name for path in (tmp_path / "ctr").iterdir()}
    item = {"food_name": "苹果1", "food_type": "水果", "city_name": "上海", "shop_name": "小铺"}
    score = ctr_reward(tmp_path / "ctr").score([np.zeros((1, 9, 9, 3), np.uint8)], [""], [()], [item])[0]
    assert 0.02 < score < 0.4

    bad = run(*common, "--data.path", str(data / "bad.csv"), "--output", str(tmp_path / "other"))
    assert bad.returncode == 2 and "bad.csv:2" in bad.stderr and "bad.csv:3" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_two_ranks_train_one_model(cluster, data, tmp_path, capsys):
    from jobs.train_ctr import train_ctr

    config = recipe(data, tmp_path / "two", train={"ranks": 2, "num_cpus": 0.25, "gradient_accumulation_steps": 2})
    metrics = json.loads((train_ctr(config) / "metrics.json").read_text())
    assert metrics["rows"] == 8 and metrics["epochs"] == 2 and "ctr epoch 2/2" in capsys.readouterr().out
    assert "ranks = 2" in (tmp_path / "two" / "train_ctr.toml").read_text()
    item = {"food_name": "苹果1", "food_type": "水果", "city_name": "上海", "shop_name": "小铺"}
    assert 0 < ctr_reward(tmp_path / "two").score([np.zeros((1, 9, 9, 3), np.uint8)], [""], [()], [item])[0] < 1


@pytest.mark.slow
def test_a_failed_training_leaves_no_output_and_tells_why(cluster, data, tmp_path):
    from jobs.train_ctr import train_ctr

    with pytest.raises(Refused, match=r"lower train\.learning_rate"):
        train_ctr(recipe(data, tmp_path / "bad", train={"learning_rate": 1e30, "max_grad_norm": 1e30, "ranks": 2}))
    assert not list(tmp_path.iterdir())
