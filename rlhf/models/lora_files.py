"""LoRA files for other programs, from one in diffusers' layout or any that is read (`rlhf.models.lora`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.models.lora import MODULES_FILE, read_lora
from rlhf.models.lora_layouts import Layout, from_diffusers, layers_of
from rlhf.runs.durable import durable


def check_layout(family: Family, layout: str, key: str) -> None:
    """Raise Refused for a layout that has no names for a family's layers. key: that asked for it."""
    denoiser = family.empty_denoiser(torch.float32)
    if layout != "diffusers" and not layers_of(denoiser):
        what = f"{layout} is known of FLUX and Qwen-Image, not of a {type(denoiser).__name__}"
        raise Refused(f"{key}: {what}: leave it out, for a LoRA in diffusers' layout")


def converted(family: Family, lora: Path, layout: Literal["diffusers"] | Layout) -> dict[str, Tensor]:
    """A LoRA in a layout that was checked. Raises Refused for one that does not fit, or was trained together with modules."""
    if (lora / MODULES_FILE).is_file():
        raise Refused(f"{lora} holds whole modules beside the LoRA, which no other layout has: give --form merged")
    denoiser = family.empty_denoiser(torch.float32)
    tensors = read_lora(denoiser, lora, family.denoiser_folder)
    return tensors if layout == "diffusers" else from_diffusers(tensors, denoiser, family.denoiser_folder, layout)


def write(tensors: Mapping[str, Tensor], out: Path, dtype: torch.dtype) -> None:
    """alpha stays in float32, which knows every rank."""
    written = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in tensors.items()}
    with durable(out) as partial:
        save_file({key: value.contiguous() for key, value in written.items()}, partial)
