"""What a model family must say about itself, so that one trainer and the only sampler, `sample_batch`, serve every model.

A family owns every convention of its network: packing, timestep scaling, guidance, position ids, what is encoded and how rows
become a condition. It is made from a folder in the diffusers layout and reads only JSON files until asked to load something.

Shapes: B batch, C latent channels, F frames (1 of a picture), H W pixels, h w latents.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import AutoTokenizer

from rlhf.diffusion.process import Process
from rlhf.errors import NotFinite
from rlhf.models.quantised import Base
from rlhf.tables import SamplingTable
from rlhf.types import Condition, Encoded, Encoding, Geometry, Prompt, Source

Rows = Sequence[Sequence[Mapping[str, Tensor]]]
"""Of each prompt of a batch, the rows of its encodings in the order of `Family.encodings`."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of encoding: what its rows depend on beside what is encoded."""

    folders: tuple[str, ...]
    """Subfolders of the checkpoint that are loaded for it. Their content is part of a row's cache key."""
    dtype: torch.dtype
    settings: tuple[str, ...] = ()
    """Whatever else changes its rows."""


NUMBER = Real


@dataclass(frozen=True, kw_only=True)
class Need:
    """What must lie in one folder of a checkpoint: see `rlhf.models.checks`."""

    file: str = "config.json"
    """What says what the part is."""
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of `file` → the values that the family can use; None: the key may be absent, NUMBER: any number will do."""
    network: type[nn.Module] | None = None
    """The class of diffusers or transformers that reads the folder, always given for the denoiser's."""
    files: tuple[tuple[str, ...], ...] = ()
    """Sets of further files, of which one must be there."""
    opens: type | None = None
    """AutoTokenizer or AutoProcessor of transformers, where the folder is opened as that too."""


INDEX_FILE = "model_index.json"


def index(*pipelines: str) -> Need:
    """The folder itself, whose model_index.json names one of these pipelines."""
    return Need(file=INDEX_FILE, values={"_class_name": pipelines})


def tokenizer(kind: str) -> Need:
    """The folder of a CLIPTokenizer, T5Tokenizer or Qwen2Tokenizer, in its fast or slow form: another's words are other numbers.

    Without one of the files transformers makes a tokenizer of no words, and no error.
    """
    return Need(
        file="tokenizer_config.json",
        values={"tokenizer_class": (kind, f"{kind}Fast")},
        files=(("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",)),
        opens=AutoTokenizer,
    )


class Codec(Protocol):
    """The frozen part of a checkpoint: text encoders, loaded when first used, and VAE. The trainer never has one."""

    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """The rows of encodings of one kind and one set of geometries. Media: per encoding its sources, uint8 (F, H, W, 3)."""

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3) on the CPU of x0 (B, C, …). Raises NotFinite where numbers are no picture: see `check_finite`."""


class Family(Protocol):
    """One model family. `dtype` is the compute dtype of `predict`; masters may be kept wider by the trainer."""

    blocks: ClassVar[tuple[type[nn.Module], ...]]
    """Module classes that FSDP shards and gradient checkpointing recomputes one by one."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Module-name endings that LoRA adapts by default."""
    denoiser_folder: ClassVar[str]
    """In the model's folder. The diffusers pipeline puts the same word before the keys of a LoRA file."""

    @property
    def source_counts(self) -> range:
        """How many sources a prompt may have: range(1), that is none, where the family only paints from a text."""

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether guidance's other branch may be told another text than `unguided` says."""

    @property
    def kinds(self) -> Mapping[str, Kind]: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def base(self) -> Base:
        """How the denoiser's linear layers are kept: see `rlhf.models.quantised`."""

    @property
    def process(self) -> Process: ...
    @property
    def denoiser_path(self) -> Path:
        """The folder of the denoiser to begin with: `path`/`denoiser_folder`, or another that was trained from it."""

    def needs(self) -> Iterator[tuple[str, Need]]:
        """What must lie in the folder "" (`path` itself) and in which subfolders of it, in the order in which it is checked.

        Values that follow from an earlier part's files are read when their part is reached. Raises Refused.
        """

    def empty_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The trainable network on the meta device, with the layers of its `base`: shapes without memory."""

    def finish(self, denoiser: nn.Module, device: str) -> None:
        """Fill in what an empty denoiser lacks beside its parameters: buffers and tables that are plain attributes.

        Called once on every denoiser that trains, takes publications, or is a frozen side. Walk `modules()`: some are wrapped or
        have copies.
        """

    def load_denoiser(self, device: str, folder: Path | None = None, lora: Path | None = None) -> nn.Module:
        """The whole network in `dtype`, frozen, for sampling: the base, another `folder` (a trained export), a LoRA."""

    def load_codec(self, device: str, parts: Any = ...) -> Codec:
        """parts: what opens the folder on the device, a `rlhf.models.folder.LoadParts`; by default it reads the weights."""

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) that the model was trained on, nearest in aspect to a picture of (H, W) pixels."""

    def latent_shape(self, geometry: Geometry) -> tuple[int, ...]:
        """(C, h, w), of a video (C, f, h, w). Raises Refused for a size that the network cannot take."""

    def tokens(self, latents: Tensor) -> int:
        """Target tokens of one sample of latents (B, C, …)."""

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]: ...
    def target(self, source: Source, geometry: Geometry) -> Encoding:
        """The encoding whose row has the x0 of a medium, (C, …), as its tensor "latents"."""

    def empty_row(self, encoding: Encoding) -> Mapping[str, Tensor]:
        """The tensors of an encoding's row on the meta device: shapes and dtypes, from JSON files alone."""

    def unguided(self, prompt: Prompt) -> Prompt | None:
        """Guidance's other branch, also caption dropout; its condition is made in `prompt`'s bucket. None: there is none."""

    def bucket(self, prompt: Prompt) -> Hashable:
        """Whatever must agree within a batch: sizes, numbers of sources, the padded length of a condition."""

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """The condition of B prompts of one bucket, or of their unguided ones. Padding follows from the bucket alone."""

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
        """The prediction that a sampler follows at its `step` (from 0); `state` is kept between the steps of one sample."""


OVERFLOW = 'float16 overflows at 65504: where model.dtype is that, set "bfloat16" or "float32"'


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise NotFinite, beginning with `what`, where numbers of (B, …) are NaN or infinite; not of tensors without data."""
    if not is_fake(tensor) and (
        bad := (~tensor.isfinite()).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
    ):
        raise NotFinite(f"{what}; {OVERFLOW}", bad)


@torch.no_grad()
def sample_batch(
    family: Family,
    denoiser: nn.Module,
    condition: Condition,
    unguided: Condition | None,
    noise: Tensor,
    sampling: SamplingTable,
) -> Tensor:
    """From noise (B, C, …) to x0 along the family's guided prediction; fp32 between steps, whatever the network computes in.

    unguided: the condition of the family's `unguided` prompts where it `needs_unguided`, else None. A row's bits may depend
    on its place in the batch and on the batch size, never on what the other rows are: whoever must repeat a sample keeps both.
    Raises NotFinite, for the condition too.
    """
    for tensor in (*condition.values(), *(unguided or {}).values()):
        check_finite(
            tensor,
            "what the encoders made of it is NaN or infinite: compare their files in model.path with their source",
        )
    state = dict[str, Any]()

    def guided(x_t: Tensor, t: Tensor, step: int) -> Tensor:
        times, scale = t.expand(len(x_t)), sampling.guidance_scale
        return family.guided(denoiser, x_t, times, condition, unguided, guidance_scale=scale, step=step, state=state)

    x0 = family.process.sample(guided, noise.float(), sampling.steps, family.tokens(noise))
    check_finite(
        x0,
        "the denoiser gives NaN or infinity: its weights are damaged, or were trained at too high a rate; take earlier ones",
    )
    return x0


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Condition:
    """Rows of one shape as a batch: tensors (B, …) by name."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
