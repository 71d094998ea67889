"""The whole offline job: real pairs of photos, two ranks, a judge that relabels, replay of an online run, and its stops."""

import json
import math
import subprocess
import sys
import warnings
from typing import ClassVar
from unittest.mock import patch

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import tomli_w
import torch
from safetensors.torch import load_file

from actors.reporting import Reporter
from actors.sources import Feed
from jobs import train
from rlhf.data.cache import read_manifest
from rlhf.data.media import decode_image
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.models.lora import LORA_FILE
from rlhf.models.tiny import write_stable_diffusion
from rlhf.shards.files import SafetensorsFolder
from tests.conftest import SERVE_PORT
from tests.console import foreign_lines
from tests.jobs.light import greenness, light_config, metric_rows, run_online, write_photos
from tests.jobs.offline_world import needs_grocery, offline_config, offline_tables, write_grocery
from tests.rlhf.data.pair_tables import row, write_jsonl, write_parquet

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def stable_diffusion_xl(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "xl", xl=True)


@pytest.fixture(scope="module")
def grocery(tmp_path_factory):
    return write_grocery(tmp_path_factory.mktemp("grocery"))


def dry_run(folder, model_path, pairs, **tables):
    """`jobs.train --dry-run` on a recipe of these tables."""
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(offline_tables(folder, model_path, pairs, **tables)))
    with patch.object(sys, "argv", ["jobs.train", "--config", str(recipe), "--dry-run"]):
        train.main()


class StopsAt(Reporter):
    """A reporter that fails once, as a full disk would."""

    step: int

    def log(self, step, scalars):
        if step == type(self).step and "train/lr" in scalars:
            raise OSError("no space left on device")
        super().log(step, scalars)


@slow
@needs_grocery
def test_two_ranks_learn_from_photos_that_a_judge_relabelled_and_a_resume_changes_nothing(
    cluster, stable_diffusion, grocery, tmp_path, monkeypatch
):
    judges = {"python": {"green": {"function": "tests.jobs.light:greenness", "num_cpus": 0.1}}}

    def config(name, **data):
        return offline_config(
            tmp_path,
            stable_diffusion,
            grocery,
            run={"name": name, "export_every": 2, "keep_checkpoints": 1},
            data={"choice_model": "green"} | data,
            judges=judges,
            serve={"port": SERVE_PORT},
            trainer={"ema_decay": 0.9},
        )

    straight = train.run(config("straight"))
    feedback = pq.read_table(straight / "feedback.parquet").to_pylist()
    assert len(feedback) == 200
    for pair in feedback[::17]:
        pictures = pq.read_table(pair["file"]).slice(pair["row"] - 1, 1).to_pylist()[0]
        scores = [greenness([decode_image(pictures[side])], None, None)[0] for side in ("jpg_0", "jpg_1")]
        assert [pair["score_0"], pair["score_1"]] == pytest.approx(scores)
        assert pair["winner"] == int(scores[1] > scores[0]) and pair["human"] == int(pictures["label_0"] == 0)
    swapped = np.mean([pair["winner"] != pair["human"] for pair in feedback])
    rows = metric_rows(straight)
    assert rows[0]["feedback/swapped"] == pytest.approx(swapped) and 0.05 < swapped < 0.95
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 4 and steps[0]["train/loss"] == pytest.approx(np.log(2)) != steps[3]["train/loss"]
    assert [row["step"] for row in rows if "eval/implicit_acc" in row] == [0, 2, 4]
    for folder in ("exports/step_000002/unet", "exports/step_000004/unet", "final/unet", "final/ema_unet"):
        unet = diffusers.UNet2DConditionModel.from_pretrained(straight / folder)
        names = set(SafetensorsFolder(straight / folder).where)
        assert names == set(unet.state_dict())

    monkeypatch.setattr(train, "Reporter", StopsAt)
    StopsAt.step = 4
    with pytest.raises(OSError, match="no space left"):
        train.run(config("broken"))
    monkeypatch.setattr(train, "Reporter", Reporter)
    resumed = train.run(config("broken"))
    assert metric_rows(resumed) == rows
    for folder in ("exports/step_000002/unet", "exports/step_000004/unet", "final/unet"):
        one, other = (load_file(next((path / folder).glob("*.safetensors"))) for path in (straight, resumed))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@slow
@needs_grocery
def test_xl_trains_a_lora_on_the_fly_with_random_crops_and_the_file_loads(
    cluster, stable_diffusion_xl, grocery, tmp_path
):
    config = offline_config(
        tmp_path,
        stable_diffusion_xl,
        grocery,
        data={"latents": "on_the_fly", "crop": "random", "shuffle_blocks": 2},
        eval={"max_pairs": 8, "every": 3},
        model={"height": 32, "width": 32},
        trainable={"kind": "lora", "rank": 4, "alpha": 8.0},
        trainer={
            "optimizer": "adafactor",
            "max_train_steps": 3,
            "effective_batch_size": 16,
            "gradient_accumulation_steps": 2,
        },
        preprocess={"batch_size": 4, "encoders": 2, "num_cpus": 0.2},
    )
    path = train.run(config)
    steps = [row for row in metric_rows(path) if "train/loss" in row]
    assert len(steps) == 3 and steps[2]["train/loss"] != pytest.approx(np.log(2), abs=1e-6)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(stable_diffusion_xl)
    before = set(pipeline.unet.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(path / "final" / "lora")
    saved = SafetensorsFolder(path / "final" / "lora" / LORA_FILE).where
    loaded = {name for name in pipeline.unet.state_dict() if ".lora_" in name}
    assert len(saved) == len(loaded) > 0 and not loaded & before
    assert all(name.startswith("unet.") for name in saved)


class LosesAnEncoder(Reporter):
    """A reporter that sees an encoder killed for good after step 3, once."""

    feeds: ClassVar[list[Feed]] = []

    def log(self, step, scalars):
        super().log(step, scalars)
        if step == 3 and "train/lr" in scalars and len(self.feeds) == 1:
            ray.kill(self.feeds[0]._encoders[0])


@slow
def test_an_encoder_that_is_gone_is_rebuilt_with_the_ranks_and_no_step_is_lost(
    cluster, stable_diffusion, tmp_path, monkeypatch, capsys
):
    class Kept(Feed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            LosesAnEncoder.feeds.append(self)

    monkeypatch.setattr(train, "Reporter", LosesAnEncoder)
    monkeypatch.setattr(train, "Feed", Kept)
    data = write_parquet(tmp_path / "pairs.parquet", [row(i, i % 2) for i in range(24)])
    config = offline_config(
        tmp_path,
        stable_diffusion,
        data,
        data={"latents": "on_the_fly", "shuffle_blocks": 2},
        eval={"path": None},
        model={"height": 32, "width": 32},
        trainer={"max_train_steps": 8, "gradient_accumulation_steps": 1, "train_batch_size": 2},
    )
    path = train.run(config)
    assert len(LosesAnEncoder.feeds) == 2
    assert "an encoder is gone" in capsys.readouterr().err
    assert [row["step"] for row in metric_rows(path) if "train/loss" in row] == list(range(1, 9))
    assert (path / "final" / "unet").is_dir() and list((path / "discarded").rglob("metrics.jsonl"))


@slow
def test_a_run_goes_on_with_the_same_pairs_on_fewer_ranks(cluster, stable_diffusion, tmp_path, monkeypatch):
    """An update's micro-batches are the same, in the same places; their gradients are added up in another order."""
    data = write_parquet(tmp_path / "pairs.parquet", [row(i, i % 2) for i in range(24)])
    beta = 10.0
    # With so large an epsilon Adam's steps are plain ones: with 1e-8 it makes a whole step of a gradient that is rounding.
    plain = {"learning_rate": 0.3, "adam_epsilon": 1.0}

    def config(name, **trainer):
        return offline_config(
            tmp_path,
            stable_diffusion,
            data,
            run={"name": name},
            eval={"path": None},
            model={"height": 32, "width": 32, "dtype": "float32"},
            dpo={"beta": beta},
            trainer=plain | {"train_batch_size": 2} | trainer,
        )

    straight = train.run(config("straight"))
    monkeypatch.setattr(train, "Reporter", StopsAt)
    StopsAt.step = 3
    with pytest.raises(OSError, match="no space left"):
        train.run(config("shrunk"))
    monkeypatch.setattr(train, "Reporter", Reporter)
    shrunk = train.run(config("shrunk", ranks=1, gradient_accumulation_steps=4))
    rows = metric_rows(straight)
    # Weights that differ in the last bits round predictions otherwise: errors of random signs, eps × √terms of the longest
    # sum, a convolution over 3×3 of 64 channels. A logit, and with it a gradient, is β / 2 times four errors that cancel.
    errors = 4 * max(max(row["train/winner_error"], row["train/loser_error"]) for row in rows)
    rounding = torch.finfo(torch.float32).eps * math.sqrt(9 * 64) * (1 + beta / 2 * errors)
    assert np.diff(sorted(row["train/loss"] for row in rows)).min() > 5 * rounding, "other pairs would not show"
    for one, other in zip(rows, metric_rows(shrunk), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=0, abs=rounding), one["step"]
    start, one, other = (
        load_file(next(path.glob("*.safetensors")))
        for path in (stable_diffusion / "unet", straight / "final" / "unet", shrunk / "final" / "unet")
    )
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert all((one[name] - other[name]).abs().max() <= rounding * moved for name in one)


@slow
def test_an_online_runs_pairs_replay_with_the_same_losses(cluster, judge_server, kontext, tmp_path):
    """Same latents, conditions, (t, noise) and versions: then every loss is the online one, also after a refresh."""
    write_photos(tmp_path)
    online = light_config(
        tmp_path,
        kontext,
        judge_server(reject=0.2),
        trainer=light_config(tmp_path, kontext, "").trainer.model_dump() | {"max_train_steps": 4, "ema_decay": None},
    )
    recorded = run_online(online)
    replay = offline_config(
        tmp_path,
        kontext,
        recorded / "pairs",
        run={"name": "replay"},
        model={"family": "flux_kontext", "height": 48, "width": 32},
        data={"shuffle": False, "hflip": False, "caption_dropout": 0.0, "cache": online.data.cache},
        eval={"path": None},
        dpo=online.dpo.model_dump(),
        trainer=online.trainer.model_dump(),
    )
    path = train.run(replay)
    theirs, ours = ([row for row in metric_rows(run) if "train/loss" in row] for run in (recorded, path))
    assert len(ours) == 4 and ours[1]["train/loss"] != pytest.approx(np.log(2), abs=1e-4)
    for mine, their in zip(ours, theirs, strict=True):
        assert {n: v for n, v in mine.items() if n.startswith("train/")} == {
            n: v for n, v in their.items() if n.startswith("train/")
        }


@slow
@pytest.mark.parametrize("latents", ["cached", "on_the_fly"])
def test_kontext_trains_offline_from_a_jsonl_by_sft(cluster, kontext, tmp_path, latents):
    """Losers may be there or not: neither is looked at by the loss, and none is encoded."""
    file = write_jsonl(tmp_path, 12, source=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[::2]:
        del line["loser"]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = offline_config(
        tmp_path,
        kontext,
        file,
        data={"latents": latents},
        objective="sft",
        model={"family": "flux_kontext", "height": 48, "width": 32, "dtype": "float16"},
        eval={"path": None},
        trainer={"train_batch_size": 2, "gradient_accumulation_steps": 1},
    )
    path = train.run(config)
    steps = [row for row in metric_rows(path) if "train/loss" in row]
    assert len(steps) == 4 and all(row["train/loss_scale"] > 0 and "train/implicit_acc" not in row for row in steps)
    assert not (path / "checkpoint_000004" / "state" / "reference.safetensors").exists()
    pictures = [place for place in read_manifest(config.data.cache).places.values() if place.names == ("latents",)]
    assert len(pictures) == (2 * 2 * 12 if latents == "cached" else 0), "winners and sources, as they are and mirrored"
    diffusers.FluxTransformer2DModel.from_pretrained(path / "final" / "transformer")


BROKEN = {7: {"jpg_1": b"no picture"}, 21: {"label_0": None}, 30: {"caption": ""}}
"""Row number (from 1) → what is wrong with it: about 5 % of the file, one of each kind."""


def broken_file(folder):
    rows = [row(i) | BROKEN.get(i + 1, {}) for i in range(60)]
    return write_parquet(folder / "pairs.parquet", rows, row_group_size=16)


def test_broken_rows_stop_the_job_with_their_numbers_or_are_left_out_and_listed(stable_diffusion, tmp_path, capsys):
    file = broken_file(tmp_path)
    with pytest.raises(BadInput, match="the input has 3 problems") as error:
        dry_run(tmp_path, stable_diffusion, file, eval={"path": None})
    for number, what in ((7, "jpg_1: is unreadable"), (21, "label_0: is missing"), (30, "caption: is empty")):
        assert f"{file} row {number}: {what}" in str(error.value)
    dry_run(tmp_path, stable_diffusion, file, eval={"path": None}, data={"on_bad_row": "skip"})
    said = capsys.readouterr().out
    assert "left out: 3 problems; going on with 57 examples" in said and f"{file} row 21" in said
    assert "16 pairs a step = 2 ranks × 4 a micro-batch × 2 accumulated; learning rate 0.001" in said
    assert "trainer rank" in said and "disk: " in said


@slow
def test_the_commands_of_a_sound_run_print_their_own_lines_alone(stable_diffusion, tmp_path):
    recipe = tmp_path / "recipe.toml"
    trainer = {"ranks": 1, "max_train_steps": 2}
    tables = offline_tables(tmp_path, stable_diffusion, write_jsonl(tmp_path, 32), eval={"path": None}, trainer=trainer)
    recipe.write_text(tomli_w.dumps(tables))
    run = str(tmp_path / "runs/offline")
    printed = []
    for job, *words in (("train", "--config", recipe), ("report", run)):
        command = [sys.executable, "-m", f"jobs.{job}", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 and not foreign_lines(done.stdout + done.stderr), done.stdout + done.stderr
        printed.append(done.stdout)
    assert f"results: {run}/v0" in printed[0] and printed[1] == f"{run}/v0/report.html\n"


@slow
def test_a_run_that_skips_broken_rows_keeps_the_list(cluster, stable_diffusion, tmp_path):
    file = broken_file(tmp_path)
    settings = {"eval": {"path": None}, "model": {"height": 32, "width": 32}, "trainer": {"max_train_steps": 1}}
    with pytest.raises(BadInput, match="the input has 3 problems"):
        train.run(offline_config(tmp_path, stable_diffusion, file, **settings))
    config = offline_config(tmp_path, stable_diffusion, file, data={"on_bad_row": "skip"}, **settings)
    path = train.run(config)
    listed = (path / "left_out.txt").read_text()
    assert all(f"row {number}: " in listed for number in BROKEN)
    assert [row["step"] for row in metric_rows(path)] == [1]


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"data": {"crop": "random"}}, 'set latents = "on_the_fly" or crop = "centre"'),
        ({"data": {"choice_model": "pickscor"}}, "which is no judge; did you mean 'pickscore'?"),
        ({"data": {"choice_model": "hps"}}, r"needs judges\.hps\.path"),
        ({"data": {"choice_model": "ctr"}, "judges": {"ctr": {"path": "x"}}}, r"'ctr' needs data\.item_metadata"),
        ({"data": {"path": "nowhere"}}, r"nowhere: no such file or folder; set data\.path to a \.parquet"),
        ({"eval": {"path": None}, "model": {"family": "flux_kontext"}}, r"model\.path = "),
        ({"model": {"height": 20}}, r"\[model\] height = 20: should be a multiple of 8"),
        (
            {"eval": {"path": None}, "trainable": {"kind": "modules", "patterns": ["attn3"]}},
            r"trainable\.patterns: 'attn3' matches no module",
        ),
        ({"trainer": {"train_batch_size": 16}}, r"has 8 pairs, of which eval\.max_pairs = 8 are used"),
        ({}, r"8 of 8 pairs of eval\.path"),
    ],
)
def test_misuse_is_told_before_anything_starts(stable_diffusion, tmp_path, tables, what):
    file = write_parquet(tmp_path / "pairs.parquet", [row(i) for i in range(8)])
    with pytest.raises(Refused, match=what):
        dry_run(tmp_path, stable_diffusion, file, **tables)


def test_kontext_cannot_take_half_a_patch(kontext, tmp_path):
    model = {"family": "flux_kontext", "height": 40, "width": 32}
    pairs = write_jsonl(tmp_path, 2, source=True)
    with pytest.raises(Refused, match=r"40×32 pixels \(model.height, model.width\): this model needs multiples of 16"):
        dry_run(tmp_path, kontext, pairs, model=model, eval={"path": None})


def test_an_edit_family_needs_sources(kontext, tmp_path):
    file = write_parquet(tmp_path / "pairs.parquet", [row(i) for i in range(8)])
    model = {"family": "flux_kontext", "height": 48, "width": 32}
    with pytest.raises(BadInput, match="an edit family learns from a JSONL of winner, loser, prompt, source"):
        dry_run(tmp_path, kontext, file, model=model, eval={"path": None})
