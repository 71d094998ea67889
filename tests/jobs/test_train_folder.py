"""Fine-tuning as a newcomer does it: the world's twenty pairs, the shipped recipe, and edits with the LoRA that comes out."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from actors.checks import in_threads
from jobs import edit, train
from jobs.cli import parse
from jobs.demo.__main__ import lay_out
from jobs.example_sets import read_example_sets
from jobs.recipes import TrainRecipe
from jobs.world.data import NEW_EDIT
from jobs.world.truth import attributes
from rlhf.errors import Refused
from rlhf.models.lora import LORA_FILE
from rlhf.models.lora_layouts import to_diffusers
from tests.jobs.test_configs import FOLDER
from tests.rlhf.models.test_lora_layouts import assert_same, deltas

EDITS = 24


def recipe(home, **changes):
    """sft_demo.toml with its `demo/…` paths below `home`."""
    paths = {"model.path": "world/kontext", "data.path": "world/edits", "data.cache": "cache", "run.dir": "runs"}
    moved = {key: home / path for key, path in paths.items()} | changes
    arguments = ["--config", str(FOLDER / "sft_demo.toml"), *(f"--{key}={value}" for key, value in moved.items())]
    return parse(TrainRecipe, arguments).config


def checked(config):
    """As a dry run does."""
    return read_example_sets(config, train.objective(config).roles, partial(in_threads, print))


def edited(world, out, monkeypatch, *options):
    """Held-out photos edited by `jobs.edit`, uint8 (EDITS, H, W, 3)."""
    lines = (world / "eval_metadata.jsonl").read_text().splitlines()[:EDITS]
    rows = [json.loads(line) | {"prompt": NEW_EDIT} for line in lines]
    (world / "new_edit.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"model.path": world / "kontext", "model.height": 64, "model.width": 64, "sampling.steps": 4}
    given |= {"edit.data": world / "new_edit.jsonl", "edit.out": out, "edit.device": "cpu"}
    monkeypatch.setattr(sys, "argv", ["edit", *(f"--{key}={value}" for key, value in given.items()), *options])
    edit.main()
    return np.stack([np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lora_learns_from_twenty_pairs_to_take_the_colours_away(cluster, tmp_path, monkeypatch):
    """Seen: the base keeps the vividness of photos that it was not trained on, and the LoRA halves it."""
    world = tmp_path / "world"
    lay_out(world)
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = {"run.lora_layouts": '["comfyui", "kohya"]', "tracking.report_to": '["wandb"]'}
    run = train.run(recipe(tmp_path, **told))
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1 and not (run / "tensorboard").exists()
    losses = [row["train/loss"] for line in (run / "metrics.jsonl").open() if "train/loss" in (row := json.loads(line))]
    assert len(losses) == 300 and np.mean(losses[-50:]) < 0.7 * np.mean(losses[:10])
    base = edited(world, tmp_path / "base", monkeypatch)
    tuned = edited(world, tmp_path / "tuned", monkeypatch, f"--tuned.lora={run / 'final' / 'lora'}")
    before, after = (attributes(pictures).vividness.numpy() for pictures in (base, tuned))
    assert after.mean() < 0.75 * before.mean() and (after < before).mean() > 0.9
    expected = deltas(load_file(run / "final" / "lora" / LORA_FILE))
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(world / "kontext/transformer"))
    for layout in ("comfyui", "kohya"):
        other = load_file(run / "final" / f"lora_{layout}.safetensors")
        assert_same(deltas(to_diffusers(other, denoiser, "transformer")), expected)


@pytest.mark.parametrize(("epochs", "most", "steps"), [(None, 300, 300), (1, 300, 5), (3, 300, 15), (100, 300, 300)])
def test_epochs_and_steps_end_a_run_whichever_are_less(tmp_path, epochs, most, steps):
    lay_out(tmp_path / "world")
    limits = {"trainer.max_train_steps": most} | ({"trainer.epochs": epochs} if epochs else {})
    config = recipe(tmp_path, **limits)  # 20 examples, 4 a step
    ended = train.ended_by_epochs(config, checked(config))
    assert ended.trainer.max_train_steps == steps
    assert ended.model_copy(update={"trainer": config.trainer}) == config
    half = recipe(tmp_path, **limits | {"trainer.train_batch_size": 3})  # 20 are no multiple of 3
    if epochs == 1:
        assert train.ended_by_epochs(half, checked(half)).trainer.max_train_steps == 7


def test_examples_that_are_repeated_to_fill_batches_count_in_an_epoch_and_are_told(tmp_path, capsys):
    lay_out(tmp_path / "world")
    config = recipe(tmp_path, **{"trainer.epochs": 1})
    found = checked(config)
    kinds = np.array(
        [0] * 17 + [1] * 3, np.int32
    )  # a batch of 4 holds one kind: 20 places of the first and 4 of the second
    sorted_out = replace(found, training=replace(found.training, place=replace(found.training.place, buckets=kinds)))
    assert config.trainer.train_batch_size == 4 == config.trainer.pairs_per_step
    assert train.ended_by_epochs(config, sorted_out).trainer.max_train_steps == 6
    assert "1 epochs of 20 examples (4 repeated to fill batches) are 6 updates" in capsys.readouterr().out


def test_preferences_cannot_be_learnt_from_a_folder_of_targets(tmp_path):
    lay_out(tmp_path / "world")
    with pytest.raises(Refused, match=r'world/edits: holds pictures to learn from, but none .*; set objective = "sft"'):
        checked(recipe(tmp_path, objective="dpo"))


def test_preferences_cannot_be_learnt_from_a_table_of_targets(tmp_path):
    lay_out(tmp_path / "world")
    target = (tmp_path / "world/edits/training_images/image_001.png").read_bytes()
    pq.write_table(pa.table({"target_image": [target], "prompt": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(Refused, match=r't\.parquet: holds pictures to learn from, but none .*; set objective = "sft"'):
        checked(recipe(tmp_path, **{"objective": "dpo", "data.path": tmp_path / "t.parquet"}))


def test_a_caption_that_is_missing_is_told_before_anything_starts(tmp_path):
    lay_out(tmp_path / "world")
    (tmp_path / "world/edits/training_images/image_003.txt").unlink()
    with pytest.raises(Refused, match=r"image_003\.png: prompt: is missing; write it into a file of the same name"):
        checked(recipe(tmp_path))


def test_sources_cannot_be_left_out_for_a_model_that_needs_one(tmp_path):
    lay_out(tmp_path / "world")
    with pytest.raises(
        Refused, match=r"data\.source_dropout = 0\.1, but flux_kontext takes no prompt without a source"
    ):
        checked(recipe(tmp_path, **{"data.source_dropout": 0.1}))


def test_a_root_that_is_no_folder_is_refused(tmp_path):
    lay_out(tmp_path / "world")
    with pytest.raises(
        Refused, match=r"data\.root = '.*/none' is no folder: give the one that the paths in the rows start"
    ):
        checked(recipe(tmp_path, **{"data.root": tmp_path / "none"}))
