"""What is wrong with model folders that people really have, each made of a sound one, and what is said of it.

A fault changes a copy of a tiny folder in place. `WRONG` holds those of any family's, `WRONG_KONTEXT` those of Kontext's alone.
"""

import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from rlhf.models.tiny import transformer_config

Fault = tuple[Callable[[Path], Any], str]
"""What is done to the folder, and a regular expression of what is said."""
STEM = "diffusion_pytorch_model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 23802932552\n"


def edit(file: str, **changes: Any) -> Callable[[Path], Any]:
    """Change keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


def rename(file: str, other: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).rename(folder / Path(file).parent / other)


def remove(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).unlink()


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Change the tensors of a safetensors file."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file(found, folder / file)

    return rewrite


def quantise(dtype: torch.dtype, found: dict[str, torch.Tensor]) -> None:
    name = next(name for name in sorted(found) if found[name].ndim >= 2)
    found[name] = found[name].clamp(-1, 1).to(dtype)


def shard(folder: Path, stem: str = STEM) -> dict[str, str]:
    """Two shards and their index in place of the one file; returns which tensor is where."""
    found = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    names, where = sorted(found), {}
    for i, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{i}-of-00002.safetensors"
        save_file({name: found[name] for name in some}, folder / file)
        where |= dict.fromkeys(some, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def sharded(denoiser: str, then: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], Any]:
    return lambda folder: then(folder / denoiser, shard(folder / denoiser))


def promise_more(folder: Path, where: dict[str, str]) -> None:
    edit(f"{STEM}.safetensors.index.json", weight_map=where | {"not.there": f"{STEM}-00001-of-00002.safetensors"})(
        folder
    )


def forget_one(folder: Path, where: dict[str, str]) -> None:
    edit(f"{STEM}.safetensors.index.json", weight_map={name: where[name] for name in sorted(where)[1:]})(folder)


def swap_names(folder: Path, where: dict[str, str]) -> None:
    """As when the shards of two downloads are mixed."""
    first = min(where)
    other = next(file for file in where.values() if file != where[first])
    edit(f"{STEM}.safetensors.index.json", weight_map=where | {first: other})(folder)


def cut(file: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def faults(
    denoiser: str,
    tokenizer: str = "tokenizer",
    *,
    channels: str = "latent_channels",
    layers: str = "block_out_channels",
    reader: str = "CLIPTextModel",
) -> dict[str, Fault]:
    """Those of a folder whose denoiser lies in `denoiser`. channels, layers: keys of its VAE. reader: what text_encoder is."""
    weights, vae = f"{denoiser}/{STEM}.safetensors", f"vae/{STEM}.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}).encode()
    place = struct.pack("<Q", len(header)) + header + bytes(24)
    again = "download it again"
    return {
        "no index of the model": (remove("model_index.json"), r"model_index\.json is missing; download the whole"),
        "index that is no JSON": (write("model_index.json", "{,"), r"model_index\.json is not JSON: Expecting.*again"),
        "another kind of model": (
            edit("model_index.json", _class_name="WanPipeline"),
            "'WanPipeline', but this family",
        ),
        "config that is no JSON": (write(f"{denoiser}/config.json", "<html>"), rf"{denoiser}/config\.json is not JSON"),
        "config with a byte order mark": (  # which diffusers refuses
            lambda folder: write("vae/config.json", b"\xef\xbb\xbf" + (folder / "vae/config.json").read_bytes())(
                folder
            ),
            r"vae/config\.json is not JSON",
        ),
        "weights of more than the config has": (
            tensors(f"{denoiser}/{STEM}.safetensors", lambda found: found.update({"extra.weight": torch.zeros(2)})),
            r"hold 1 tensors that a .* of this config has not, the first is extra\.weight",
        ),
        "a tokenizer of another kind": (
            edit(f"{tokenizer}/tokenizer_config.json", tokenizer_class="BertTokenizer"),
            "tokenizer_class = 'BertTokenizer', but this family takes",
        ),
        "a tokenizer without a length": (
            edit(f"{tokenizer}/tokenizer_config.json", model_max_length="long"),
            f"{tokenizer} makes no tokenizer",
        ),
        "config that is a list": (write("vae/config.json", "[1]"), r"vae/config\.json holds no JSON object"),
        "config of another class": (
            edit("vae/config.json", _class_name="AutoencoderKLWan"),
            r"takes AutoencoderKL\w*;",
        ),
        "config of nonsense": (
            edit("vae/config.json", **{layers: "x"}),
            r"vae/config\.json makes no AutoencoderKL",
        ),
        "scheduler away": (remove("scheduler/scheduler_config.json"), r"scheduler_config\.json is missing"),
        "scheduler that is no JSON": (
            write("scheduler/scheduler_config.json", "x"),
            r"scheduler_config\.json is not JSON",
        ),
        "another scheduler": (edit("scheduler/scheduler_config.json", _class_name="LCM"), "_class_name = 'LCM'"),
        "quantised, by its config": (
            edit(f"{denoiser}/config.json", quantization_config={"quant_method": "bitsandbytes"}),
            r"config\.json has a quantization_config; quantised models are not read: give the model in bfloat16",
        ),
        "quantised text encoder": (
            edit("text_encoder/config.json", quantization_config={"quant_method": "bitsandbytes"}),
            r"text_encoder/config\.json has a quantization_config",
        ),
        "fp8": (tensors(weights, partial(quantise, torch.float8_e4m3fn)), "is stored as F8_E4M3; quantised"),
        "int8": (tensors(weights, partial(quantise, torch.int8)), "is stored as I8; quantised"),
        "uint8 VAE": (tensors(vae, partial(quantise, torch.uint8)), "is stored as U8; quantised"),
        "fp16 variant alone": (
            rename(weights, f"{STEM}.fp16.safetensors"),
            rf"has neither {STEM}\.safetensors nor its index, but {STEM}\.fp16\.safetensors; that is a variant alone",
        ),
        "fp16 variant of the VAE": (
            rename(vae, f"{STEM}.fp16.safetensors"),
            "vae has neither .* that is a variant alone",
        ),
        "fp16 variant of a text encoder": (
            rename("text_encoder/model.safetensors", "model.fp16.safetensors"),
            r"text_encoder has neither model\.safetensors .* that is a variant alone: download model\.safetensors too",
        ),
        "only .bin": (rename(weights, f"{STEM}.bin"), rf"but {STEM}\.bin; only safetensors are read: download those"),
        "only .ckpt": (rename(weights, "v1-5.ckpt"), r"but v1-5\.ckpt; only safetensors are read"),
        "a single-file layout": (
            rename(weights, "flux1-dev.safetensors"),
            r"flux1-dev\.safetensors; that is another layout",
        ),
        "shards without their index": (
            sharded(denoiser, lambda f, where: (f / f"{STEM}.safetensors.index.json").unlink()),
            rf"those are shards without their index: download {STEM}\.safetensors\.index\.json",
        ),
        "a link to nothing": (
            lambda folder: ((folder / weights).unlink(), (folder / weights).symlink_to("../../blobs/5f3a")),
            "that is a link to nothing: download it again",
        ),
        "a VAE without its channels": (
            edit("vae/config.json", **{channels: None}),
            f"has no '{channels}'|lack|shape",
        ),
        "no weights": (
            remove(weights),
            rf"{denoiser} has neither {STEM}\.safetensors nor its index; download the weights",
        ),
        "pointer for weights": (write(weights, POINTER), r"is a Git LFS pointer.*: run `git lfs pull` in .*"),
        "pointer for the VAE": (write(vae, POINTER), "vae/.* is a Git LFS pointer"),
        "pointer for a text encoder": (
            write("text_encoder/model.safetensors", POINTER),
            "text_encoder/.* is a Git LFS",
        ),
        "pointer for a tokenizer": (
            write(f"{tokenizer}/tokenizer.json", POINTER),
            r"tokenizer\.json is a Git LFS pointer",
        ),
        "pointer for a config": (write("vae/config.json", POINTER), r"vae/config\.json is a Git LFS pointer"),
        "tokenizer away": (
            remove(f"{tokenizer}/tokenizer.json"),
            r"tokenizer lacks tokenizer\.json, or vocab\.json and",
        ),
        "tokenizer that is no JSON": (write(f"{tokenizer}/tokenizer.json", "{"), r"tokenizer\.json is not JSON"),
        "empty weights": (write(weights, b""), "is no safetensors file, or is cut off: 0 bytes without a header"),
        "length without sense": (write(weights, b"\xff" * 64), f"is no safetensors file, or is cut off.*{again}"),
        "header that is no JSON": (
            write(weights, struct.pack("<Q", 4) + b"{{{{"),
            f"its header makes no sense.*{again}",
        ),
        "header of a list": (write(weights, struct.pack("<Q", 2) + b"[]"), "its header makes no sense"),
        "header with gaps": (write(weights, place), "its header makes no sense .the place of a."),
        "a page in place of weights": (
            write(weights, "<!DOCTYPE html><html>not found</html>"),
            "is no safetensors file",
        ),
        "cut off": (cut(weights, 300_000), "is cut off: 300,000 bytes of"),
        "cut off in the header": (cut(weights, 100), "is no safetensors file, or is cut off: 100 bytes"),
        "cut off text encoder": (cut("text_encoder/model.safetensors", 50_000), "model.safetensors is cut off"),
        "too long": (lambda folder: (folder / weights).open("ab").write(b"x"), "is too long"),
        "a tensor less": (tensors(weights, lambda t: t.pop(max(t))), "the weights lack 1 tensors of a"),
        "a tensor of the VAE less": (tensors(vae, lambda t: t.pop(max(t))), "lack 1 tensors of a AutoencoderKL"),
        "a tensor of a text encoder less": (
            tensors("text_encoder/model.safetensors", lambda t: t.pop(max(t))),
            f"lack 1 tensors of a {reader}",
        ),
        "another shape": (
            tensors(weights, lambda t: t.update({max(t): torch.zeros(3)})),
            r"has the shape \[3\], but by config\.json it is",
        ),
        "shards of which one is away": (
            sharded(denoiser, lambda f, where: (f / where[max(where)]).unlink()),
            r"index\.json names .*safetensors, which .* lacks",
        ),
        "an index that promises more": (
            sharded(denoiser, promise_more),
            r"has no tensor 'not\.there', though the index",
        ),
        "an index that forgets one": (sharded(denoiser, forget_one), "the weights lack 1 tensors of a"),
        "an index of other shards": (sharded(denoiser, swap_names), "has no tensor '.*', though the index"),
        "an index without a map": (
            lambda folder: write(f"{weights}.index.json", "{}")(folder),
            "index.json has no weight_map from tensors to files",
        ),
        "an index that is no JSON": (write(f"{weights}.index.json", "{"), r"index\.json is not JSON"),
        "an index that is a pointer": (write(f"{weights}.index.json", POINTER), r"index\.json is a Git LFS pointer"),
    }


def fill(folder: Path) -> None:
    """FLUX.1 Fill's transformer: it also takes a mask and the masked picture."""
    transformer = FluxTransformer2DModel(**transformer_config() | {"in_channels": 40, "out_channels": 16})
    transformer.save_pretrained(folder / "transformer")


WRONG = {
    "flux_kontext": faults("transformer"),
    "qwen_image_edit": faults(
        "transformer", channels="z_dim", layers="dim_mult", reader="Qwen2_5_VLForConditionalGeneration"
    ),
    "stable_diffusion": faults("unet"),
}
WRONG["qwen_image_edit"] |= {
    "Qwen-Image-Layered": (
        edit("transformer/config.json", use_layer3d_rope=True, use_additional_t_cond=True),
        "use_additional_t_cond = True, but this family takes False",
    ),
    "a VAE with a number less": (
        edit("vae/config.json", latents_mean=[0.0]),
        "latents_mean has 1 numbers, but z_dim = 4",
    ),
    "a VAE without its deviations": (edit("vae/config.json", latents_std=None), "has no 'latents_std'"),
    "no processor": (remove("processor/tokenizer.json"), r"processor lacks tokenizer\.json, or vocab\.json and"),
    "a processor of texts alone": (remove("processor/processor_config.json"), "processor makes no processor"),
    "another encoder": (
        edit("transformer/config.json", joint_attention_dim=64),
        "joint_attention_dim = 64, but this family takes 32",
    ),
    "axes that are not the width": (
        edit("transformer/config.json", axes_dims_rope=[2, 2, 2]),
        r"axes_dims_rope = \[2, 2, 2\] is not attention_head_dim = 16",
    ),
}
WRONG["flux_kontext"] |= {
    "FLUX.1 Fill": (fill, "in_channels = 40, but this family takes 16"),
    "FLUX.1 Dev": (
        edit("model_index.json", _class_name="FluxPipeline"),
        r"_class_name = 'FluxPipeline', but this family takes FluxKontextPipeline.*model\.accept_index = true",
    ),
    "unshifted scheduler": (
        edit("scheduler/scheduler_config.json", use_dynamic_shifting=False),
        "use_dynamic_shifting = False, but this family takes True",
    ),
    "scheduler without a number": (edit("scheduler/scheduler_config.json", max_shift="1"), "max_shift = '1'.*a number"),
    "CLIP's words in place of T5's": (
        lambda folder: shutil.copytree(folder / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True),
        r"tokenizer_2/tokenizer_config\.json: tokenizer_class = 'CLIPTokenizer', but this family takes T5Tokenizer",
    ),
    "axes that are not the width": (
        edit("transformer/config.json", axes_dims_rope=[2, 2, 2]),
        r"transformer/config\.json: axes_dims_rope = \[2, 2, 2\] is not attention_head_dim = ",
    ),
    "a VAE without a shift": (edit("vae/config.json", shift_factor=None), "shift_factor = None.*takes a number"),
    "another T5": (
        edit("text_encoder_2/config.json", d_model=64),
        "text_encoder_2/model.safetensors: .* has the shape",
    ),
}
WRONG["stable_diffusion"] |= {
    "an inpainting UNet": (edit("unet/config.json", in_channels=9), "in_channels = 9, but this family takes 4"),
    "another text encoder's UNet": (edit("unet/config.json", cross_attention_dim=64), "cross_attention_dim = 64.*32"),
}
