"""Processes: how a clean latent is noised, what a network regresses, and how a sampler goes back from noise to data.

An objective sees only `noisy` and `target`, so one DPO loss serves every family. Left out: anything a network needs to be
called (timestep scaling, guidance, packing); that belongs to the family. `ddpm.py` has the other process.

Shapes: B batch, … any latent dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, int], Tensor]
"""(x_t (B, …), t (), the number of the call from 0) -> prediction (B, …)."""


class Process(Protocol):
    """A family's noising rule. t (B,) is process time: 1 is pure noise, 0 is data; x0, noise and x_t are (B, …).

    noisy: x_t. target: what the network regresses at x_t. draw_t: a training time from the process's distribution, equal for
    equal seeds. sample: x0 from normal noise in fp32 and in `steps` steps, for pictures of `tokens` target tokens.
    """

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def draw_t(self, seed: int) -> float: ...
    def sample(self, network: Network, noise: Tensor, steps: int, tokens: int) -> Tensor: ...


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

    def sample(self, network: Network, noise: Tensor, steps: int, tokens: int) -> Tensor:
        """Euler's method: x += (σ' − σ)·v."""
        x, sigmas = noise, self.sigmas(steps, tokens).to(noise.device)
        for i in range(steps):
            x = x + (sigmas[i + 1] - sigmas[i]) * network(x, sigmas[i], i)
        return x

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) decreasing process times, 1 … 0."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        sigma = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        shifted = math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)
        return torch.cat([shifted, shifted.new_zeros(1)]).float()
