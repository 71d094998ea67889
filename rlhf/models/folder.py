"""What families share of a folder in the diffusers layout: its JSON files, its frozen parts, its VAE's geometry and pixels.

Shapes: B batch, C latent channels, H W pixels, h w latents.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import Refused
from rlhf.types import Geometry

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LORA_FILE = LORA_WEIGHT_NAME_SAFE
MODULES_FILE, MODULES_TABLE = "modules.safetensors", "modules.json"
"""Whole submodules that were trained, by their plain names, and the patterns that chose them."""


def read_json(path: Path, what: str, name: str) -> dict[str, Any]:
    """A JSON file of a model folder. Raises Refused, naming the file, where `path` is no folder of `what`."""
    file = Path(path) / name
    if not file.is_file():
        raise Refused(f"model.path = {str(path)!r} is no {what} folder in the diffusers layout: {file} is missing")
    return json.loads(file.read_text())


def trained_fault(folder: Path, config: Mapping[str, Any]) -> str:
    """What is wrong with the folder of a trained denoiser, whose base has this config; empty: nothing."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return "holds no config.json with *.safetensors"
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    return "" if name == config["_class_name"] else f"is a {name}, but the base model has a {config['_class_name']}"


def check_trained(folder: Path | None, config: Mapping[str, Any]) -> None:
    """Raise Refused where `model.denoiser`, if it is given, is none for a model with this config."""
    if folder is not None and (fault := trained_fault(folder, config)):
        remedy = "give a trained folder of this family, from a run's final/"
        raise Refused(f"model.denoiser = {str(folder)!r} {fault}; {remedy}")


def load_frozen(cls: Any, path: Path, folder: str, device: str, dtype: torch.dtype) -> Any:
    """A part of the checkpoint that never trains."""
    return cls.from_pretrained(path, subfolder=folder, dtype=dtype).to(device).eval().requires_grad_(False)


def load_trained(cls: Any, folder: Path, lora: Path | None, prefix: str, device: str, dtype: torch.dtype) -> Any:
    """A denoiser for sampling, frozen, with a LoRA if one is given: its file, or its folder and the modules trained with it."""
    model = cls.from_pretrained(folder, dtype=dtype)
    if lora is not None:
        file = lora / LORA_FILE if lora.is_dir() else lora
        if (lora / MODULES_FILE).is_file():
            load_modules(model, lora)
        # Without a weight_name diffusers finds no file in a folder, and does not read alpha from a file's header.
        model.load_lora_adapter(str(file), weight_name=file.name, prefix=prefix)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def load_modules(denoiser: torch.nn.Module, folder: Path) -> None:
    """Put the modules of an export into a plain denoiser. Raises Refused for a tensor that it has not, or in another shape."""
    parameters = dict(denoiser.named_parameters())
    for name, value in load_file(folder / MODULES_FILE).items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise Refused(f"{folder / MODULES_FILE}: {name} of shape {tuple(value.shape)} is none of this model's")
        parameters[name].copy_(value)


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one side, H/h, from the VAE's config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_shape(vae: Mapping[str, Any], geometry: Geometry, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of a picture, from the VAE's config. Raises Refused for sides that are no whole patches, and for a video."""
    height, width, side = geometry.height, geometry.width, vae_factor(vae) * patch
    if geometry.frames != 1:
        raise Refused(f"{geometry.frames} frames: this model makes pictures")
    if height % side or width % side:
        raise Refused(f"{height}×{width} pixels (model.height, model.width): this model needs multiples of {side}")
    return vae["latent_channels"], height // vae_factor(vae), width // vae_factor(vae)


def to_pixels(images: Tensor, vae: torch.nn.Module) -> Tensor:
    """(B, 3, H, W) in −1 … 1, as the VAE takes them, of uint8 (B, H, W, 3)."""
    return images.to(vae.device).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(vae.dtype)


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 1, H, W, 3) on the CPU of (B, 3, H, W) in −1 … 1, rounded."""
    images = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().unsqueeze(1)


def token_ids(tokenizer: Any, texts: Sequence[str], device: str) -> Tensor:
    """(B, L) ids of texts, padded and cut to the tokenizer's own length L."""
    limit = tokenizer.model_max_length
    batch = tokenizer(list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


def token_shares(tokenizer: Any, text: str, ignored: str | None = None) -> dict[str, float]:
    """Shares of a text's tokens: `unknown` to the tokenizer, which counts no `ignored` ones, and `cut` off by `token_ids`, which
    counts special ones too.
    """
    found = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    skipped = None if ignored is None else tokenizer.convert_tokens_to_ids(ignored)
    ids = [i for i in found if i != skipped]
    count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    cut = max(0, count - tokenizer.model_max_length) / max(count, 1)
    return {"unknown": sum(i == tokenizer.unk_token_id for i in ids) / max(len(ids), 1), "cut": cut}
