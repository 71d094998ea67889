"""Whole jobs with Wan and references, on clips of the miniature world: from OpenS2V's annotations to weights that make videos."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors.validation import sampling_of
from jobs import edit, opens2v, train
from jobs.recipes import TrainRecipe
from jobs.world.clips import draw, write_part
from rlhf.data.batches import latents_from_array, latents_to_array
from rlhf.data.clips import read_clip, write_mp4
from rlhf.data.prompts import read_prompts
from rlhf.data.sampler import encoded_now, sample_prompts
from rlhf.errors import Refused
from rlhf.models.lora import load_modules
from rlhf.models.tiny_wan import write_wan_subject
from rlhf.models.wan_network import is_new
from rlhf.types import Clip, Geometry, seed_from
from tests import worlds
from tests.jobs.test_strange import rows_of, tables
from tests.rlhf.models.test_wan_subject import PATTERNS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIZE = {"frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_wan_subject(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """part/ and set/, of 8 clips and 2 that are held out."""
    for name, count in (("part", 8), ("held_out", 2)):
        write_part(tmp_path / name, [*draw(count, **SIZE, seed=count)], **SIZE)
        part = ["--part", f"{tmp_path}/{name}/part.json", f"{tmp_path}/{name}/videos"]
        settings = ["--out", f"{tmp_path}/{name}_set", "--frames", "5", "--stride", "2"]
        monkeypatch.setattr(sys, "argv", ["opens2v", *part, *settings])
        opens2v.main()
    return tmp_path


def recipe(folder: Path, model: Path, **more) -> TrainRecipe:
    data = {"path": f"{folder}/part_set/rows.jsonl", "root": str(folder), "cache": f"{folder}/cache", "frame_stride": 2}
    held_out = {"path": f"{folder}/held_out_set/rows.jsonl", "every": 2, "draws": 1}
    base = tables(
        folder,
        model,
        "full",
        objective="sft",
        model={"family": "wan_subject", "height": 32, "width": 48, "frames": 5},
        data={"caption_dropout": 0.2, "hflip": True} | data | more.pop("data", {}),
        eval=held_out,
        **more,
    )
    return TrainRecipe.model_validate(base | {"trainable": {"kind": "modules", "patterns": PATTERNS}})


@pytest.mark.parametrize("latents", ["cached", "on_the_fly"])
def test_new_layers_are_trained_on_clips_and_exported_alone(cluster, folder, model, latents):
    """On two ranks. A run that goes on from step 2 repeats steps 3 and 4, and the export makes other videos than the base."""
    config = recipe(folder, model, data={"latents": latents})
    path = train.run(config)
    steps = [row for row in rows_of(path) if "train/loss" in row]
    assert len(steps) == 4 and all(
        "eval/loss" in row for row in rows_of(path) if row["step"] in (0, 2, 4) and "train/loss" not in row
    )
    named = config.run.model_copy(update={"resume": str(path / "checkpoint_000002")})
    again = train.run(config.model_copy(update={"run": named}))
    for row, other in zip([row for row in rows_of(again) if "train/loss" in row][-2:], steps[2:], strict=True):
        assert {name: row[name] for name in row if not name.startswith("time/")} == {
            name: other[name] for name in other if not name.startswith("time/")
        }
    exported = path / "final" / "modules"
    assert json.loads((exported / "modules.json").read_text())["patterns"] == list(PATTERNS)
    family = worlds.family(model, torch.float32, "wan_subject")
    denoiser, base = family.load_denoiser("cpu"), dict(family.load_denoiser("cpu").named_parameters())
    load_modules(denoiser, exported)
    changed = {name for name, value in denoiser.named_parameters() if not torch.equal(value, base[name])}
    assert changed == {name for name in base if is_new(name)}


def prompts(folder: Path) -> Path:
    """Of the clips that are held out: their captions and references."""
    lines = map(json.loads, (folder / "held_out_set" / "rows.jsonl").read_text().splitlines())
    rows = [
        {
            "image_id": f"clip{i}",
            "prompt": row["prompt"],
            "image": [file.removeprefix("held_out_set/") for file in row["source"]],
        }
        for i, row in enumerate(lines)
    ]
    (folder / "held_out_set" / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "held_out_set" / "prompts.jsonl"


def test_videos_are_made_while_it_trains_and_afterwards(cluster, folder, model, monkeypatch):
    """From the same noise the modules that two ranks exported make, here and alone, the video that the run showed last."""
    config = recipe(folder, model, validation={"path": str(prompts(folder)), "every": 4, "steps": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    path = train.run(config)
    shown = {file.name for file in (path / "samples").iterdir()}
    for side, step in (("base", 0), ("policy", 4)):
        assert {f"eval_{side}_step_{step:06d}_{number}_{side}.mp4" for number in (1, 2)} <= shown
    assert np.asarray(Image.open(path / "samples" / "eval_policy_step_000004.png")).std() > 10
    shown_last = read_clip(path / "samples" / "eval_policy_step_000004_1_policy.mp4", Clip(), 5).astype(int)
    mine, bases = (sampled(model, config, prompts(folder), modules) for modules in (path / "final" / "modules", None))
    rounding, trained = (np.abs(shown_last - video).mean() for video in (mine, bases))
    assert rounding < trained / 3
    given = {
        "model.family": "wan_subject",
        "model.path": model,
        "model.height": 32,
        "model.width": 48,
        "model.frames": 5,
        "sampling.steps": 2,
        "edit.data": prompts(folder),
        "edit.device": "cpu",
    }

    def made(out, **more):
        options = given | {"edit.out": folder / out} | {name.replace("__", "."): value for name, value in more.items()}
        monkeypatch.setattr(sys, "argv", ["edit", *(f"--{key}={value}" for key, value in options.items())])
        edit.main()
        assert sorted(file.name for file in (folder / out).iterdir()) == [
            f"clip{i}_0.{end}" for i in (0, 1) for end in ("mp4", "png")
        ]
        return [read_clip(folder / out / f"clip{i}_0.mp4", Clip(), 5).astype(int) for i in (0, 1)]

    (folder / "there").mkdir()
    (folder / "there" / "clip1_0.png").touch()
    with pytest.raises(Refused, match=r"1 of the 2 pictures are there already, the first is clip1_0\.png"):
        made("there")
    base, tuned = made("base"), made("tuned", tuned__lora=path / "final" / "modules")
    assert all(video.shape == (5, 32, 48, 3) for video in base)
    assert all(np.abs(one - other).max() > 8 for one, other in zip(base, tuned, strict=True))
    with Image.open(folder / "tuned" / "clip0_0.png") as sheet:
        assert sheet.width > 3 * 48


def sampled(model: Path, config: TrainRecipe, file: Path, modules: Path | None) -> np.ndarray:
    """(F, H, W, 3) of the first prompt from the first noise of a run's validation, as an MP4 shows it."""
    family = worlds.family(model, getattr(torch, config.model.dtype), "wan_subject")
    denoiser, codec = family.load_denoiser("cpu", lora=modules), family.load_codec("cpu")
    size = Geometry(height=32, width=48, frames=5)
    prompt, *_ = read_prompts(str(file), "crop", lambda height, width: size, key="x", source_counts=range(1, 4)).prompts
    sampling = sampling_of(config.validation)
    rows, seed = encoded_now(family, codec, [prompt], sampling), seed_from(config.run.seed, "validation", 0)
    given = {"prompts": [prompt], "noise_seeds": [seed], "slots": [0]}
    x0 = sample_prompts(family, denoiser, lambda encoding: rows[encoding].tensors, sampling, "cpu", **given)
    kept = latents_from_array(latents_to_array(x0))  # as a rank hands them over
    write_mp4(file.with_name("mine.mp4"), codec.decode(kept)[0].numpy())
    return read_clip(file.with_name("mine.mp4"), Clip(), 5).astype(int)


def test_modules_are_trained_further(cluster, folder, model):
    """From the first run's export the next one begins: its loss at step 1 is another's, and its own before a step."""
    first = train.run(recipe(folder, model))
    begun = {"kind": "modules", "patterns": PATTERNS, "start": str(first / "final" / "modules")}
    config = recipe(folder, model)
    config = TrainRecipe.model_validate(
        config.model_dump(exclude_none=True)
        | {"trainable": begun, "run": {**config.run.model_dump(), "name": "further"}}
    )
    further = train.run(config)
    last, beginning = ([row["eval/loss"] for row in rows_of(path) if "eval/loss" in row] for path in (first, further))
    assert beginning[0] == pytest.approx(last[-1], rel=1e-6) != last[0]
    for wrong, says in (
        (
            begun | {"patterns": PATTERNS[:2]},
            r"trainable\.start = .* holds \d+ tensors, and trainable\.patterns choose",
        ),
        (
            begun | {"start": str(folder / "x.pt")},
            r"is no folder of modules alone: give .*; a \.pt file is written anew",
        ),
    ):
        with pytest.raises(Refused, match=says):
            train.run(TrainRecipe.model_validate(config.model_dump(exclude_none=True) | {"trainable": wrong}))


def test_judges_do_not_choose_between_clips(folder, model):
    with pytest.raises(ValueError, match=r"data\.choice_model = 'hps': judges see pictures, but model\.frames = 5"):
        recipe(folder, model, data={"choice_model": "hps"}, judges={"hps": {"url": "http://127.0.0.1:1"}})


def test_pairs_of_clips_are_learnt_from(cluster, folder, model):
    """Offline DPO: winners and losers are videos, and at the first update the policy is the reference."""
    rows = [json.loads(line) for line in (folder / "part_set" / "rows.jsonl").read_text().splitlines()]
    both = zip(rows, rows[1:] + rows[:1], strict=True)
    lines = [
        {name: row[name] for name in ("prompt", "source", "clip")} | {"winner": row["target"], "loser": other["target"]}
        for row, other in both
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = recipe(folder, model, data={"path": str(folder / "pairs.jsonl")}, dpo={"beta": 500.0})
    config = TrainRecipe.model_validate(config.model_dump(exclude_none=True) | {"objective": "dpo", "eval": {}})
    steps = [row for row in rows_of(train.run(config)) if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and len(steps) == 4
    assert steps[-1]["train/loss"] != pytest.approx(math.log(2), abs=1e-6)
