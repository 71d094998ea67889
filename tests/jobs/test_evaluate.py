"""jobs.evaluate as users start it, on tiny models: greener weights win, equal weights tie, failures stay failures."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import save_file

import jobs
from rlhf.evaluation.page import number, percent
from rlhf.models import FAMILIES
from rlhf.models.family import sample_batch
from rlhf.models.tiny import write_stable_diffusion
from rlhf.tables import SamplingTable
from rlhf.types import Geometry, noise_from
from tests.console import foreign_lines
from tests.encoded import condition_of
from tests.processes import assert_gone
from tests.rlhf.evaluation.test_page import Page

ROOT = Path(jobs.__file__).parents[1]
PORT = 8147
SIZE = 32
GEOMETRY = Geometry(height=SIZE, width=SIZE)
GREENNESS = {"python": {"greenness": {"function": "tests.jobs.light:greenness", "num_cpus": 0.1}}}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def write_texts(folder, count=6):
    (folder / "prompts.txt").write_text("".join(f"a red apple, number {i}\n" for i in range(count)))
    return folder / "prompts.txt"


def write_edits(folder, count=6):
    random, rows = np.random.default_rng(0), []
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        prompt = '<script>alert("warm")</script>' if i == 0 else f"make it warm {i}"
        rows.append(json.dumps({"image_id": str(i), "prompt": prompt, "image": f"{i}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def recipe(folder, family, model, tuned, data, **tables):
    """Written to `folder`; returns its path. `tables` replace sections."""
    base = {
        "out": str(folder / "out"),
        "model": {"family": family, "path": str(model), "height": SIZE, "width": SIZE, "dtype": "float32"},
        "tuned": tuned,
        "data": {"path": str(data)},
        "sampling": {"steps": 2, "seeds": 2, "batch_size": 4},
        "reward": {"weights": {"greenness": 1.0}},
        "judges": GREENNESS,
        "samplers": {"num_cpus": 0.5, "num_gpus": 0.0, "timeout_s": 300.0},
        "serve": {"port": PORT},
        "cluster": {"address": "local", "num_cpus": 2.0, "object_store_memory": 200_000_000},
    }
    (folder / "evaluate.toml").write_text(tomli_w.dumps(base | tables))
    return folder / "evaluate.toml"


def command(path, *options):
    return [sys.executable, "-m", "jobs.evaluate", "--config", str(path), *options]


def evaluate(path, *options):
    """The job to its end: (status, stdout, stderr)."""
    done = subprocess.run(command(path, *options), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode or not foreign_lines(done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stderr


def results_of(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def greenest(family, denoiser, bias):
    """What to add to the last layer's output for greener pictures: the best of all channels, up and down."""
    codec, shape = family.load_codec("cpu"), family.latent_shape(GEOMETRY)
    source = torch.full((4, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    condition, unguided = (condition_of(family, codec, [text] * 4, source) for text in ("a red apple", ""))
    noise = torch.stack([noise_from(i, shape) for i in range(4)])

    def green(shift):
        with torch.no_grad():
            bias.add_(shift)
            x0 = sample_batch(family, denoiser, condition, unguided, noise, SamplingTable(steps=2))
            pictures = codec.decode(x0).float()
            bias.sub_(shift)
        return pictures[..., 1].mean(dim=(1, 2, 3))

    base = green(torch.zeros_like(bias))
    shifts = [sign * 20 * unit for unit in torch.eye(len(bias)) for sign in (-1, 1)]
    return max(shifts, key=lambda shift: float((green(shift) - base).min()))


def greener_unet(model, folder):
    """A trained folder: the base with another bias in its last layer."""
    family = FAMILIES["stable_diffusion"](path=model, dtype=torch.float32)
    unet = family.load_denoiser("cpu")
    with torch.no_grad():
        unet.conv_out.bias += greenest(family, unet, unet.conv_out.bias)
    unet.save_pretrained(folder)
    return folder


def greener_lora(model, folder):
    """A LoRA of rank 1 on the last layer: what the hidden states have in common is turned into a constant."""
    family = FAMILIES["flux_kontext"](path=model, dtype=torch.float32)
    transformer, codec, hidden = family.load_denoiser("cpu"), family.load_codec("cpu"), []
    shift = greenest(family, transformer, transformer.proj_out.bias)
    transformer.proj_out.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0]))
    source = torch.full((1, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    condition = condition_of(family, codec, ["make it warm"], source)
    noise = noise_from(0, (1, *family.latent_shape(GEOMETRY)))
    with torch.no_grad():
        for t in (1.0, 0.5):
            family.predict(transformer, noise, torch.tensor([t]), condition)
    common = torch.cat([h.flatten(0, 1) for h in hidden]).mean(dim=0)
    folder.mkdir()
    weights = {"lora_A": (common / common.square().sum())[None], "lora_B": shift[:, None]}
    save_file(
        {f"transformer.proj_out.{name}.weight": value.contiguous() for name, value in weights.items()},
        folder / "pytorch_lora_weights.safetensors",
    )
    return folder


def check_outcome(folder, judge="greenness"):
    """Tuned wins with an interval above one half; the folder is complete and the page agrees with the numbers."""
    results, out = results_of(folder), folder / "out"
    found = results["judges"][judge]
    assert found["win_rate"]["value"] > 0.9 and found["win_rate"]["low"] > 0.5, found
    assert found["difference"]["low"] > 0
    assert (found["prompts"], found["pairs"], found["left_out"]) == (6, 12, 0)
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert all((out / link).is_file() for link in page.links if not link.startswith("#"))
    assert percent(found["win_rate"]["value"]) in page.text and "tuned is preferred" in page.text
    for duel in results["duels"]:
        for side in ("base", "tuned"):
            picture = np.asarray(Image.open(out / duel[side]["file"]))
            score = duel[side]["scores"][judge]
            assert score == pytest.approx(picture[..., 1].mean() / 255, abs=1e-6)  # the judge saw what lies there
            assert number(score) in page.text
    assert results["config"]["sampling"]["steps"] == 2
    return results, page


@pytest.mark.slow
def test_a_denoiser_that_paints_greener_wins(diffusion, tmp_path):
    tuned = {"denoiser": str(greener_unet(diffusion, tmp_path / "unet"))}
    path = recipe(tmp_path, "stable_diffusion", diffusion, tuned, write_texts(tmp_path))
    status, out, error = evaluate(path)
    assert status == 0, out + error
    results, _ = check_outcome(tmp_path)
    assert results["source"] is None and len(list((tmp_path / "out" / "pictures").iterdir())) == 24
    status, _, error = evaluate(path)
    assert status == 2 and "never overwritten" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_lora_that_edits_greener_wins_and_the_source_is_measured(kontext, tmp_path):
    tuned = {"lora": str(greener_lora(kontext, tmp_path / "lora"))}
    path = recipe(tmp_path, "flux_kontext", kontext, tuned, write_edits(tmp_path))
    status, out, error = evaluate(path)
    assert status == 0, out + error
    assert (
        "cuts off the end of 1 instructions (1 of 6 prompts)" in out and "(prompt '0')" in out
    )  # the markup, 29 letters
    results, page = check_outcome(tmp_path)
    assert '<script>alert("warm")</script>' in page.text and "script" not in page.tags
    assert results["source"]["pairs"] == 12 and "source distance" in page.text
    assert results["source"]["tuned"] == pytest.approx(
        np.mean([duel["tuned"]["source_distance"] for duel in results["duels"]])
    )


@pytest.mark.slow
def test_equal_weights_only_tie_and_a_failing_judge_is_listed(kontext, tmp_path, judge_server):
    """No Serve at all: the judge is elsewhere. Its failures depend on the pixels, so both pictures of a pair fail.

    Which those are differs between CPUs, and none or all of 24 pairs fail once in eight million.
    """
    path = recipe(
        tmp_path,
        "flux_kontext",
        kontext,
        {"denoiser": str(kontext / "transformer")},
        write_edits(tmp_path, 12),
        reward={"weights": {"hps": 1.0}},
        judges={"hps": {"url": f"{judge_server(fail=1.0)}/hpsv2"}, "retries": 0},
    )
    status, out, error = evaluate(path)
    assert status == 2 and "judge 'hps' failed 10 of its last 10 calls" in error and "on purpose" in error, out + error
    assert not (tmp_path / "out" / "results.json").exists()

    fewer = ("--judges.hps.url", f"{judge_server(fail=0.5)}/hpsv2", "--judges.max_failure_rate", "1.0")
    status, out, error = evaluate(path, *fewer)
    assert status == 0, out + error
    assert "\n0 pictures to paint, 48 are there" in out
    results = results_of(tmp_path)
    found = results["judges"]["hps"]
    assert (found["wins"], found["losses"]) == (0, 0) and found["ties"] == found["pairs"]
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert 0 < found["left_out"] == 24 - found["pairs"] < 24 and len(results["failed"]) == 2 * found["left_out"]
    unscored = {
        duel[side]["file"] for duel in results["duels"] for side in ("base", "tuned") if not duel[side]["scores"]
    }
    assert unscored == {failure["file"] for failure in results["failed"]}
    assert results["source"]["difference"]["value"] == 0.0
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert f"{found['left_out']} left out: not scored" in page.text and "on purpose" in page.text


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running_and_the_next_start_goes_on(diffusion, tmp_path):
    """The signal comes after the first picture, when 23 are left, of 200 steps each: seconds of work on any machine."""
    tuned = {"denoiser": str(diffusion / "unet")}
    slowly = {"steps": 200, "seeds": 2, "batch_size": 1}
    path = recipe(tmp_path, "stable_diffusion", diffusion, tuned, write_texts(tmp_path), sampling=slowly)
    process = subprocess.Popen(
        command(path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: what a shell starts in the background ignores the signal, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout:
            if line.startswith("painted: 1/24"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "goes on" in error and "Traceback" not in error
    assert_gone((child.pid for child in children), within_s=60)
    kept = len(list((tmp_path / "out" / "pictures").glob("*.png")))
    assert 1 <= kept < 24
    status, _, error = evaluate(path, "--sampling.steps", "3")
    assert status == 2 and "begun with other values of sampling.steps" in error


@pytest.mark.slow
def test_a_dry_run_says_what_it_would_do_and_starts_nothing(diffusion, tmp_path):
    tuned = {"denoiser": str(diffusion / "unet")}
    path = recipe(tmp_path, "stable_diffusion", diffusion, tuned, write_texts(tmp_path))
    status, out, error = evaluate(path, "--dry-run")
    assert status == 0, error
    assert "[model]" in out and "6 prompts × 2 seeds × (base, tuned)" in out
    assert "sampler " in out and "judge greenness" in out
    assert not (tmp_path / "out").exists()
    status, _, error = evaluate(path, "--dry-run", "--samplers.num_gpus", "8")
    assert status == 2 and "8 GPU needed" in error
    status, _, error = evaluate(path, "--dry-run", "--judges.python.greenness.function", "tests.jobs.light:redness")
    assert status == 2 and "redness" in error and "Traceback" not in error


@pytest.mark.slow
def test_bad_input_is_said_at_once_and_nothing_starts(diffusion, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": ""}\n{no json\n')
    path = recipe(tmp_path, "stable_diffusion", diffusion, {"denoiser": str(tmp_path)}, rows)
    status, _, error = evaluate(path)
    assert status == 2 and "the input has 3 problems" in error and "Traceback" not in error
    assert "rows.jsonl:1: prompt: is empty" in error and "rows.jsonl:2: is not JSON" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_edits_with_empty_instructions_need_a_text_for_judges_that_read_one(kontext, tmp_path):
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "1.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image_id": "1", "prompt": "", "image": "1.png"}))
    tuned = {"denoiser": str(kontext / "transformer")}
    path = recipe(tmp_path, "flux_kontext", kontext, tuned, tmp_path / "rows.jsonl")
    status, _, error = evaluate(path, "--dry-run")
    assert status == 2 and "'1' leaves the judges nothing to read" in error and "reward.empty_prompt" in error
    status, _, error = evaluate(path, "--dry-run", "--reward.empty_prompt", "food")
    assert status == 0, error
