"""LoRA files of other programs: by what each changes in the weights, against diffusers' own reader, and there and back."""

import math

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel, QwenImageEditPipeline
from safetensors.torch import save_file

from rlhf.models.lora import check_lora, read_lora
from rlhf.models.lora_layouts import Unreadable, flux_layers, from_diffusers, layers_of, to_diffusers
from rlhf.models.tiny import transformer_config
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from tests import worlds

LAYOUTS = pytest.mark.parametrize("layout", ["comfyui", "kohya"])
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def family(kontext):
    return worlds.family(kontext, torch.float32)


@pytest.fixture(scope="module")
def denoiser(family):
    return family.load_denoiser("cpu")


def adapters(denoiser, rank=3, chosen=lambda name: True, seed=0):
    """Random adapters of linear layers, in diffusers' layout."""
    g, made = torch.Generator().manual_seed(seed), {}
    for name, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and chosen(name):
            outputs, inputs = module.weight.shape
            made[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=g)
            made[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=g)
    return made


def deltas(tensors, prefix="transformer."):
    """What each layer's weight changes by, in double precision, where alpha = rank."""
    return {
        key.removeprefix(prefix).removesuffix(".lora_B.weight"): B.double()
        @ tensors[key.replace("lora_B", "lora_A")].double()
        for key, B in tensors.items()
        if key.endswith(".lora_B.weight")
    }


def assert_same(found, expected):
    """A fused B has zeros beside its blocks, which add nothing: the products are of the same numbers."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=16 * EPS * expected[name].abs().max().item()
        )


def test_every_linear_layer_of_flux_has_its_name_in_the_other_layouts(denoiser):
    parts = [part for parts in flux_layers(denoiser).values() for part in parts]
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(parts) == len(set(parts)) and set(parts) == linear


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return worlds.family(
        write_qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen"), torch.float32, "qwen_image_edit"
    )


@pytest.fixture(scope="module")
def qwen_denoiser(qwen):
    return qwen.load_denoiser("cpu")


@LAYOUTS
@pytest.mark.parametrize("chosen", ["all", "to_q alone", "q and v", "single blocks"])
def test_there_and_back_every_weight_changes_by_the_same(denoiser, layout, chosen):
    choose = {
        "all": lambda name: True,
        "to_q alone": lambda name: name.endswith("attn.to_q"),
        "q and v": lambda name: name.endswith(("attn.to_q", "attn.to_v")),
        "single blocks": lambda name: name.startswith("single_transformer_blocks.1."),
    }[chosen]
    mine = adapters(denoiser, chosen=choose)
    theirs = from_diffusers(mine, denoiser, "transformer", layout)
    back = to_diffusers(theirs, denoiser, "transformer")
    assert back.keys() == mine.keys(), "parts of a fused layer that were not trained are none"
    assert all(torch.equal(back[key], mine[key]) for key in mine), (
        "the fused A comes apart into those that it was made of"
    )


@LAYOUTS
def test_a_fused_layer_changes_by_its_parts_one_above_the_other(denoiser, layout):
    mine = adapters(denoiser)
    theirs, expected = from_diffusers(mine, denoiser, "transformer", layout), deltas(mine)
    keys = {
        "comfyui": ("diffusion_model.single_blocks.1.linear1", "lora_A", "lora_B"),
        "kohya": ("lora_unet_single_blocks_1_linear1", "lora_down", "lora_up"),
    }
    name, down, up = keys[layout]
    A, B, alpha = theirs[f"{name}.{down}.weight"], theirs[f"{name}.{up}.weight"], theirs[f"{name}.alpha"]
    block = "single_transformer_blocks.1"
    parts = [expected[f"{block}.{part}"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert len(A) == 4 * 3 == alpha.item() and B.shape == (3 * 32 + 128, 12)
    torch.testing.assert_close(B.double() @ A.double(), torch.cat(parts), rtol=0, atol=1e-6)


def test_the_last_modulation_has_shift_and_scale_the_other_way_round(denoiser):
    mine = adapters(denoiser, chosen=lambda name: name == "norm_out.linear")
    theirs = from_diffusers(mine, denoiser, "transformer", "comfyui")
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    scale, shift = deltas(mine)["norm_out.linear"].chunk(2)
    found = theirs[f"{name}.lora_B.weight"].double() @ theirs[f"{name}.lora_A.weight"].double()
    torch.testing.assert_close(found, torch.cat([shift, scale]), rtol=0, atol=1e-6)


def kohya(denoiser, rank, alpha, prefix="lora_unet_", seed=1):
    """A file as kohya's scripts write one: an adapter per layer of Black Forest Labs' code."""
    weights, made = dict(denoiser.named_parameters()), {}
    g = torch.Generator().manual_seed(seed)
    for name, parts in flux_layers(denoiser).items():
        outputs, inputs = sum(len(weights[f"{part}.weight"]) for part in parts), weights[f"{parts[0]}.weight"].shape[1]
        key = f"{prefix}{name.replace('.', '_') if prefix == 'lora_unet_' else name}"
        made[f"{key}.lora_down.weight"] = torch.randn(rank, inputs, generator=g)
        made[f"{key}.lora_up.weight"] = torch.randn(outputs, rank, generator=g)
        made[f"{key}.alpha"] = torch.tensor(float(alpha))
    return made


@pytest.fixture(scope="module")
def wide():
    """diffusers' reader of kohya's files knows Flux's own width alone: one block of each kind, without memory."""
    with torch.device("meta"):
        config = transformer_config(layers=1, single_layers=1, heads=24, head_dim=128, channels=4)
        return FluxTransformer2DModel(**config | {"axes_dims_rope": (16, 56, 56)})


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_diffusers_reads_a_file_the_same(wide, prefix):
    theirs = kohya(wide, rank=2, alpha=6, prefix=prefix)
    theirs = {key: value for key, value in theirs.items() if "_blocks" in key}  # its reader takes the blocks alone
    expected = FluxKontextPipeline.lora_state_dict(dict(theirs))
    found = to_diffusers(theirs, wide, "transformer")
    assert found.keys() == expected.keys()
    for key in expected:
        if key.endswith(".lora_B.weight"):
            mine, pipelines = (on_a_vector(tensors, key) for tensors in (found, expected))
            # Each rounds A or B once more where alpha goes in: half a unit in the last place of every term of two sums.
            torch.testing.assert_close(mine, pipelines, rtol=0, atol=EPS * 3072 * mine.abs().max().item())


def on_a_vector(tensors, key):
    """What an adapter adds to its layer's answer to a vector; the whole change would be 300 MB a layer."""
    A = tensors[key.replace("lora_B", "lora_A")].double()
    x = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tensors[key].double() @ (A @ x)


def test_a_file_in_peft_s_names_is_the_diffusers_one(denoiser):
    mine = adapters(denoiser, chosen=lambda name: name.endswith("to_q"))
    peft = {key.replace("transformer.", "base_model.model.", 1): value for key, value in mine.items()}
    assert_same(deltas(to_diffusers(peft, denoiser, "transformer")), deltas(mine))


@LAYOUTS
def test_a_file_of_another_program_samples_as_ours_does(family, denoiser, layout, tmp_path):
    mine = {key: value / 8 for key, value in adapters(denoiser).items()}
    save_file(mine, tmp_path / "mine.safetensors")
    save_file(from_diffusers(mine, denoiser, "transformer", layout), tmp_path / "theirs.safetensors")
    pairs = worlds.pairs(2)
    with torch.no_grad():
        ours, theirs, base = (
            family.predict(family.load_denoiser("cpu", lora=lora), pairs.x0["winner"], pairs.t, pairs.condition)
            for lora in (tmp_path / "mine.safetensors", tmp_path / "theirs.safetensors", None)
        )
    assert not torch.allclose(ours, base, atol=0.01)
    # Sums of up to 160 values in another order, through four blocks.
    assert (ours - theirs).abs().max() < 4 * 160 * EPS * ours.abs().max() * math.sqrt(160)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda found: found.update({"lora_unet_double_blocks_7_img_attn_proj.lora_up.weight": torch.ones(1)}),
            "names no",
        ),
        (
            lambda found: found.pop("lora_unet_img_in.lora_up.weight"),
            r"lora_unet_img_in\.lora_down\.weight lacks its other",
        ),
        (lambda found: found.update({"lora_unet_img_in.dora_scale": torch.ones(1)}), "dora_scale names no adapter"),
    ],
)
def test_what_does_not_fit_is_named(denoiser, change, says):
    found = kohya(denoiser, rank=2, alpha=2)
    change(found)
    with pytest.raises(Unreadable, match=says):
        to_diffusers(found, denoiser, "transformer")


# --- Qwen-Image --------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_every_layer_of_qwen_image_goes_there_and_back_to_the_bit(qwen_denoiser, layout):
    mine = adapters(qwen_denoiser)
    theirs = from_diffusers(mine, qwen_denoiser, "transformer", layout)
    assert len(theirs) == 3 * len(layers_of(qwen_denoiser)) and len(mine) == 2 * len(layers_of(qwen_denoiser))
    back = to_diffusers(theirs, qwen_denoiser, "transformer")
    assert back.keys() == mine.keys() and all(torch.equal(back[key], mine[key]) for key in mine)


def written(tensors, form):
    """Adapters in diffusers' layout with alpha = rank, as other programs write them, some with twice that."""
    plain = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    ours = ("lora_A.weight", "lora_B.weight")
    prefix, half, alpha = {
        "comfyui": ("diffusion_model.", ours, False),
        "comfyui with alpha": ("diffusion_model.", ours, True),
        "kohya": ("lora_unet_", ("lora_down.weight", "lora_up.weight"), True),
        "without a prefix": ("", ("lora_down.weight", "lora_up.weight"), True),
        "PEFT in memory": ("", ("lora_A.default.weight", "lora_B.default.weight"), False),
    }[form]
    made = {}
    for key, value in plain.items():
        layer, which = key.rsplit(".lora_", 1)[0], half[".lora_B." in key]
        name = layer.replace(".", "_") if prefix == "lora_unet_" else layer
        made[f"{prefix}{name}.{which}"] = value
        if alpha:
            made[f"{prefix}{name}.alpha"] = torch.tensor(6.0)
    return made, 2 if alpha else 1


FORMS = ("comfyui", "comfyui with alpha", "kohya", "without a prefix", "PEFT in memory")


@pytest.mark.parametrize("form", FORMS)
def test_files_of_other_trainers_change_qwen_image_as_diffusers_reads_them(qwen_denoiser, tmp_path, form):
    mine = adapters(qwen_denoiser, chosen=lambda name: name.startswith("transformer_blocks."))
    theirs, scale = written(mine, form)
    expected = {name: delta * scale for name, delta in deltas(mine).items()}
    file = tmp_path / "lora.safetensors"
    save_file({key: value.contiguous() for key, value in theirs.items()}, file)
    check_lora(file, qwen_denoiser, "transformer")
    assert_same(deltas(read_lora(qwen_denoiser, file, "transformer")), expected)
    state = QwenImageEditPipeline.lora_state_dict(dict(theirs))
    state = {key if key.startswith("transformer.") else f"transformer.{key}": value for key, value in state.items()}
    state = {key.replace(".default.", "."): value for key, value in state.items()}
    assert_same(deltas(state), expected)


@LAYOUTS
def test_what_we_write_of_qwen_image_diffusers_reads(qwen_denoiser, layout):
    mine = adapters(qwen_denoiser, chosen=lambda name: name.startswith("transformer_blocks."))
    theirs = from_diffusers(mine, qwen_denoiser, "transformer", layout)
    state = QwenImageEditPipeline.lora_state_dict(dict(theirs))
    assert_same(deltas(state), deltas(mine))
