"""Whole jobs with Qwen-Image-Edit, on prompts of none to three sources of different sizes."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors import checks
from jobs import edit, online_dpo, train
from jobs.example_sets import read_example_sets
from jobs.preprocess import read_data
from jobs.recipes import OnlineDPORecipe, TrainRecipe
from rlhf.data.audit import read_pairs, recorded_prompt
from rlhf.data.cache import read_manifest
from rlhf.data.records import BadInput
from rlhf.data.stream import Visit
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from tests import worlds
from tests.conftest import SERVE_PORT
from tests.jobs.test_strange import rows_of, tables
from tests.rlhf.data.pair_tables import png

FAMILY = "qwen_image_edit"
MODEL = {"family": FAMILY}
SIZES = ((60, 40), (40, 70), (50, 50))
"""(W, H) of a prompt's sources."""
TEXTS = ("warm", "摆 it there", "put the soup of the first picture on the table of the second one")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen", zero_cond_t=True, texts=TEXTS)


def write_sources(folder: Path, i: int, count: int) -> list[str]:
    (folder / "pictures").mkdir(exist_ok=True)
    names = [f"pictures/{i}_{j}.png" for j in range(count)]
    for j, name in enumerate(names):
        (folder / name).write_bytes(png(10 * i + j, *SIZES[j]))
    return names


def write_examples(folder: Path, name: str, numbers: range) -> Path:
    """Pairs, of which a target is the winner; the i-th has i % 4 sources."""
    lines = []
    for i in numbers:
        sources = write_sources(folder, i, i % 4)
        pictures = {role: f"pictures/{i}_{role}.png" for role in ("winner", "loser")}
        for j, picture in enumerate(pictures.values()):
            (folder / picture).write_bytes(png(500 + 10 * i + j, *SIZES[i % 2]))
        lines.append({"prompt": TEXTS[i % 3], **pictures} | ({"source": sources} if sources else {}))
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return folder / name


def train_recipe(folder: Path, checkpoint: Path, how: str, **more) -> TrainRecipe:
    data = {"path": str(write_examples(folder, "pairs.jsonl", range(12))), "cache": str(folder / "cache")}
    held_out = {"path": str(write_examples(folder, "held_out.jsonl", range(20, 24))), "every": 2, "draws": 1}
    more = {"data": data | more.pop("data", {}), "eval": held_out, "dpo": {"beta": 500.0}, **more}
    trainable = worlds.TRAINABLES[how](worlds.PATTERNS[FAMILY]).model_dump(exclude_none=True)
    return TrainRecipe.model_validate(
        tables(folder, checkpoint, "full", model=MODEL, **more) | {"trainable": trainable}
    )


def changed(model: Path, **export: Path) -> bool:
    family = worlds.family(model, kind=FAMILY)
    base, found = family.load_denoiser("cpu"), family.load_denoiser("cpu", **export)
    old, new = dict(base.named_parameters()), dict(found.named_parameters())
    assert all(value.isfinite().all() for value in new.values())
    return any(name not in old or not torch.equal(value, old[name]) for name, value in new.items())


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "how", "latents"), [("dpo", "full", "on_the_fly"), ("sft", "lora", "cached")])
def test_it_trains_on_two_ranks_with_none_to_three_sources(cluster, model, tmp_path, objective, how, latents):
    buckets = {"areas": [48 * 32, 64 * 64], "step": 16, "min_side": 16, "max_side": 96}
    batches = {"train_batch_size": 2} if latents == "cached" else {}
    shown = [{"image_id": str(i), "prompt": "warm", "image": write_sources(tmp_path, 40 + i, 1 + i)} for i in range(3)]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, shown)))
    recipe = train_recipe(
        tmp_path,
        model,
        how,
        objective=objective,
        data={"latents": latents, "caption_dropout": 0.3, "source_dropout": 0.4, "buckets": buckets},
        trainer=batches,
        validation={"path": str(tmp_path / "shown.jsonl"), "every": 2, "steps": 2},
    )
    path = train.run(recipe)
    steps = [row for row in rows_of(path) if "train/loss" in row]
    held_out = [row["eval/loss"] for row in rows_of(path) if "eval/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and len(set(held_out)) == 3
    sheets = sorted(file.name for file in (path / "samples").glob("*.png"))
    assert sheets == [f"eval_{name}.png" for name in ("base_step_000000", "policy_step_000002", "policy_step_000004")]
    assert sorted(file.name for file in (path / "samples" / "base").glob("*.png")) == ["1.png", "2.png", "3.png"]
    if objective == "dpo":
        assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) != steps[3]["train/loss"]
        assert changed(model, folder=path / "final" / "transformer")
    else:
        assert held_out[2] < held_out[0]
        assert changed(model, lora=path / "final" / "lora")
        named = recipe.run.model_copy(update={"resume": str(path / "checkpoint_000002")})
        again = train.run(recipe.model_copy(update={"run": named}))
        assert again == path.parent / "v1"
        rows = [row for row in rows_of(again) if "train/loss" in row]
        assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in steps], "from step 3 on anew"
    names = {place.names for place in read_manifest(recipe.data.cache).places.values()}
    assert names == {("prompt_embeds",), ("latents",)}


def test_a_batch_without_its_sources_is_told_the_caption_alone(model, tmp_path):
    """All twelve examples of one area: what may share a batch with its sources may do so without them."""
    recipe = train_recipe(tmp_path, model, "lora", data={"source_dropout": 0.5})
    found = read_example_sets(recipe, ("winner",), partial(checks.in_threads, print)).training
    family = worlds.family(model, kind=FAMILY)
    examples = found.place.open(family, ("winner",))
    for row, example in enumerate(found.index.examples(range(12), found.place.sizes[0])):
        whole, alone = (examples.encodings(Visit(row=row, alone=alone)) for alone in (False, True))
        count = len(example.prompt.sources)
        assert [e.kind for e in whole] == ["prompt", *["picture"] * (count + 1)] and len(whole[0].sources) == count
        assert (
            [e.kind for e in alone] == ["prompt", "picture"] and not alone[0].sources and alone[0].text == whole[0].text
        )
        assert alone[1] == whole[-1], "the target stays"
        rows = {e: {name: torch.ones(t.shape) for name, t in family.empty_row(e).items()} for e in (*whole, *alone)}
        told = examples.encoded(Visit(row=row, alone=True), rows.__getitem__)
        assert told.bucket == family.bucket(replace(example.prompt, sources=())) and len(told.rows) == 1
    together = found.place.buckets
    prompts = [example.prompt for example in found.index.examples(range(12), found.place.sizes[0])]
    for kind in set(together.tolist()):
        same = [replace(prompts[row], sources=()) for row in np.flatnonzero(together == kind)]
        assert len({family.bucket(prompt) for prompt in same}) == 1


def test_what_an_instruction_may_not_hold_is_refused_before_anything_starts(model, tmp_path):
    recipe = train_recipe(tmp_path, model, "lora")
    file = Path(recipe.data.path)
    file.write_text(file.read_text().replace('"warm"', '"warm <|im_end|>"', 2))  # of lines 1, 4, 7 and 10
    with pytest.raises(BadInput) as refused:
        read_example_sets(recipe, ("winner", "loser"), partial(checks.in_threads, print))
    assert [problem.line for problem in refused.value.problems] == [1, 4]
    says = "the instruction holds '<|im_end|>', which the model takes for a mark and not for words; leave it out"
    assert all(f"{file}:{line}: prompt: " in str(refused.value) for line in (1, 4)) and says in str(refused.value)


def test_what_a_caption_in_a_folder_may_not_hold_is_told_of_its_picture(model, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for stem, text in (("a", "warm"), ("b", "put <|image_pad|> there")):
        (folder / f"{stem}.png").write_bytes(png(1, 48, 32))
        (folder / f"{stem}.txt").write_text(text)
    recipe = train_recipe(tmp_path, model, "lora", objective="sft", data={"path": str(folder)})
    with pytest.raises(BadInput, match=r"b\.png: prompt: the instruction holds '<\|image_pad\|>'"):
        read_example_sets(recipe, ("target",), partial(checks.in_threads, print))


@pytest.mark.slow
def test_it_learns_online_with_two_samplers_and_two_ranks(cluster, model, tmp_path):
    for name, numbers in (("prompts", range(1, 8)), ("held_out", range(33, 35))):
        lines = []
        for i in numbers:
            images = write_sources(tmp_path, i, i % 4)
            lines.append({"image_id": str(i), "prompt": TEXTS[i % 3]} | ({"image": images} if images else {}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = OnlineDPORecipe.model_validate(
        tables(
            tmp_path,
            model,
            "full",
            model=MODEL,
            run={"sample_every": 1},
            data={"path": str(tmp_path / "prompts.jsonl"), "cache": str(tmp_path / "cache")},
            eval={"path": str(tmp_path / "held_out.jsonl"), "every": 2},
            sampling={"steps": 2, "batch_size": 4, "guidance_scale": 3.0, "negative_prompt": "blurred"},
            rollout={"max_sample_attempts": 4},
            reward={"weights": {"green": 1.0}},
            judges={
                "python": {"green": {"function": "tests.jobs.test_qwen_image_edit:green", "num_cpus": 0.1}},
                "filter": {"enabled": False},
            },
            dpo={"beta": 500.0, "reference_refresh_every": 1},
            samplers={"count": 2, "num_cpus": 0.2, "num_gpus": 0.0, "timeout_s": 120.0},
            trainer={"max_train_steps": 2},
            serve={"port": SERVE_PORT},
        )
    )
    path = online_dpo.run(recipe, read_data(recipe.data, recipe.eval, recipe.model))
    rows = read_pairs(path / "pairs")
    assert [row["step"] for row in rows] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {len(recorded_prompt(row).sources) for row in rows} == {0, 1, 2, 3}
    assert all(dict(row["winner_rewards"])["green"] > dict(row["loser_rewards"])["green"] for row in rows)
    steps = [row for row in rows_of(path) if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and len(steps) == 2
    assert {name for row in rows_of(path) for name in row} >= {"eval/base_green", "eval/policy_green"}
    assert changed(model, folder=path / "final" / "transformer")
    with Image.open(path / "samples" / "step_000002.png") as sheet:
        assert np.asarray(sheet).std() > 10


def green(images, prompts, sources, items):
    return [float(image[..., 1].mean()) for image in images]


def test_edits_of_several_sources_follow_all_of_them_and_the_negative_prompt(model, tmp_path, monkeypatch):
    sources = write_sources(tmp_path, 1, 3)
    rows = [{"image_id": str(count), "prompt": "warm", "image": sources[:count]} for count in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for name, options in {
        "plain": (),
        "again": (),
        "negative": ("--sampling.negative_prompt=blurred",),
        "alone": ("--sampling.guidance_scale=1",),
    }.items():
        given = {
            "model.family": FAMILY,
            "model.path": model,
            "model.height": 48,
            "model.width": 32,
            "sampling.steps": 2,
        }
        given |= {"edit.data": tmp_path / "rows.jsonl", "edit.out": tmp_path / name, "edit.device": "cpu"}
        monkeypatch.setattr(sys, "argv", ["edit", *(f"--{key}={value}" for key, value in given.items()), *options])
        edit.main()
        found[name] = [np.asarray(Image.open(file)) for file in sorted((tmp_path / name).glob("*.png"))]
    assert [len(pictures) for pictures in found.values()] == [3] * 4
    assert all(map(np.array_equal, found["plain"], found["again"]))
    one, two, three = found["plain"]
    assert not np.array_equal(one, two) and not np.array_equal(two, three)
    for name in ("negative", "alone"):
        assert not np.array_equal(found[name][0], one)
