"""The nouns of the system: what a prompt, a candidate, a score and a pair are.

Everything here is a frozen value. `image` and `latents` fields are opaque handles: inside one process they are arrays,
between Ray actors they are object references, so that the driver passes pairs around without ever holding a pixel.

Shapes: B batch, C latent channels, H W pixels, h w latents, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

Condition = dict[str, Tensor]
"""An encoded prompt: tensors by name, each with a leading batch dimension B. Only the family knows the names."""


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as (run seed, prompt cursor, attempt): equal tuples give equal noise anywhere."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 1


def noise_from(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape` in fp32, drawn on the CPU so that every device and actor sees the same values."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def stack_conditions(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions along B. Every condition must have the same keys and per-sample shapes."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is known of the product on a photo (a row of ctr_metadata.csv)."""

    food_name: str
    food_type: str
    city_name: str
    shop_name: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An instruction and its source image: the unit that candidates are compared within."""

    image_id: str
    instruction: str
    image: str
    """Absolute path of the source image."""
    item: Item | None = None
    height: int
    """Pixels of the edit, H."""
    width: int
    """Pixels of the edit, W."""
    text_key: str
    """Cache key of the encoded instruction."""
    source_key: str
    """Cache key of the encoded source image (content, geometry, fit, encoder)."""

    @property
    def key(self) -> str:
        """Identity of the prompt: the source image AND the instruction, never the text alone."""
        return f"{self.text_key}:{self.source_key}"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One sampled edit of one prompt."""

    cursor: int
    """Position of the prompt in the run's prompt stream."""
    attempt: int
    """0, 1, … within the prompt; (run seed, cursor, attempt) seeds the noise."""
    version: int
    """Policy version that sampled it."""
    image: Any
    """uint8 (H, W, 3), or a reference to it."""
    latents: Any
    """bf16 (C, h, w) of the finished sample x0, or a reference to it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The filter's answer. Never a reward."""

    valid: bool
    reason: str = ""
    pass_probability: float | None = None
    raw_response: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the judges said of one candidate: its verdict and, if it passed, one scalar per reward (higher is better)."""

    verdict: Verdict
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference between two candidates of one prompt."""

    prompt: Prompt
    cursor: int
    winner: Candidate
    loser: Candidate
    winner_score: Score
    loser_score: Score
    margin: float
    """Difference of the scaled rewards, > 0."""

    @property
    def version(self) -> int:
        """The older of the two candidates' policy versions: what staleness is measured from."""
        return min(self.winner.version, self.loser.version)


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Tensors of B pairs, ready for an objective. One (t, noise) per pair, shared by winner, loser and reference."""

    winner: Tensor
    """(B, C, h, w) x0 of the winners, fp32."""
    loser: Tensor
    """(B, C, h, w) x0 of the losers, fp32."""
    condition: Condition
    """Encoded prompts, leading dimension B."""
    t: Tensor
    """(B,) process time, 1 noise, 0 data."""
    noise: Tensor
    """(B, C, h, w) standard normal."""

    def to(self, device: str) -> "PairBatch":
        """The same batch on another device."""
        return PairBatch(
            winner=self.winner.to(device),
            loser=self.loser.to(device),
            condition={name: tensor.to(device) for name, tensor in self.condition.items()},
            t=self.t.to(device),
            noise=self.noise.to(device),
        )
