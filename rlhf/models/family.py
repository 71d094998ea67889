"""What a model family must say about itself, so that one sampler and one trainer serve every model.

A family owns every convention of its network: packing, timestep scaling, guidance, position ids, what is encoded of a prompt
and how the rows become a condition. It is made from a folder in the diffusers layout and reads only small JSON files until
asked to load something.

Shapes: B batch, C latent channels, F frames (1 of a picture), H W pixels, h w latents.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rlhf.diffusion.process import Process
from rlhf.types import Condition, Encoded, Encoding, Geometry, Prompt, Source

Rows = Sequence[Sequence[Mapping[str, Tensor]]]
"""Of each prompt of a batch, the rows of its encodings in the order of `Family.encodings`."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of encoding: what its rows depend on beside what is encoded."""

    folders: tuple[str, ...]
    """Subfolders of the checkpoint that are loaded for it. Their content is part of a row's cache key."""
    dtype: torch.dtype
    """What its encoders compute in."""
    settings: tuple[str, ...] = ()
    """Whatever else changes its rows."""


class Codec(Protocol):
    """The frozen part of a checkpoint: text encoders and VAE, each loaded when first used. The trainer never loads one."""

    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """The rows of encodings of one kind and one set of geometries.

        media: per encoding its sources in order, each uint8 (F, H, W, 3) at its geometry.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3) on the CPU of x0 (B, C, …)."""


class Family(Protocol):
    """One model family. `dtype` is the compute dtype of `predict`; masters may be kept wider by the trainer."""

    blocks: ClassVar[tuple[type[nn.Module], ...]]
    """Module classes that FSDP shards and gradient checkpointing recomputes one by one."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Module-name endings that LoRA adapts by default."""
    lora_prefix: ClassVar[str]
    """What the family's diffusers pipeline puts before the keys of a LoRA file."""
    denoiser_folder: ClassVar[str]
    sees_source: ClassVar[bool]
    """Whether prompts have sources: the family edits, and does not only paint from a text."""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The kinds of encodings by name."""

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

    def finish(self, denoiser: nn.Module, device: str) -> None:
        """Fill in what an empty denoiser lacks beside its parameters: buffers and tables that are plain attributes.

        It is called once on every denoiser that trains or takes publications, loaded ones included. Walk
        `denoiser.modules()`: modules may be wrapped, and may have copies.
        """

    def load_denoiser(self, device: str, folder: Path | None = None, lora: Path | None = None) -> nn.Module:
        """The whole network in `dtype`, frozen, for sampling: the base, another `folder` (a trained export), a LoRA."""

    def load_codec(self, device: str) -> Codec: ...

    # --- sizes ---------------------------------------------------------------------------------------------------------

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) that the model was trained on, nearest in aspect to a picture of (H, W) pixels."""

    def latent_shape(self, geometry: Geometry) -> tuple[int, ...]:
        """(C, h, w), of a video (C, f, h, w). Raises Refused for a size that the network cannot take."""

    def tokens(self, latents: Tensor) -> int:
        """Target tokens of one sample of latents (B, C, …)."""

    # --- conditions ----------------------------------------------------------------------------------------------------

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]:
        """What is encoded of a prompt, in a fixed order."""

    def target(self, source: Source, geometry: Geometry) -> Encoding:
        """The encoding whose row has the x0 of a medium, (C, …), as its tensor "latents"."""

    def unguided(self, prompt: Prompt) -> Prompt | None:
        """The prompt of guidance's other branch, also that of caption dropout; None: there is no such thing.

        Its rows are made a condition in the bucket of `prompt`, so that both branches have one shape.
        """

    def bucket(self, prompt: Prompt) -> Hashable:
        """Whatever must agree within a batch: sizes, numbers of sources, the padded length of a condition."""

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """The condition of B prompts of one bucket, or of unguided ones of such prompts.

        A padded length follows from the bucket, never from neighbours.
        """

    # --- the network ---------------------------------------------------------------------------------------------------

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output for x_t (B, C, …) fp32 at t (B,), in fp32: what objectives compare."""

    def needs_unguided(self, guidance_scale: float | None) -> bool:
        """Whether `guided` wants the condition of `unguided` prompts. None: the family's own scale."""

    def guided(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        unguided: Condition | None,
        *,
        guidance_scale: float | None,
        step: int,
        state: dict[str, Any],
    ) -> Tensor:
        """The prediction that a sampler follows at its `step` (from 0); `state` is kept between the steps of one sample.

        guidance_scale: None: the family's own.
        """


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Condition:
    """Rows of one shape as a batch: tensors (B, …) by name."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
