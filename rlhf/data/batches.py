"""From examples to tensors: rows of encodings, finished latents, and the one place where training noise is drawn.

(t, noise) of an example come from (run seed, step, index within the step) alone, never from the rank that trains it, so that
any number of ranks and any resume sees the same numbers.

Shapes: B examples, C latent channels, h w latents.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.data.cache import EncodingCache, encoding_key
from rlhf.diffusion.process import Process
from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.types import Batch, Condition, Encoding, Prompt, evenly_weighted, noise_from, seed_from


def latents_to_array(latents: Tensor) -> np.ndarray:
    """bf16 (C, h, w) as an int16 array of the same bits: numpy has no bf16."""
    return latents.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()


def latents_from_array(array: np.ndarray) -> Tensor:
    """The inverse of `latents_to_array`, widened to fp32 (exact)."""
    return torch.from_numpy(np.array(array)).view(torch.bfloat16).float()


# --- rows of encodings -------------------------------------------------------------------------------------------------


class Encodings(Protocol):
    """Where the rows of encodings are."""

    def row(self, encoding: Encoding) -> Mapping[str, Tensor]: ...


class CachedEncodings:
    """Rows of a cache folder, for one model: `fingerprints` by kind, see `rlhf.data.fingerprint`."""

    def __init__(self, cache: EncodingCache, fingerprints: Mapping[str, str]):
        self.cache, self._fingerprints = cache, fingerprints

    def key(self, encoding: Encoding) -> str:
        return encoding_key(encoding, self._fingerprints[encoding.kind])

    def row(self, encoding: Encoding) -> Mapping[str, Tensor]:
        """Raises: CacheError."""
        return self.cache.row(self.key(encoding))


@dataclass(frozen=True, kw_only=True)
class CachePlace:
    """A cache folder and the model whose rows are read from it: what a process needs to open its own `CachedEncodings`."""

    folder: str
    fingerprints: Mapping[str, str]

    def open(self) -> CachedEncodings:
        return CachedEncodings(EncodingCache(self.folder), self.fingerprints)


class HandedEncodings:
    """Rows that were encoded for the work at hand; the others, if there are any, are in a cache."""

    def __init__(self, handed: Mapping[Encoding, Mapping[str, Tensor]], cached: Encodings | None = None):
        self._handed, self._cached = handed, cached

    def row(self, encoding: Encoding) -> Mapping[str, Tensor]:
        if self._cached is None or encoding in self._handed:
            return self._handed[encoding]
        return self._cached.row(encoding)


def condition_of(family: Family, encodings: Encodings, prompts: Sequence[Prompt]) -> Condition:
    """The condition of B prompts of one bucket."""
    return _condition(family, encodings, prompts, _bucket(family, prompts))


def _condition(family: Family, encodings: Encodings, prompts: Sequence[Prompt], bucket: Hashable) -> Condition:
    return family.condition([[encodings.row(e) for e in family.encodings(prompt)] for prompt in prompts], bucket)


def _bucket(family: Family, prompts: Sequence[Prompt]) -> Hashable:
    buckets = {family.bucket(prompt) for prompt in prompts}
    assert len(buckets) == 1, f"a batch holds one bucket, not {buckets}"
    return buckets.pop()


def check_buckets(family: Family, prompts: Iterable[Prompt], batch_size: int) -> None:
    """Raise Refused for a prompt that the family does not take, or where prompts that may meet in a batch have two buckets."""
    found = dict.fromkeys(family.bucket(prompt) for prompt in prompts)
    if batch_size > 1 and len(found) > 1:
        first, second, *_ = found
        raise Refused(
            f"the prompts are of {len(found)} kinds that cannot share a batch, such as {first} and {second}, but "
            f"trainer.train_batch_size = {batch_size}: set it to 1 and raise trainer.gradient_accumulation_steps"
        )


def unguided_of(
    family: Family, encodings: Encodings, prompts: Sequence[Prompt], guidance_scale: float | None
) -> Condition | None:
    """The condition of guidance's other branch; None where sampling needs none."""
    if not family.needs_unguided(guidance_scale):
        return None
    others = [family.unguided(prompt) for prompt in prompts]
    assert None not in others, "a family that needs an unguided condition says of which prompt"
    return _condition(family, encodings, [other for other in others if other], _bucket(family, prompts))


# --- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """An example as tensors."""

    rows: Sequence[Mapping[str, Tensor]]
    """Of its prompt's encodings, in the family's order."""
    bucket: Hashable
    x0: Mapping[str, Tensor]
    """By role, (C, …) fp32."""


def t_seed(seed: int, step: int, index: int) -> int:
    return seed_from(seed, "t", step, index)


def noise_seed(seed: int, step: int, index: int) -> int:
    return seed_from(seed, "noise", step, index)


def draws(process: Process, *, seed: int, step: int, indices: range, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(t (B,), noise (B, C, …)) of the examples with these indices within the step; `shape` is (C, …)."""
    t = torch.tensor([process.draw_t(t_seed(seed, step, index)) for index in indices])
    return t, torch.stack([noise_from(noise_seed(seed, step, index), shape) for index in indices])


def make_batch(
    x0: Mapping[str, Tensor], condition: Condition, process: Process, *, seed: int, step: int, first_index: int
) -> Batch:
    """Latents (B, C, …) by role with the (t, noise) of indices first_index, … within the step, all of weight 1."""
    first = next(iter(x0.values()))
    indices = range(first_index, first_index + len(first))
    t, noise = draws(process, seed=seed, step=step, indices=indices, shape=first.shape[1:])
    return Batch(x0=x0, condition=condition, t=t, noise=noise, weight=evenly_weighted(x0))


def batch_of(family: Family, examples: Sequence[EncodedExample], *, seed: int, step: int, first_index: int) -> Batch:
    """Examples of one bucket as one batch; `first_index` is the first one's index within the step."""
    buckets = {example.bucket for example in examples}
    assert len(buckets) == 1, f"a batch holds one bucket, not {buckets}"
    x0 = {role: torch.stack([example.x0[role] for example in examples]) for role in examples[0].x0}
    condition = family.condition([example.rows for example in examples], buckets.pop())
    return make_batch(x0, condition, family.process, seed=seed, step=step, first_index=first_index)
