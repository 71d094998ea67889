"""From preference pairs to tensors: the one place where training noise is drawn.

(t, noise) of a pair come from (run seed, step, pair index) alone, never from the rank that trains it, so that any number
of ranks and any resume sees the same numbers.

Shapes: B pairs, C latent channels, h w latents.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf.diffusion.process import Process
from rlhf.types import Condition, Pair, PairBatch, Prompt, noise_from, seed_from


def latents_to_array(latents: Tensor) -> np.ndarray:
    """bf16 (C, h, w) as an int16 array of the same bits: numpy has no bf16."""
    return latents.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()


def latents_from_array(array: np.ndarray) -> Tensor:
    """The inverse of `latents_to_array`, widened to fp32 (exact)."""
    return torch.from_numpy(np.array(array)).view(torch.bfloat16).float()


def t_seed(seed: int, step: int, index: int) -> int:
    return seed_from(seed, "t", step, index)


def noise_seed(seed: int, step: int, index: int) -> int:
    return seed_from(seed, "noise", step, index)


def draws(process: Process, *, seed: int, step: int, indices: range, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(t (B,), noise (B, C, h, w)) of the pairs with these indices within the step; `shape` is (C, h, w)."""
    t = torch.tensor([process.draw_t(t_seed(seed, step, index)) for index in indices])
    return t, torch.stack([noise_from(noise_seed(seed, step, index), shape) for index in indices])


def collate(
    pairs: Sequence[Pair],
    conditions: Callable[[Sequence[Prompt]], Condition],
    process: Process,
    *,
    seed: int,
    step: int,
    first_index: int,
) -> PairBatch:
    """Pairs whose candidates hold latent arrays, as one batch; `first_index` is the first pair's index within the step."""
    winner = torch.stack([latents_from_array(pair.winner.latents) for pair in pairs])
    loser = torch.stack([latents_from_array(pair.loser.latents) for pair in pairs])
    indices = range(first_index, first_index + len(pairs))
    t, noise = draws(process, seed=seed, step=step, indices=indices, shape=winner.shape[1:])
    condition = conditions([pair.prompt for pair in pairs])
    return PairBatch(winner=winner, loser=loser, condition=condition, t=t, noise=noise)
