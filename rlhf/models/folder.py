"""What families share of a folder in the diffusers layout: its frozen parts, its VAE's geometry and pixels.

Shapes: B batch, C latent channels, H W pixels, h w latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from rlhf.errors import Refused
from rlhf.models.family import Family, check_finite
from rlhf.models.lora import load_lora
from rlhf.models.quantised import quantise_layers
from rlhf.shards.files import AGAIN, DIFFUSERS, read_json
from rlhf.types import Geometry

LONGEST = 2**20
"""Tokens; a tokenizer that says more has no limit."""
WEIGHTS_FILE = f"{DIFFUSERS}.safetensors"


def read_value(path: Path, file: str, key: str) -> Any:
    """A value that a JSON file of a model folder must have. Raises Refused."""
    found = read_json(path / file)
    if key not in found:
        raise Refused(f"{path / file} has no {key!r}; {AGAIN}")
    return found[key]


@dataclass(frozen=True)
class Parts:
    """The parts of a folder that never train, on one device."""

    path: Path
    device: str

    def module(self, cls: Any, folder: str, dtype: torch.dtype) -> Any:
        """Raises Refused where its weights are not all there."""
        part, report = cls.from_pretrained(self.path, subfolder=folder, dtype=dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):  # the libraries would leave them random, with a warning
            lacking = f"the weights lack {len(missing)} tensors, the first is {missing[0]}"
            raise Refused(f"{self.path / folder}: {lacking}; {AGAIN}")
        return part.to(self.device).eval().requires_grad_(False)

    def tokenizer(self, folder: str) -> Any:
        return AutoTokenizer.from_pretrained(self.path, subfolder=folder)

    def processor(self, folder: str) -> Any:
        """Of texts with pictures."""
        return AutoProcessor.from_pretrained(self.path, subfolder=folder)

    def image_processor(self, folder: str) -> Any:
        return AutoImageProcessor.from_pretrained(self.path, subfolder=folder)


LoadParts = Callable[[Path, str], Parts]


def load_trained(family: Family, cls: Any, folder: Path | None, lora: Path | None, device: str) -> Any:
    """A denoiser for sampling, frozen and kept as the family's `base` says: its own or that of a folder. lora: its file, or its
    folder with the modules trained with it.
    """
    model = cls.from_pretrained(folder or family.denoiser_path, dtype=family.dtype)
    if lora is not None:  # before, since PEFT gives adapters the dtype of their layer
        load_lora(model, lora, family.denoiser_folder)
    model = quantise_layers(model.requires_grad_(False), family.blocks, family.base)
    return model.to(device).eval()


def check_axes(config: Path) -> None:
    """Raise Refused unless the config of a transformer turns every channel of a head."""
    found = read_json(config)
    axes, width = found.get("axes_dims_rope"), found.get("attention_head_dim")
    if axes is None or width is None or sum(axes) != width:
        raise Refused(f"{config}: axes_dims_rope = {axes} is not attention_head_dim = {width} in all; {AGAIN}")


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along one side, H/h, from the config of an `AutoencoderKL`."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_shape(channels: int, factor: int, geometry: Geometry, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of a picture; factor: H/h. Raises Refused for sides that are no whole patches, and for a video."""
    height, width, side = geometry.height, geometry.width, factor * patch
    if geometry.frames != 1:
        raise Refused(f"{geometry.frames} frames: this model makes pictures")
    if height % side or width % side:
        raise Refused(f"{height}×{width} pixels (model.height, model.width): this model needs multiples of {side}")
    return channels, height // factor, width // factor


def to_pixels(images: Tensor, vae: torch.nn.Module) -> Tensor:
    """(B, 3, H, W) in −1 … 1, as the VAE takes them, of uint8 (B, H, W, 3)."""
    return images.to(vae.device).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(vae.dtype)


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 1, H, W, 3) on the CPU of (B, 3, H, W) in −1 … 1, rounded. Raises NotFinite."""
    check_finite(pixels, "the VAE gives NaN or infinity: compare its files in model.path with their source")
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
