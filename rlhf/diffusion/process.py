"""Forward processes: how a clean latent is noised and what a network regresses.

An objective sees only `noisy`, `target` and `draw_t`, so one DPO loss serves every family. Left out: anything a network
needs to be called (timestep scaling, guidance, packing); that belongs to the family. `ddpm.py` has the other process.

Shapes: B batch, … any latent dimensions.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.diffusion.solvers import Euler, Solver


class Process(Protocol):
    """A family's noising rule. t is process time: 1 is pure noise, 0 is data."""

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of shape (B, …) from x0 and noise of that shape and t of shape (B,)."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network regresses at x_t, shape (B, …)."""

    def draw_t(self, seed: int) -> float:
        """One training time, from the process's training distribution; equal seeds give equal times."""

    def solver(self, steps: int, tokens: int, device: torch.device) -> Solver:
        """What a sampler follows from 1 to 0 in `steps` steps, for a picture of `tokens` target tokens."""


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """t of shape (B,) viewed as (B, 1, …, 1) for broadcasting against `like`."""
    return t.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x_t = (1 − t)·x0 + t·ε with velocity target v = ε − x0 (Liu et al., arXiv 2209.03003, eq. 1; SD3, arXiv 2403.03206).

    Training times are logit-normal(0, 1). Sampling times are shifted by the number of target tokens as FLUX does:
    σ' = e^μ / (e^μ + 1/σ − 1), μ linear in the tokens between (base_tokens, base_shift) and (max_tokens, max_shift)
    (diffusers `FlowMatchEulerDiscreteScheduler`, `use_dynamic_shifting`).
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = per_sample(t, x0)
        return (1 - t) * x0 + t * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def draw_t(self, seed: int) -> float:
        return torch.sigmoid(torch.randn((), generator=torch.Generator().manual_seed(seed))).item()

    def solver(self, steps: int, tokens: int, device: torch.device) -> Solver:
        return Euler(self.sigmas(steps, tokens).to(device))

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) decreasing process times, 1 … 0."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        sigma = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        shifted = math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)
        return torch.cat([shifted, shifted.new_zeros(1)]).float()
