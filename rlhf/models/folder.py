"""What families share of a folder in the diffusers layout: its JSON files, its frozen parts, its VAE's geometry and pixels.

Shapes: B batch, C latent channels, H W pixels, h w latents.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from rlhf.errors import Refused


def read_json(path: Path, what: str, name: str) -> dict[str, Any]:
    """A JSON file of a model folder. Raises Refused, naming the file, where `path` is no folder of `what`."""
    file = Path(path) / name
    if not file.is_file():
        raise Refused(f"model.path = {str(path)!r} is no {what} folder in the diffusers layout: {file} is missing")
    return json.loads(file.read_text())


def trained_fault(folder: Path, config: Mapping[str, Any]) -> str:
    """What is wrong with the folder of a trained denoiser, whose base has this config; empty if nothing is."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return "holds no config.json with *.safetensors"
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    return "" if name == config["_class_name"] else f"is a {name}, but the base model has a {config['_class_name']}"


def check_trained(folder: Path | None, config: Mapping[str, Any]) -> None:
    """Raise Refused where `model.denoiser`, if it is given, is none for a model with this config."""
    if folder is not None and (fault := trained_fault(folder, config)):
        raise Refused(
            f"model.denoiser = {str(folder)!r} {fault}; give a trained folder of this family, from a run's final/"
        )


def load_frozen(cls: Any, path: Path, folder: str, device: str, dtype: torch.dtype) -> Any:
    """A part of the checkpoint that never trains."""
    return cls.from_pretrained(path, subfolder=folder, dtype=dtype).to(device).eval().requires_grad_(False)


def load_trained(cls: Any, folder: Path, lora: Path | None, prefix: str, device: str, dtype: torch.dtype) -> Any:
    """A denoiser for sampling, frozen, with a LoRA (its file or the folder of it) if one is given."""
    model = cls.from_pretrained(folder, dtype=dtype)
    if lora is not None:
        file = lora / LORA_WEIGHT_NAME_SAFE if lora.is_dir() else lora
        # Without a weight_name diffusers finds no file in a folder, and does not read alpha from a file's header.
        model.load_lora_adapter(str(file), weight_name=file.name, prefix=prefix)
    return model.to(device).eval().requires_grad_(False)


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one side, H/h, from the VAE's config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_shape(vae: Mapping[str, Any], height: int, width: int, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of a picture of (H, W) pixels, from the VAE's config. Raises Refused for sides that are no whole patches."""
    side = vae_factor(vae) * patch
    if height % side or width % side:
        raise Refused(f"{height}×{width} pixels (model.height, model.width): this model needs multiples of {side}")
    return vae["latent_channels"], height // vae_factor(vae), width // vae_factor(vae)


def to_pixels(images: Tensor, vae: torch.nn.Module) -> Tensor:
    """(B, 3, H, W) in −1 … 1, as the VAE takes them, of uint8 (B, H, W, 3)."""
    return images.to(vae.device).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(vae.dtype)


def to_images(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels`, rounded and on the CPU."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
