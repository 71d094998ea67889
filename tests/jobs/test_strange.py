"""Whole jobs with a family that recipes name by its import path, on prompts of one and of two sources."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from actors import checks
from jobs import online_dpo, train
from jobs.example_sets import read_example_sets
from jobs.preprocess import read_data
from jobs.recipes import OnlineDPORecipe, TrainRecipe
from rlhf.data.audit import read_pairs, recorded_prompt
from rlhf.data.cache import read_manifest
from rlhf.errors import Refused
from rlhf.models.lora import load_modules
from rlhf.types import Geometry, Source
from tests import strange, worlds
from tests.conftest import SERVE_PORT
from tests.encoded import media_of
from tests.rlhf.data.pair_tables import png

FAMILY = "tests.strange:Strange"
TEXTS = ("warm", "摆 it there", "put the soup of the first picture on the table of the second one")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return strange.write(tmp_path_factory.mktemp("models") / "strange")


def sources_of(i: int) -> Any:
    """One path, a list of one, or a list of two."""
    names = [f"pictures/{i}_{j}.png" for j in range(1 + i % 2)]
    return names[0] if i % 4 == 0 else names


def write_pairs(folder: Path, name: str, numbers: range) -> Path:
    lines = []
    for i in numbers:
        pictures = {"winner": f"pictures/{i}_w.png", "loser": f"pictures/{i}_l.png"}
        lines.append({"prompt": TEXTS[i % 3], **pictures, "source": sources_of(i)})
        write_pictures(folder, i, *pictures.values())
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder / name


def write_prompts(folder: Path, name: str, numbers: range) -> Path:
    for i in numbers:
        write_pictures(folder, i)
    lines = [{"image_id": str(i), "prompt": TEXTS[i % 3], "image": sources_of(i)} for i in numbers]
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder / name


def write_pictures(folder: Path, i: int, *more: str) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    for place, name in enumerate([f"pictures/{i}_0.png", f"pictures/{i}_1.png", *more]):
        (folder / name).write_bytes(png(10 * i + place, 60, 40))


def tables(folder: Path, checkpoint: Path, how: str, **more: Any) -> dict[str, Any]:
    """What recipes share."""
    base: dict[str, Any] = {
        "run": {"name": "strange", "dir": str(folder / "runs"), "save_every": 2},
        "model": {"family": FAMILY, "path": str(checkpoint), "height": 48, "width": 32},
        "trainable": worlds.TRAINABLES[how](worlds.PATTERNS[FAMILY]).model_dump(exclude_none=True),
        "trainer": {
            "ranks": 2,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 4,
            "learning_rate": 3e-3,
            "num_cpus": 0.2,
            "num_gpus": 0.0,
            "timeout_s": 120.0,
        },
        "preprocess": {"num_cpus": 0.2, "timeout_s": 300.0, "batch_size": 2},
        "cluster": {"num_cpus": 2.0, "object_store_memory": 200_000_000},
    }
    for name, values in more.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return base


def train_recipe(folder: Path, checkpoint: Path, how: str = "full", **more: Any) -> TrainRecipe:
    data = {"path": str(write_pairs(folder, "pairs.jsonl", range(10))), "cache": str(folder / "cache")}
    held_out = {"path": str(write_pairs(folder, "held_out.jsonl", range(20, 24))), "every": 2, "draws": 1}
    more = {"data": data | more.pop("data", {}), "eval": held_out, "dpo": {"beta": 500.0}, **more}
    return TrainRecipe.model_validate(tables(folder, checkpoint, how, **more))


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loaded(model: Path, export: Path, how: str) -> torch.nn.Module:
    """The denoiser with what a run exported."""
    family = worlds.family(model, kind=FAMILY)
    if how == "full":
        return family.load_denoiser("cpu", export / "net")
    if how == "modules":
        denoiser = family.load_denoiser("cpu")
        load_modules(denoiser, export / "modules")
        return denoiser
    return family.load_denoiser("cpu", lora=export / how)


def changed(model: Path, export: Path, how: str) -> bool:
    """Whether what was exported loads and is not the base."""
    base = dict(worlds.family(model, kind=FAMILY).load_denoiser("cpu").named_parameters())
    found = dict(loaded(model, export, how).named_parameters())
    new = [name for name, value in found.items() if name not in base or not torch.equal(value, base[name])]
    return bool(new) and all(value.isfinite().all() for value in found.values())


@slow
@pytest.mark.parametrize(
    ("objective", "how", "latents"), [("dpo", "full", "cached"), ("sft", "lora_modules", "on_the_fly")]
)
def test_it_trains_on_pairs_with_one_and_two_sources(cluster, model, tmp_path, objective, how, latents):
    recipe = train_recipe(
        tmp_path, model, how, objective=objective, data={"latents": latents, "caption_dropout": 0.4, "hflip": True}
    )
    path = train.run(recipe)
    steps = [row for row in rows_of(path) if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    held_out = [row["eval/loss"] for row in rows_of(path) if "eval/loss" in row]
    assert len(held_out) == 3 and len(set(held_out)) == 3
    if objective == "dpo":
        assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) != steps[3]["train/loss"]
    else:
        assert held_out[2] < held_out[0]
    assert changed(model, path / "final", how)
    names = {place.names for place in read_manifest(recipe.data.cache).places.values()}
    assert names == {("read", "origins"), ("latents",)}


def test_batches_that_would_mix_numbers_of_sources_as_they_come_are_refused(model, tmp_path):
    recipe = train_recipe(tmp_path, model, trainer={"train_batch_size": 2}, data={"latents": "on_the_fly"})
    with pytest.raises(
        Refused, match=r"of 4 kinds that cannot share a batch.*data\.latents = .cached., or .*train_batch_size"
    ):
        read_example_sets(recipe, ("winner", "loser"), partial(checks.in_threads, print))


def test_more_sources_than_the_family_takes_are_refused(model, tmp_path):
    recipe = train_recipe(tmp_path, model)
    line = json.loads(Path(recipe.data.path).read_text().splitlines()[0])
    line["source"] = ["pictures/1_0.png", "pictures/1_1.png", "pictures/2_0.png"]
    Path(recipe.data.path).write_text(json.dumps(line))
    with pytest.raises(Refused, match=r"pairs\.jsonl:1: source: names 3 pictures, but the model takes 1 to 2"):
        read_example_sets(recipe, ("winner", "loser"), partial(checks.in_threads, print))


def online_recipe(folder: Path, checkpoint: Path, how: str, **more: Any) -> OnlineDPORecipe:
    write_prompts(folder, "prompts.jsonl", range(6))
    write_prompts(folder, "held_out.jsonl", range(30, 32))
    return OnlineDPORecipe.model_validate(
        tables(
            folder,
            checkpoint,
            how,
            data={"path": str(folder / "prompts.jsonl"), "cache": str(folder / "cache")},
            eval={"path": str(folder / "held_out.jsonl"), "every": 2},
            sampling={"steps": 2, "batch_size": 4, "guidance_scale": 3.0},
            rollout={"max_sample_attempts": 4},
            reward={"weights": {"green": 1.0}},
            judges={
                "python": {"green": {"function": "tests.strange:green", "num_cpus": 0.1}},
                "filter": {"enabled": False},
            },
            dpo={"beta": 500.0, "reference_refresh_every": 1},
            samplers={"count": 1, "num_cpus": 0.2, "num_gpus": 0.0, "timeout_s": 120.0},
            serve={"port": SERVE_PORT},
            **more,
        )
    )


@slow
def test_it_learns_online_to_make_clips_and_the_record_trains_again(cluster, model, tmp_path, capsys):
    recipe = online_recipe(
        tmp_path,
        model,
        "full",
        model={"frames": 3},
        run={"sample_every": 1},
        trainer={"max_train_steps": 2},
    )
    path = online_dpo.run(recipe, read_data(recipe.data, recipe.eval, recipe.model))
    assert "25% unknown: 摆 it there" in capsys.readouterr().out
    rows = read_pairs(path / "pairs")
    assert [row["step"] for row in rows] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {(row["frames"], *row["latents_shape"]) for row in rows} == {(3, 4, 2, 6, 4)}
    assert {len(recorded_prompt(row).sources) for row in rows} == {1, 2}
    assert all(dict(row["winner_rewards"])["green"] > dict(row["loser_rewards"])["green"] for row in rows)
    steps = [row for row in rows_of(path) if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and len(steps) == 2
    assert {name for row in rows_of(path) for name in row} >= {"eval/base_green", "eval/policy_green"}
    for step in (1, 2):
        with Image.open(path / "samples" / f"step_{step:06d}.png") as sheet:
            assert np.asarray(sheet).std() > 10
    assert changed(model, path / "final", "full")

    settings = {"hflip": False, "caption_dropout": 0.0, "shuffle": False, "cache": recipe.data.cache}
    replay = TrainRecipe.model_validate(
        tables(
            tmp_path,
            model,
            "full",
            run={"name": "replay"},
            model={"frames": 3},
            data={"path": str(path / "pairs"), **settings},
            dpo={"beta": 500.0, "reference_refresh_every": 1},
            trainer={"max_train_steps": 2},
        )
    )
    again = [row for row in rows_of(train.run(replay)) if "train/loss" in row]
    for mine, theirs in zip(again, steps, strict=True):
        assert [mine[name] for name in mine if name.startswith("train/")] == [
            theirs[name] for name in theirs if name.startswith("train/")
        ]


def test_pictures_are_no_targets_for_clips(model, tmp_path):
    write_pictures(tmp_path, 0)
    family = worlds.family(model, kind=FAMILY)
    clip = family.target(
        Source(path=str(tmp_path / "pictures/0_0.png"), content="", height=48, width=32),
        Geometry(height=48, width=32, frames=3),
    )
    with pytest.raises(Refused, match="is a picture, but 3 frames of it are asked for"):
        media_of(clip)
