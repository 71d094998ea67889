"""What a model family must say about itself, so that one sampler and one trainer serve every model.

A family owns every convention of its network: packing, timestep scaling, guidance, position ids. It is made from a folder in
the diffusers layout and reads only small JSON files until asked to load something.

Shapes: B batch, C latent channels, H W pixels, h w latents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from rlhf.diffusion.process import Process
from rlhf.types import Condition


def compute_dtype(mixed_precision: str) -> torch.dtype:
    """What a network computes in, from `trainer.mixed_precision`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[mixed_precision]


class Codec(Protocol):
    """The frozen part of a checkpoint: text encoders and VAE. The trainer never loads one."""

    def encode_text(self, instructions: Sequence[str]) -> Condition:
        """The part of a condition that depends on the instruction alone, leading dimension B."""

    def encode_source(self, images: Tensor) -> Condition:
        """The part that depends on the source image alone, from uint8 (B, H, W, 3); {} where the model sees none."""

    def encode_target(self, images: Tensor) -> Tensor:
        """x0 (B, C, h, w) of uint8 pictures (B, H, W, 3)."""

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) of x0 (B, C, h, w)."""

    def unknown_tokens(self, instructions: Sequence[str]) -> list[float]:
        """Share of each instruction's tokens that the main text encoder does not know, 0 … 1."""


class Family(Protocol):
    """One model family. `dtype` is the compute dtype of `predict`; masters may be kept wider by the trainer."""

    blocks: ClassVar[tuple[type[nn.Module], ...]]
    """Module classes that FSDP shards and gradient checkpointing recomputes one by one."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Module-name endings that LoRA adapts by default."""
    lora_prefix: ClassVar[str]
    """What the family's diffusers pipeline puts before the keys of a LoRA file."""
    denoiser_folder: ClassVar[str]
    source_folders: ClassVar[tuple[str, ...]]
    """Subfolders whose content decides `encode_source`: the cache's fingerprint of it. Empty where that is {}, and only there."""
    target_folders: ClassVar[tuple[str, ...]]
    """The same for `encode_target`."""

    @property
    def text_folders(self) -> tuple[str, ...]:
        """The same for `encode_text`. A property, as checkpoints of one family differ in their encoders."""

    @property
    def path(self) -> Path: ...

    @property
    def denoiser_path(self) -> Path:
        """The folder of the denoiser to begin with: `path`/`denoiser_folder`, or another that was trained from it."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def process(self) -> Process: ...

    def check(self) -> None:
        """Raise Refused where `path`, or the denoiser to begin with, is no folder of this family. Reads JSON files only."""

    def empty_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The trainable network on the meta device: shapes without memory."""

    def load_denoiser(self, device: str, folder: Path | None = None, lora: Path | None = None) -> nn.Module:
        """The whole network in `dtype`, frozen, for sampling: the base, another `folder` (a trained export), a LoRA."""

    def load_codec(self, device: str) -> Codec: ...

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) that the model was trained on, nearest in aspect to a picture of (H, W) pixels."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture of (H, W) pixels. Raises Refused for a size that the network cannot take."""

    def tokens(self, latents: Tensor) -> int:
        """Target tokens of a picture with latents (B, C, h, w)."""

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output for x_t (B, C, h, w) fp32 at t (B,), in fp32: what objectives and samplers compare."""

    def guided(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction that a sampler follows: `predict` where guidance is embedded, two branches where it is not."""


def sees_source(family: Family) -> bool:
    """Whether the family edits a picture, and does not only paint from a text."""
    return bool(family.source_folders)
