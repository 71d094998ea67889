"""jobs.edit as users start it, on a tiny Kontext: pictures, seeds, tuned weights, and what is refused before it paints."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs import edit as job
from rlhf.models import load_family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.tables import ModelTable
from tests.console import foreign_lines

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def world(tmp_path, kontext, monkeypatch, capsys):
    """`world(*options)` runs the job in a folder with two photos: (exit status, stdout, stderr)."""
    random = np.random.default_rng(0)
    for name in ("1", "2"):
        Image.fromarray(random.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)

    def run(*options, image="1.png"):
        given = {"--model.path": str(kontext), "--model.height": "48", "--model.width": "32", "--sampling.steps": "1"}
        given |= {"--edit.image": image, "--edit.prompt": "warm light", "--edit.device": "cpu"} if image else {}
        monkeypatch.setattr(sys, "argv", ["edit", *(word for pair in given.items() for word in pair), *options])
        with pytest.raises(SystemExit) as ended:
            job.run_main(job.main)
        return ended.value.code, *capsys.readouterr()

    return run


def pictures(folder):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def transformer(kontext, folder, change):
    """A trained folder: the base, changed."""
    denoiser = load_family(ModelTable(path=str(kontext), dtype="float32")).load_denoiser("cpu")
    with torch.no_grad():
        change(denoiser)
    denoiser.save_pretrained(folder)
    return str(folder)


def lora(kontext, file, scale=1.0):
    """A LoRA on one layer; returns its path."""
    weight = load_file(next((kontext / "transformer").glob("*.safetensors")))[f"{LAYER}.weight"]
    g = torch.Generator().manual_seed(0)
    halves = {
        "lora_A": torch.randn(2, weight.shape[1], generator=g),
        "lora_B": torch.randn(len(weight), 2, generator=g),
    }
    save_file({f"transformer.{LAYER}.{half}.weight": value * scale for half, value in halves.items()}, file)
    return str(file)


def test_one_picture_gives_its_variants_at_the_size_asked_for_and_again_the_same(world, tmp_path):
    status, out, error = world("--edit.variants", "2")
    found = pictures(tmp_path / "edits")
    assert status == 0 and list(found) == ["1_0.png", "1_1.png"] and not foreign_lines(out + error)
    assert out.splitlines() == [str(tmp_path / "edits" / name) for name in found]
    assert all(picture.shape == (48, 32, 3) for picture in found.values())
    assert not np.array_equal(*found.values())
    world("--edit.variants", "2", "--edit.out", "again")
    world("--edit.variants", "2", "--edit.out", "other", "--edit.seed", "1")
    again, other = pictures(tmp_path / "again"), pictures(tmp_path / "other")
    for name, picture in found.items():
        assert np.array_equal(picture, again[name]) and not np.array_equal(picture, other[name])


def test_a_table_gives_a_picture_of_each_row(world, tmp_path):
    rows = [{"image_id": f"dish {i}", "prompt": "warm", "image": f"{i}.png"} for i in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, _, _ = world("--edit.data", "rows.jsonl", "--edit.device", "cpu", image=None)
    assert status == 0 and len(pictures(tmp_path / "edits")) == 2


def test_tuned_weights_change_the_picture_and_those_that_change_nothing_do_not(world, kontext, tmp_path):
    same = transformer(kontext, tmp_path / "same", lambda denoiser: None)
    moved = transformer(kontext, tmp_path / "moved", lambda denoiser: denoiser.proj_out.bias.add_(3.0))
    cases = {
        "base": (),
        "same": ("--tuned.denoiser", same),
        "zero": ("--tuned.lora", lora(kontext, tmp_path / "zero.safetensors", 0.0)),
        "moved": ("--tuned.denoiser", moved),
        "lora": ("--tuned.lora", lora(kontext, tmp_path / "lora.safetensors")),
    }
    found = {}
    for name, options in cases.items():
        status, _, error = world("--edit.out", name, *options)
        assert status == 0, error
        found[name] = pictures(tmp_path / name)["1_0.png"]
    for name in ("same", "zero"):
        assert np.array_equal(found[name], found["base"]), name
    for name in ("moved", "lora"):
        assert not np.array_equal(found[name], found["base"]), name


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("diffusion_model", "does not fit: diffusion_model.x.lora_A.weight names no adapter of a layer of this Flux"),
        ("base_model.model", "does not fit: base_model.model.x.lora_A.weight names no adapter of a layer"),
        ("lora_unet_x", "does not fit: lora_unet_x.x.lora_A.weight names no adapter of a layer"),
        ("lycoris_x", "has 2 of 2 keys that are not read: 2 in LyCORIS' layout"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_before_anything_loads(world, tmp_path, dry, prefix, says):
    save_file({f"{prefix}.x.lora_{ab}.weight": torch.zeros(2, 2) for ab in "AB"}, tmp_path / "lora.safetensors")
    status, out, error = world("--tuned.lora", str(tmp_path / "lora.safetensors"), *dry)
    assert status == 2 and not out and "Traceback" not in error and not (tmp_path / "edits").exists()
    assert f"lora.safetensors: tuned.lora: {says}" in error


def test_a_denoiser_of_another_model_is_refused_before_anything_loads(world, kontext, tmp_path):
    status, _, error = world("--tuned.denoiser", str(kontext / "vae"), "--dry-run")
    assert status == 2 and "tuned.denoiser: " in error and "AutoencoderKL" in error


def test_weights_that_give_nan_paint_nothing(world, kontext, tmp_path):
    broken = transformer(kontext, tmp_path / "broken", lambda denoiser: denoiser.proj_out.bias.fill_(float("nan")))
    status, out, error = world("--tuned.denoiser", broken)
    assert status == 2 and not out and not pictures(tmp_path / "edits") and "Traceback" not in error
    assert f"no picture of '1' with tuned.denoiser = {broken!r}: the denoiser gives NaN or infinity" in error


def test_an_instruction_that_is_cut_or_unknown_is_told(world, tmp_path):
    status, out, _ = world("--edit.prompt", "Give it a warm and sunny light, and a blue plate")
    assert status == 0 and (tmp_path / "edits/1_0.png").exists()
    assert "WARNING: the text encoder cuts off the end of 1 instructions (1 of 1 prompts)" in out
    assert "cut off: Give it a warm and sunny light, and a blue plate (prompt '1')" in out
    _, out, _ = world("--edit.prompt", "更亮", "--edit.out", "other")
    assert "100% unknown: 更亮 (prompt '1')" in out and "cut off" not in out
    _, out, _ = world("--edit.out", "third")
    assert "WARNING" not in out


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_no_picture_is_overwritten(world, tmp_path, dry):
    world("--edit.variants", "2")
    before = {file: file.read_bytes() for file in (tmp_path / "edits").iterdir()}
    status, out, error = world("--edit.variants", "3", "--edit.seed", "1", *dry)
    assert status == 2 and not out and {file: file.read_bytes() for file in (tmp_path / "edits").iterdir()} == before
    assert "2 of the 3 pictures are there already, the first is 1_0.png; choose another folder" in error


def test_a_row_with_more_pictures_than_the_model_takes_is_told_with_its_line(world, tmp_path):
    rows = [
        {"image_id": "a", "prompt": "warm", "image": "1.png"},
        {"image_id": "b", "prompt": "warm", "image": ["1.png", "2.png"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, _, error = world("--edit.data", "rows.jsonl", "--edit.device", "cpu", image=None)
    assert status == 2 and "rows.jsonl:2: image: names 2 pictures, but the model takes 1; give that many" in error


def test_what_would_be_ignored_is_refused(world, tmp_path):
    painter = write_stable_diffusion(tmp_path / "painter")
    status, _, said = world("--model.path", str(painter), "--model.family", "stable_diffusion", "--dry-run")
    assert status == 2 and "model.family = 'stable_diffusion' sees no picture, and so edits none" in said
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image_id": "1", "prompt": "cooler", "image": "1.png"}))
    status, _, said = world("--edit.data", "rows.jsonl", "--edit.prompt", "warmer", "--edit.device", "cpu", image="")
    assert status == 2 and "prompt = 'warmer' belongs to image" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(world):
    for key in ("edit.device", "edit.encoder_device"):
        status, _, said = world(f"--{key}", "cuda", "--dry-run")
        assert status == 2 and f'{key} = "cuda", but torch finds no GPU here; set "cpu" or leave it out' in said


def test_what_is_no_picture_is_refused(world, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for image, says in (("none.png", "is no file"), ("text.png", "is unreadable")):
        status, _, error = world(image=image)
        assert status == 2 and f"edit.image = '{tmp_path / image}' {says}" in error and "Traceback" not in error


def test_a_dry_run_says_how_many_and_paints_nothing(world, tmp_path):
    status, out, _ = world("--edit.variants", "3", "--dry-run")
    assert status == 0 and out.endswith(f"1 pictures × 3 variants → {tmp_path / 'edits'}\n")
    assert not (tmp_path / "edits").exists()
