"""`jobs.export` as users start it, on a tiny Kontext: layouts there and back, whole weights, and what is refused."""

import json
import sys

import pytest
import tomli_w
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from jobs import export
from rlhf.models.lora import LORA_FILE, MODULES_FILE
from rlhf.models.tiny import write_stable_diffusion
from tests import worlds
from tests.rlhf.models.test_lora_layouts import adapters, assert_same, deltas


@pytest.fixture(scope="module")
def base(kontext):
    return worlds.family(kontext, torch.float32).load_denoiser("cpu")


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """`job(*arguments)`: (exit status, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            export.run_main(export.main)
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def run_folder(tmp_path, kontext, base):
    """runs/NAME with a finished v0 of a LoRA."""
    lora = tmp_path / "runs/name/v0/final/lora"
    lora.mkdir(parents=True)
    save_file(adapters(base), lora / LORA_FILE)
    model = {"family": "flux_kontext", "path": str(kontext), "dtype": "bfloat16", "height": 48, "width": 32}
    (tmp_path / "runs/name/v0/config.toml").write_text(tomli_w.dumps({"model": model}))
    return tmp_path / "runs/name"


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_a_run_s_lora_goes_to_another_layout_and_comes_back(job, run_folder, tmp_path, kontext, base, layout):
    there, back = tmp_path / "there.safetensors", tmp_path / "made" / "back.safetensors"
    assert job(run_folder, "--layout", layout, "--out", there) == (0, "")
    assert all(
        key.startswith({"comfyui": "diffusion_model.", "kohya": "lora_unet_"}[layout]) for key in load_file(there)
    )
    assert job(there, "--model", kontext, "--out", back) == (0, "")
    assert_same(deltas(load_file(back)), deltas(adapters(base)))


def test_a_merged_export_is_the_base_and_what_the_lora_changes(job, run_folder, tmp_path, base):
    assert job(run_folder / "v0", "--form", "merged", "--out", tmp_path / "merged")[0] == 0
    merged = dict(FluxTransformer2DModel.from_pretrained(tmp_path / "merged").named_parameters())
    changes = deltas(adapters(base))
    assert merged.keys() == dict(base.named_parameters()).keys()
    for name, parameter in base.named_parameters():
        expected = parameter.double() + changes.get(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_smaller_dtype_is_written_but_alpha_stays_exact(job, run_folder, tmp_path):
    out = tmp_path / "half.safetensors"
    assert job(run_folder, "--layout", "kohya", "--dtype", "bfloat16", "--out", out)[0] == 0
    for key, value in load_file(out).items():
        assert value.dtype == (torch.float32 if key.endswith(".alpha") else torch.bfloat16)


def test_alpha_in_a_header_is_multiplied_in(job, tmp_path, kontext, base):
    tensors = adapters(base, chosen=lambda name: name.endswith("to_q"))
    about = {"r": 3, "lora_alpha": 6, "target_modules": ["to_q"], "alpha_pattern": {r"transformer_blocks\.1.*": 12}}
    settings = json.dumps({f"transformer.{key}": value for key, value in about.items()})
    save_file(tensors, tmp_path / "scaled.safetensors", {"lora_adapter_metadata": settings})
    assert job(tmp_path / "scaled.safetensors", "--model", kontext, "--out", tmp_path / "out.safetensors")[0] == 0
    expected = {
        name: delta * (4 if name.startswith("transformer_blocks.1.") else 2) for name, delta in deltas(tensors).items()
    }
    assert_same(deltas(load_file(tmp_path / "out.safetensors")), expected)


def test_what_cannot_be_exported_is_refused_with_the_remedy(job, run_folder, tmp_path, kontext, base):
    out = tmp_path / "out.safetensors"
    file = tmp_path / "one.safetensors"
    save_file(adapters(base), file)
    sd = write_stable_diffusion(tmp_path / "sd")
    unet = {
        "unet.conv_out.lora_A.weight": torch.ones(2, 16, 3, 3),
        "unet.conv_out.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    save_file(unet, tmp_path / "unet.safetensors")
    of_sd = ("--model", sd, "--family", "stable_diffusion")
    for arguments, says in [
        ((file, "--out", out), "is a LoRA: give --model, the folder of the model that it belongs to"),
        ((run_folder / "v0/final/lora", "--out", out), "is a LoRA: give --model"),
        ((tmp_path / "none", "--out", out), "none: no such file or folder"),
        ((file, "--model", tmp_path / "none", "--out", out), "there is no such folder"),
        ((run_folder, "--out", tmp_path / "out"), "give a file that ends with .safetensors"),
        ((run_folder, "--out", out, "--form", "merged"), "give a folder"),
        ((run_folder, "--out", tmp_path / "m", "--form", "merged", "--layout", "kohya"), "leave one of them out"),
        ((run_folder, "--out", file / "x.safetensors"), "is a file; choose another"),
        (
            (tmp_path, "--out", out),
            "holds no config.toml and final/lora: give a finished run of a LoRA, or a LoRA file",
        ),
        ((run_folder, "--out", file), "is there already; choose another"),
        ((file, "--model", sd, "--family", "stable_diffusion", "--out", out), "keys that are not read"),
        (
            (tmp_path / "unet.safetensors", *of_sd, "--layout", "kohya", "--out", out),
            "--layout: kohya is known of FLUX and Qwen-Image, not of a UNet2DConditionModel",
        ),
    ]:
        status, error = job(*arguments)
        assert status == 2 and says in error and not out.exists()
    (run_folder / "v0/config.toml").write_text("[run]\n")
    status, error = job(run_folder, "--out", out)
    assert status == 2 and "config.toml names no model (KeyError: 'model'): give the LoRA itself" in error
    (run_folder / "v0/config.toml").write_text(tomli_w.dumps({"model": {"path": str(kontext)}}))
    (run_folder / "v0/final/lora" / MODULES_FILE).write_bytes(b"")
    status, error = job(run_folder, "--layout", "kohya", "--out", out)
    assert status == 2 and "which no other layout has: give --form merged" in error
