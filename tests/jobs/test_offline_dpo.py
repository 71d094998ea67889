"""The whole offline job: real pairs of photos, two ranks, a judge that relabels, replay of an online run, and its stops."""

import json
import warnings
from typing import ClassVar

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.pair_encoders import PairFeed
from actors.reporting import Reporter
from jobs import offline_dpo, online_dpo
from jobs.preprocess import read_data
from rlhf.data.cache import read_manifest
from rlhf.data.media import decode_image
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.models.tiny import write_stable_diffusion
from rlhf.shards.files import SafetensorsFolder
from tests.conftest import SERVE_PORT
from tests.jobs.light import greenness, light_config, metric_rows, write_photos
from tests.jobs.offline_world import needs_grocery, offline_config, write_grocery
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

    straight = offline_dpo.run(config("straight"))
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
        names = SafetensorsFolder(straight / folder).names()
        assert names == set(unet.state_dict())

    monkeypatch.setattr(offline_dpo, "Reporter", StopsAt)
    StopsAt.step = 4
    with pytest.raises(OSError, match="no space left"):
        offline_dpo.run(config("broken"))
    monkeypatch.setattr(offline_dpo, "Reporter", Reporter)
    resumed = offline_dpo.run(config("broken"))
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
        trainer={
            "lora": {"rank": 4, "alpha": 8.0},
            "optimizer": "adafactor",
            "max_train_steps": 3,
            "effective_batch_size": 16,
            "gradient_accumulation_steps": 2,
        },
        preprocess={"batch_size": 4, "encoders": 2, "num_cpus": 0.2},
    )
    path = offline_dpo.run(config)
    steps = [row for row in metric_rows(path) if "train/loss" in row]
    assert len(steps) == 3 and steps[2]["train/loss"] != pytest.approx(np.log(2), abs=1e-6)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(stable_diffusion_xl)
    before = set(pipeline.unet.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(path / "final" / "lora")
    saved = SafetensorsFolder(path / "final" / "lora").names()
    loaded = {name for name in pipeline.unet.state_dict() if ".lora_" in name}
    assert len(saved) == len(loaded) > 0 and not loaded & before
    assert all(name.startswith("unet.") for name in saved)


class LosesAnEncoder(Reporter):
    """A reporter that sees an encoder killed for good after step 3, once."""

    feeds: ClassVar[list[PairFeed]] = []

    def log(self, step, scalars):
        super().log(step, scalars)
        if step == 3 and "train/lr" in scalars and len(self.feeds) == 1:
            ray.kill(self.feeds[0]._encoders[0])


@slow
def test_an_encoder_that_is_gone_is_rebuilt_with_the_ranks_and_no_step_is_lost(
    cluster, stable_diffusion, tmp_path, monkeypatch, capsys
):
    class Feed(PairFeed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            LosesAnEncoder.feeds.append(self)

    monkeypatch.setattr(offline_dpo, "Reporter", LosesAnEncoder)
    monkeypatch.setattr(offline_dpo, "PairFeed", Feed)
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
    path = offline_dpo.run(config)
    assert len(LosesAnEncoder.feeds) == 2
    assert "an encoder is gone" in capsys.readouterr().err
    assert [row["step"] for row in metric_rows(path) if "train/loss" in row] == list(range(1, 9))
    assert (path / "final" / "unet").is_dir() and list((path / "discarded").rglob("metrics.jsonl"))


@slow
def test_a_run_goes_on_with_the_same_pairs_on_fewer_ranks(cluster, stable_diffusion, tmp_path, monkeypatch):
    data = write_parquet(tmp_path / "pairs.parquet", [row(i, i % 2) for i in range(24)])

    def config(name, **trainer):
        return offline_config(
            tmp_path,
            stable_diffusion,
            data,
            run={"name": name},
            eval={"path": None},
            model={"height": 32, "width": 32},
            trainer={"train_batch_size": 2, "mixed_precision": "no"} | trainer,
        )

    straight = offline_dpo.run(config("straight"))
    monkeypatch.setattr(offline_dpo, "Reporter", StopsAt)
    StopsAt.step = 3
    with pytest.raises(OSError, match="no space left"):
        offline_dpo.run(config("shrunk"))
    monkeypatch.setattr(offline_dpo, "Reporter", Reporter)
    shrunk = offline_dpo.run(config("shrunk", ranks=1, gradient_accumulation_steps=4))
    for one, other in zip(metric_rows(straight), metric_rows(shrunk), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5), one["step"]
    one, other = (load_file(next((path / "final" / "unet").glob("*.safetensors"))) for path in (straight, shrunk))
    assert all((one[name] - other[name]).abs().max() <= 1e-4 for name in one), "a tenth of one step of Adam"


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
    recorded = online_dpo.run(online, read_data(online))
    replay = offline_config(
        tmp_path,
        kontext,
        recorded / "pairs",
        run={"name": "replay"},
        model={"family": "flux_kontext", "height": 48, "width": 32, "guidance_scale": online.rollout.guidance_scale},
        data={"shuffle": False, "hflip": False, "caption_dropout": 0.0, "cache": online.data.cache},
        eval={"path": None},
        dpo=online.dpo.model_dump(),
        trainer=online.trainer.model_dump(),
    )
    path = offline_dpo.run(replay)
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
        model={"family": "flux_kontext", "height": 48, "width": 32},
        eval={"path": None},
        trainer={"train_batch_size": 2, "gradient_accumulation_steps": 1, "mixed_precision": "fp16"},
    )
    path = offline_dpo.run(config)
    steps = [row for row in metric_rows(path) if "train/loss" in row]
    assert len(steps) == 4 and all(row["train/loss_scale"] > 0 and "train/implicit_acc" not in row for row in steps)
    assert not (path / "checkpoint_000004" / "state" / "reference.safetensors").exists()
    targets = [place for place in read_manifest(config.data.cache).places.values() if place.names == ("latents",)]
    assert len(targets) == (2 * 12 if latents == "cached" else 0), "winners as they are and mirrored"
    diffusers.FluxTransformer2DModel.from_pretrained(path / "final" / "transformer")


BROKEN = {7: {"jpg_1": b"no picture"}, 21: {"label_0": None}, 30: {"caption": ""}}
"""Row number (from 1) → what is wrong with it: about 5 % of the file, one of each kind."""


def broken_file(folder):
    rows = [row(i) | BROKEN.get(i + 1, {}) for i in range(60)]
    return write_parquet(folder / "pairs.parquet", rows, row_group_size=16)


def test_broken_rows_stop_the_job_with_their_numbers_or_are_left_out_and_listed(stable_diffusion, tmp_path, capsys):
    file = broken_file(tmp_path)
    config = offline_config(tmp_path, stable_diffusion, file, eval={"path": None})
    with pytest.raises(BadInput, match="the input has 3 problems") as error:
        offline_dpo.dry_run(config)
    for number, what in ((7, "jpg_1: is unreadable"), (21, "label_0: is missing"), (30, "caption: is empty")):
        assert f"{file} row {number}: {what}" in str(error.value)
    offline_dpo.dry_run(
        offline_config(tmp_path, stable_diffusion, file, eval={"path": None}, data={"on_bad_row": "skip"})
    )
    said = capsys.readouterr().out
    assert "left out: 3 problems; going on with 57 pairs" in said and f"{file} row 21" in said
    assert "16 pairs a step = 2 ranks × 4 a micro-batch × 2 accumulated; learning rate 0.001" in said
    assert "trainer rank" in said and "disk: " in said


@slow
def test_a_run_that_skips_broken_rows_keeps_the_list(cluster, stable_diffusion, tmp_path):
    file = broken_file(tmp_path)
    settings = {"eval": {"path": None}, "model": {"height": 32, "width": 32}, "trainer": {"max_train_steps": 1}}
    with pytest.raises(BadInput, match="the input has 3 problems"):
        offline_dpo.run(offline_config(tmp_path, stable_diffusion, file, **settings))
    config = offline_config(tmp_path, stable_diffusion, file, data={"on_bad_row": "skip"}, **settings)
    path = offline_dpo.run(config)
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
        ({"model": {"height": 20}}, r"Input should be a multiple of 8"),
        ({"trainer": {"train_batch_size": 16}}, r"has 8 pairs, of which eval\.max_pairs = 8 are used"),
        ({}, r"8 of 8 pairs of eval\.path"),
    ],
)
def test_misuse_is_told_before_anything_starts(stable_diffusion, tmp_path, tables, what):
    file = write_parquet(tmp_path / "pairs.parquet", [row(i) for i in range(8)])
    with pytest.raises(Refused, match=what):
        offline_dpo.dry_run(offline_config(tmp_path, stable_diffusion, file, **tables))


def test_kontext_cannot_take_half_a_patch(kontext, tmp_path):
    model = {"family": "flux_kontext", "height": 40, "width": 32}
    config = offline_config(tmp_path, kontext, write_jsonl(tmp_path, 2, source=True), model=model, eval={"path": None})
    with pytest.raises(
        ValueError, match=r"40×32 pixels \(model.height, model.width\): this model needs multiples of 16"
    ):
        offline_dpo.dry_run(config)


def test_an_edit_family_needs_sources(kontext, tmp_path):
    file = write_parquet(tmp_path / "pairs.parquet", [row(i) for i in range(8)])
    model = {"family": "flux_kontext", "height": 48, "width": 32}
    with pytest.raises(BadInput, match="an edit family learns from a JSONL of winner, loser, prompt, source"):
        offline_dpo.dry_run(offline_config(tmp_path, kontext, file, model=model, eval={"path": None}))
