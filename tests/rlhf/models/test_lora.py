"""LoRA files that do not fit a model, whole or in part, are refused with their layout and counts; those that fit load."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from rlhf.models.lora import (
    LORA_FILE,
    MODULES_FILE,
    MODULES_TABLE,
    Misfit,
    check_lora,
    load_lora,
    load_modules,
    read_lora,
)
from rlhf.models.tiny import write_stable_diffusion
from tests import worlds

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def family(kontext):
    return worlds.family(kontext, torch.float32)


def adapter(*layers, size=32, rank=4, prefix="transformer.", a=".lora_A.weight", b=".lora_B.weight"):
    """Tensors of a LoRA on square layers of the tiny transformer."""
    g = torch.Generator().manual_seed(0)
    halves = {a: (rank, size), b: (size, rank)}
    return {
        f"{prefix}{layer}{half}": torch.randn(shape, generator=g) for layer in layers for half, shape in halves.items()
    }


SOUND = adapter(LAYER, "transformer_blocks.1.attn.to_q")
KOHYA = partial(adapter, "double_blocks_0_img_attn_qkv", a=".lora_down.weight", b=".lora_up.weight")
MISFITS = {
    "ComfyUI": (
        adapter("double_blocks.0.img_attn.qkv", prefix="diffusion_model."),
        r"does not fit: diffusion_model\..*lora_A.weight and its other half have the shapes \(4, 32\) and \(32, 4\), for 96",
    ),
    "PEFT, of a layer that is not there": (
        adapter("transformer_blocks.57.attn.to_q", prefix="base_model.model."),
        r"does not fit: base_model\.model\.transformer_blocks\.57\..* names no adapter of a layer of this Flux",
    ),
    "kohya, another width": (
        KOHYA(prefix="lora_unet_", size=96) | {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(4.0)},
        r"in 3 of 6 keys; .*to_k.lora_A.weight, has shape \(4, 96\), but its layer takes \(4, 32\)",
    ),
    "kohya, half a pair": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 32)},
        r"does not fit: lora_unet_.*lora_down.weight lacks its other half",
    ),
    "kohya with a text encoder": (
        KOHYA(prefix="lora_unet_") | KOHYA(prefix="lora_te1_"),
        r"2 of 4 keys that are not read: 2 in kohya's layout of a text encoder \(lora_te…\); .*; of the denoiser alone",
    ),
    "ComfyUI's and diffusers' together": (
        SOUND | adapter("double_blocks.0.img_attn.proj", prefix="diffusion_model."),
        "2 of 6 keys that are not read: 2 in ComfyUI's layout",
    ),
    "PEFT without its settings": (
        adapter(LAYER, prefix="base_model.model."),
        r"is in PEFT's layout, of which adapter_config\.json beside it says the strength, but that cannot be read",
    ),
    "alpha 0": (
        adapter("double_blocks.0.img_attn.proj", prefix="diffusion_model.")
        | {"diffusion_model.double_blocks.0.img_attn.proj.alpha": torch.tensor(0.0)},
        r"does not fit: diffusion_model\..*\.alpha is 0\.0, but alpha is a number above 0",
    ),
    "alpha that is no number": (
        adapter("double_blocks.0.img_attn.proj", prefix="diffusion_model.")
        | {"diffusion_model.double_blocks.0.img_attn.proj.alpha": torch.tensor(float("nan"))},
        r"\.alpha is nan, but alpha is a number above 0",
    ),
    "two adapters of one layer": (
        adapter("double_blocks.0.img_attn.proj", prefix="diffusion_model.")
        | adapter("double_blocks_0_img_attn_proj", prefix="lora_unet_", a=".lora_down.weight", b=".lora_up.weight"),
        r"does not fit: .*img_attn.proj.* is a second adapter of its layer, beside ",
    ),
    "a part of a layer beside the whole": (
        adapter("double_blocks.0.img_attn.proj", prefix="diffusion_model.")
        | adapter("transformer_blocks.0.attn.to_out.0", prefix="base_model.model."),
        r"is a second adapter of (its layer|transformer_blocks\.0\.attn\.to_out\.0)",
    ),
    "LoHa": (
        {"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": torch.ones(4, 32)},
        r"does not fit: lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a names no adapter",
    ),
    "kohya's text encoder": (KOHYA(prefix="lora_te1_"), "2 in kohya's layout"),
    "Black Forest Labs": (adapter("double_blocks.0.processor.qkv_lora", prefix=""), "2 in Black Forest Labs' layout"),
    "bare names": (adapter(LAYER, prefix=""), "2 of 2 keys that are not read: 2 in no layout that is known"),
    "a text encoder too": (
        SOUND | adapter("layers.0.q_proj", prefix="text_encoder."),
        "2 of 6 keys that are not read: 2 in the diffusers layout of a text encoder",
    ),
    "of Stable Diffusion": (
        adapter("mid_block.attentions.0.to_q", prefix="unet."),
        "2 in the diffusers layout of a UNet",
    ),
    "another program's halves": (
        adapter(LAYER, a=".lora.down.weight", b=".lora.up.weight"),
        r"in 0 of 2 keys; .* transformer.transformer_blocks.0.attn.to_q.lora.down.weight, is neither a lora_A.weight",
    ),
    "DoRA": (
        SOUND | {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(32)},
        "in 4 of 5 keys; .*lora_magnitude_vector, is neither",
    ),
    "tensors of alpha": (SOUND | {f"transformer.{LAYER}.alpha": torch.tensor(8.0)}, "in 4 of 5 keys; .*to_q.alpha, is"),
    "a layer that is not there": (
        SOUND | adapter("transformer_blocks.57.attn.to_q"),
        r"in 4 of 6 keys; .*transformer_blocks.57.attn.to_q.lora_A.weight, belongs to no layer",
    ),
    "half a pair": (
        {name: value for name, value in SOUND.items() if name != f"transformer.{LAYER}.lora_B.weight"},
        "in 2 of 3 keys; .*to_q.lora_A.weight, lacks its other half lora_B.weight",
    ),
    "another half": (
        {name: value for name, value in SOUND.items() if name != f"transformer.{LAYER}.lora_A.weight"},
        "in 2 of 3 keys; .*to_q.lora_B.weight, lacks its other half lora_A.weight",
    ),
    "another width": (
        adapter(LAYER, size=64),
        r"in 0 of 2 keys; .*lora_A.weight, has shape \(4, 64\), but its layer takes \(4, 32\)",
    ),
    "two ranks in a pair": (
        SOUND | {f"transformer.{LAYER}.lora_B.weight": torch.zeros(32, 8)},
        r"in 3 of 4 keys; .*lora_B.weight, has shape \(32, 8\), but its layer takes \(32, 4\)",
    ),
    "a number in place of a matrix": (
        SOUND | {f"transformer.{LAYER}.lora_A.weight": torch.tensor(1.0)},
        r"in 2 of 4 keys; .*lora_A.weight, has shape \(\), but its layer takes \(0, 32\)",
    ),
    "a whole model": (
        {f"{LAYER}.weight": torch.zeros(32, 32)},
        "is no LoRA: none of its 1 keys names an adapter.* as tuned.denoiser",
    ),
    "no tensors": ({}, "holds no tensors"),
    "whole numbers": (
        {name: value.to(torch.int32) for name, value in SOUND.items()},
        r"stores transformer\..* as I32; give a LoRA for this model",
    ),
    "rank 0": (
        {name: value[:0] if "lora_A" in name else value[:, :0] for name, value in SOUND.items()},
        "in 0 of 4 keys; .* has shape",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_file_that_does_not_fit_is_refused_with_its_layout_and_counts(family, tmp_path, what):
    tensors, says = MISFITS[what]
    file = tmp_path / LORA_FILE
    save_file(tensors, file)
    with pytest.raises(Misfit, match=says) as caught:
        check_lora(file, family.empty_denoiser(torch.bfloat16), "transformer")
    message = str(caught.value)
    assert message.startswith(str(file)) and "transformer.NAME.lora_A.weight" in message and "\n" not in message
    with pytest.raises(Misfit, match=re.escape(message)):
        family.load_denoiser("cpu", lora=tmp_path)  # and so does whoever loads it


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "cannot be read as safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
        (b"PK\x03\x04 a pickle of torch.save", "cannot be read as safetensors"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(family, tmp_path, content, says):
    if content is not None:
        (tmp_path / LORA_FILE).write_bytes(content)
    for path in (tmp_path, tmp_path / LORA_FILE):
        with pytest.raises(Misfit, match=f"{LORA_FILE} {says}"):
            check_lora(path, family.empty_denoiser(torch.bfloat16), "transformer")


def test_one_that_fits_loads_with_alpha_from_its_header(family, tmp_path):
    save_file(SOUND, tmp_path / "plain.safetensors")
    settings = {
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": [
            name.removeprefix("transformer.")[: -len(".lora_A.weight")] for name in SOUND if ".lora_A." in name
        ],
    }
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    save_file(SOUND, tmp_path / "scaled.safetensors", header)
    base = family.load_denoiser("cpu").get_submodule(LAYER).weight
    change = SOUND[f"transformer.{LAYER}.lora_B.weight"] @ SOUND[f"transformer.{LAYER}.lora_A.weight"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for name, scale in (("plain", 1.0), ("scaled", 2.0)):
        layer = family.load_denoiser("cpu", lora=tmp_path / f"{name}.safetensors").get_submodule(LAYER)
        with torch.no_grad():
            expected = x @ (base + scale * change).T + layer.base_layer.bias
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "lora_alpha": 8, "target_modules": [LAYER, "transformer_blocks.1.attn.to_q"]},
        {"r": 4, "lora_alpha": 4, "target_modules": [LAYER], "no_such_key": 1},
    ],
)
def test_a_header_that_does_not_fit_its_tensors_is_refused(family, tmp_path, settings):
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    save_file(SOUND, tmp_path / "one.safetensors", header)
    with pytest.raises(Misfit, match=r"one\.safetensors does not load, its header does not fit its tensors: "):
        family.load_denoiser("cpu", lora=tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "lacks r, lora_alpha, target_modules"),
        ({"transformer.r": 4}, "lacks lora_alpha, target_modules"),
        ({"r": 4, "lora_alpha": 4, "target_modules": [LAYER]}, "lacks r, lora_alpha, target_modules"),
        ([], "is no JSON object"),
    ],
)
def test_settings_that_diffusers_cannot_read_are_refused_by_the_header(family, tmp_path, settings, what):
    save_file(SOUND, tmp_path / "one.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(
        Misfit, match=f"one\\.safetensors has a header whose lora_adapter_metadata {what}; export it again"
    ):
        check_lora(tmp_path / "one.safetensors", family.empty_denoiser(torch.float32), "transformer")


def change_of(denoiser, base, name):
    """What a loaded LoRA adds to a layer's weight."""
    layer = denoiser.get_submodule(name)
    inputs = torch.eye(layer.in_features)
    with torch.no_grad():
        return (layer(inputs) - base.get_submodule(name)(inputs)).T


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_peft_adapter_has_the_strength_of_its_settings(family, tmp_path, given):
    second = "transformer_blocks.1.attn.to_q"
    save_file(adapter(LAYER, second, prefix="base_model.model."), tmp_path / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 16, "alpha_pattern": {r"1\.attn\.to_q": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = tmp_path if given == "folder" else tmp_path / "adapter_model.safetensors"
    loaded, base = family.load_denoiser("cpu", lora=path), family.load_denoiser("cpu")
    for name, scale in ((LAYER, 4.0), (second, 0.5)):
        B, A = (SOUND[f"transformer.{name}.lora_{half}.weight"] for half in "BA")
        torch.testing.assert_close(change_of(loaded, base, name), scale * B @ A, rtol=1e-4, atol=1e-4)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    with pytest.raises(Misfit, match="is scaled by rsLoRA or DoRA, which is not read"):
        family.load_denoiser("cpu", lora=path)


def test_an_adapter_that_changes_nothing_is_refused(family, tmp_path):
    nothing = adapter("double_blocks.0.img_attn.proj", prefix="diffusion_model.")
    nothing = {key: value * 0 if "lora_B" in key else value for key, value in nothing.items()}
    save_file(nothing, tmp_path / LORA_FILE)
    with pytest.raises(Misfit, match=r"every lora_B \(lora_up\) is zero, of 2 tensors: it changes nothing"):
        family.load_denoiser("cpu", lora=tmp_path)


def test_convolutions_of_a_unet_have_adapters_too(tmp_path):
    unet = worlds.family(write_stable_diffusion(tmp_path / "sd"), torch.float32, "stable_diffusion").load_denoiser(
        "cpu"
    )
    weight = unet.conv_out.weight
    halves = {"lora_A": torch.randn(2, *weight.shape[1:]), "lora_B": torch.randn(len(weight), 2, 1, 1)}
    save_file({f"unet.conv_out.{half}.weight": value for half, value in halves.items()}, tmp_path / LORA_FILE)
    load_lora(unet, tmp_path, "unet")
    assert torch.equal(unet.conv_out.lora_A["default_0"].weight, halves["lora_A"])
    save_file(
        {f"unet.conv_out.{half}.weight": value.flatten(1) for half, value in halves.items()}, tmp_path / LORA_FILE
    )
    with pytest.raises(Misfit, match="in 0 of 2 keys"):
        check_lora(tmp_path, unet, "unet")


# --- modules -----------------------------------------------------------------------------------------------------------

PATTERNS = ["norm_out", "transformer_blocks.*.ff"]


def modules(family):
    return {
        name: parameter.detach() + 1
        for name, parameter in family.load_denoiser("cpu").named_parameters()
        if name.startswith("norm_out.") or ".ff." in name
    }


def write_modules(folder, tensors):
    save_file(tensors, folder / MODULES_FILE)
    (folder / MODULES_TABLE).write_text(json.dumps({"patterns": PATTERNS}))


def test_modules_load_whole_and_beside_a_lora(family, tmp_path):
    write_modules(tmp_path, modules(family))
    save_file(SOUND, tmp_path / LORA_FILE)
    with pytest.raises(
        Misfit, match=rf"{LORA_FILE} was trained together with {MODULES_FILE} beside it; give their folder"
    ):
        family.load_denoiser("cpu", lora=tmp_path / LORA_FILE)
    both, alone = family.load_denoiser("cpu", lora=tmp_path), family.load_denoiser("cpu")
    load_modules(alone, tmp_path)
    for name, value in modules(family).items():
        assert torch.equal(alone.get_parameter(name), value) and torch.equal(both.get_parameter(name), value)


def test_modules_alone_load_where_a_lora_does_and_are_none(family, tmp_path):
    write_modules(tmp_path, modules(family))
    denoiser = family.load_denoiser("cpu", lora=tmp_path)
    for name, value in modules(family).items():
        assert torch.equal(denoiser.get_parameter(name), value)
    with pytest.raises(Misfit, match=rf"{MODULES_FILE} holds whole modules; give their folder"):
        family.load_denoiser("cpu", lora=tmp_path / MODULES_FILE)
    with pytest.raises(Misfit, match="holds whole modules, and no LoRA; give the LoRA of another run"):
        read_lora(family.load_denoiser("cpu"), tmp_path, "transformer")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.pop("norm_out.linear.bias"), r"lacks 1 tensors that .* chose: norm_out.linear.bias"),
        (lambda found: found.clear(), r"lacks \d+ tensors"),
        (
            lambda found: found.update(strange=torch.ones(1)),
            r"has 1 of \d+ tensors that are none .*: strange of shape \(1,\)",
        ),
        (lambda found: found.update({"norm_out.linear.bias": torch.ones(3)}), r"norm_out.linear.bias of shape \(3,\)"),
    ],
)
def test_modules_that_do_not_fit_are_refused(family, tmp_path, change, says):
    tensors = modules(family)
    change(tensors)
    write_modules(tmp_path, tensors)
    save_file(SOUND, tmp_path / LORA_FILE)
    for use in (partial(load_modules, folder=tmp_path), partial(check_lora, tmp_path, prefix="transformer")):
        with pytest.raises(Misfit, match=says):
            use(denoiser=family.load_denoiser("cpu"))


def test_modules_without_their_table_are_refused(family, tmp_path):
    write_modules(tmp_path, modules(family))
    for content in ("{", "[]", "{}"):
        (tmp_path / MODULES_TABLE).write_text(content)
        with pytest.raises(Misfit, match=f"{MODULES_TABLE} cannot be read"):
            load_modules(family.load_denoiser("cpu"), tmp_path)
