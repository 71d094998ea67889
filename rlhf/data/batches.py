"""From examples to tensors: rows of encodings, finished latents, and the one place where training noise is drawn.

(t, noise) of an example come from (run seed, step, index within the step) alone, never from the rank that trains it, so that
any number of ranks and any resume sees the same numbers.

Shapes: B examples, C latent channels, h w latents.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf.diffusion.process import Process
from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.tables import SamplingTable
from rlhf.types import Batch, Condition, Encoding, Prompt, noise_from, seed_from


def latents_to_array(latents: Tensor) -> np.ndarray:
    """bf16 (C, h, w) as an int16 array of the same bits: numpy has no bf16."""
    return latents.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()


def latents_from_array(array: np.ndarray) -> Tensor:
    """The inverse of `latents_to_array`, widened to fp32 (exact)."""
    return torch.from_numpy(np.array(array)).view(torch.bfloat16).float()


# --- conditions --------------------------------------------------------------------------------------------------------


ReadRow = Callable[[Encoding], Mapping[str, Tensor]]
"""The row of an encoding: `EncodingCache.row`, or of rows that were encoded for the work at hand."""


def condition_of(
    family: Family, row: ReadRow, prompts: Sequence[Prompt], instead_of: Sequence[Prompt] = ()
) -> Condition:
    """The condition of B prompts of one bucket; of those that stand in place of others, in the others' bucket."""
    bucket = _only({family.bucket(prompt) for prompt in instead_of or prompts})
    return family.condition([[row(e) for e in family.encodings(prompt)] for prompt in prompts], bucket)


def unguided_of(family: Family, row: ReadRow, prompts: Sequence[Prompt], sampling: SamplingTable) -> Condition | None:
    """The condition of guidance's other branch; None where sampling needs none."""
    others = [other for prompt in prompts if (other := other_branch(family, prompt, sampling))]
    return condition_of(family, row, others, prompts) if others else None


def other_branch(family: Family, prompt: Prompt, sampling: SamplingTable) -> Prompt | None:
    """What guidance's other branch is told in place of a prompt; None where sampling has one branch alone."""
    if not family.needs_unguided(sampling.guidance_scale):
        return None
    other, negative = family.unguided(prompt), sampling.negative_prompt
    assert other is not None, "a family that needs an unguided condition says of which prompt"
    return other if negative is None else replace(other, instruction=negative)


def _only(buckets: Set[Hashable]) -> Hashable:
    assert len(buckets) == 1, f"a batch holds one bucket, not {buckets}"
    return next(iter(buckets))


def buckets_of(family: Family, prompts: Iterable[Prompt], *, alone: bool = False) -> np.ndarray | None:
    """int32 (prompts,): a number per bucket; None where there is but one. Raises Refused for a prompt that the family does not
    take.

    alone: prompts of one number share a bucket without their sources, too.
    """
    numbers = dict[Hashable, int]()

    def bucket(prompt: Prompt) -> Hashable:
        return family.bucket(prompt), family.bucket(replace(prompt, sources=())) if alone else None

    found = [numbers.setdefault(bucket(prompt), len(numbers)) for prompt in prompts]
    return np.array(found, np.int32) if len(numbers) > 1 else None


def check_buckets(family: Family, prompts: Iterable[Prompt], batch_size: int) -> None:
    """Raise Refused for a prompt that the family does not take, or where prompts that may meet in a batch have two buckets."""
    found = dict.fromkeys(family.bucket(prompt) for prompt in prompts)
    if batch_size > 1 and len(found) > 1:
        first, second, *_ = found
        raise Refused(
            f"the prompts are of {len(found)} kinds that cannot share a batch, such as {first} and {second}, but "
            f"trainer.train_batch_size = {batch_size}: set it to 1 and raise trainer.gradient_accumulation_steps"
        )


# --- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """An example as tensors."""

    rows: Sequence[Mapping[str, Tensor]]
    """Of its prompt's encodings, in the family's order."""
    bucket: Hashable
    x0: Mapping[str, Tensor]
    """By role, (C, …) fp32."""
    mask: Tensor | None = None
    """(h, w), 0 … 1: how much of each latent lies under its mask; None: it has none."""


def t_seed(seed: int, step: int, index: int) -> int:
    return seed_from(seed, "t", step, index)


def noise_seed(seed: int, step: int, index: int) -> int:
    return seed_from(seed, "noise", step, index)


def batches_of(
    family: Family,
    examples: Sequence[EncodedExample],
    size: int,
    *,
    seed: int,
    step: int,
    first_index: int,
    process: Process | None = None,
    mask_weight: float = 1.0,
) -> list[Batch]:
    """Micro-batches of `size` examples of one bucket, each of weight 1; `first_index`: of the first within the step.

    process: which draws t; None: the family's own. mask_weight: what a latent's squared error is multiplied by where it lies
    under a mask; elsewhere by 1.
    """
    batches, process = list[Batch](), process or family.process
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        indices = range(first_index + start, first_index + start + len(some))
        x0 = {role: torch.stack([example.x0[role] for example in some]) for role in some[0].x0}
        shape = next(iter(x0.values())).shape[1:]
        noise = torch.stack([noise_from(noise_seed(seed, step, index), shape) for index in indices])
        tokens = family.tokens(noise)
        batches.append(
            Batch(
                x0=x0,
                condition=family.condition([one.rows for one in some], _only({one.bucket for one in some})),
                t=torch.tensor([process.draw_t(t_seed(seed, step, index), tokens) for index in indices]),
                noise=noise,
                weight={role: torch.ones(len(some)) for role in x0},
                loss_mask=_loss_mask(some, shape, mask_weight),
            )
        )
    return batches


def _loss_mask(examples: Sequence[EncodedExample], shape: torch.Size, mask_weight: float) -> dict[str, Tensor]:
    """By role, (B, 1, …) of latents (C, …); empty where no example has a mask."""
    if all(example.mask is None for example in examples):
        return {}
    whole = torch.zeros(shape[-2:])
    under = torch.stack([whole if example.mask is None else example.mask for example in examples])
    weight = 1 + (mask_weight - 1) * under.view(len(examples), *[1] * (len(shape) - 2), *shape[-2:])
    return dict.fromkeys(examples[0].x0, weight)
