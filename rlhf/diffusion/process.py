"""Processes: how a clean latent is noised, what a network regresses, and how a sampler goes back from noise to data.

An objective sees only `noisy` and `target`, so one DPO loss serves every family. Left out: anything a network needs to be
called (timestep scaling, guidance, packing); that belongs to the family. `ddpm.py` has the other process.

Shapes: B batch, … any latent dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from rlhf.errors import Refused

Times = Literal["uniform", "logit_normal", "mode"]
Network = Callable[[Tensor, Tensor, int], Tensor]
"""(x_t (B, …), t (), the number of the call from 0) -> prediction (B, …)."""


class Process(Protocol):
    """A family's noising rule. t (B,) is process time: 1 is pure noise, 0 is data; x0, noise and x_t are (B, …).

    noisy: x_t. target: what the network regresses at x_t. draw_t: a training time from the process's distribution, equal for
    equal seeds. sample: x0 from normal noise in fp32 and in `steps` steps. tokens: of the target, for what depends on its size.
    """

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def draw_t(self, seed: int, tokens: int) -> float: ...
    def sample(self, network: Network, noise: Tensor, steps: int, tokens: int) -> Tensor: ...


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """t of shape (B,) viewed as (B, 1, …, 1) for broadcasting against `like`."""
    return t.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x_t = (1 − t)·x0 + t·ε with velocity target v = ε − x0 (Liu et al., arXiv 2209.03003, eq. 1; SD3, arXiv 2403.03206).

    Training times are logit-normal(0, 1), unless others are asked for, and shifted. Sampling times are shifted by the number of
    target tokens as FLUX does: σ' = e^μ / (e^μ + 1/σ − 1), μ linear in the tokens between (base_tokens, base_shift) and
    (max_tokens, max_shift) (diffusers `FlowMatchEulerDiscreteScheduler`, `use_dynamic_shifting`).
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    last: float | None = None
    """The last time but 0 of sampling, to which all are stretched (`shift_terminal`); None: as it comes."""
    times: Times = "logit_normal"
    """Of training, from u uniform in 0 … 1 or n ~ N(0, 1): t = u; σ(n); "mode": 1 − u − 1.29·(cos²(πu/2) − 1 + u), which is
    dense in the middle and keeps both ends (SD3, section 3.1)."""
    times_shift: float | Literal["tokens"] = 1.0
    """s in t' = s·t / (1 + (s − 1)·t) (SD3, eq. 23), above 1: noisier; "tokens": e^μ, as in sampling."""

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = per_sample(t, x0)
        return (1 - t) * x0 + t * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def draw_t(self, seed: int, tokens: int) -> float:
        random = torch.Generator().manual_seed(seed)
        if self.times == "logit_normal":
            t = torch.sigmoid(torch.randn((), generator=random)).item()
        else:
            t = torch.rand((), generator=random).item()
        if self.times == "mode":
            t = 1 - t - 1.29 * (math.cos(math.pi / 2 * t) ** 2 - 1 + t)
        shift = self._shift(tokens) if self.times_shift == "tokens" else self.times_shift
        return shift * t / (1 + (shift - 1) * t)

    def _shift(self, tokens: int) -> float:
        """e^μ."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))

    def sample(self, network: Network, noise: Tensor, steps: int, tokens: int) -> Tensor:
        """Euler's method: x += (σ' − σ)·v."""
        x, sigmas = noise, self.sigmas(steps, tokens).to(noise.device)
        for i in range(steps):
            x = x + (sigmas[i + 1] - sigmas[i]) * network(x, sigmas[i], i)
        return x

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) decreasing process times, 1 … 0."""
        shift, sigma = self._shift(tokens), torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        shifted = shift / (shift + 1 / sigma - 1)
        if self.last is not None and steps > 1:
            shifted = 1 - (1 - shifted) * (1 - self.last) / (1 - shifted[-1])
        return torch.cat([shifted, shifted.new_zeros(1)]).float()


def with_times(process: Process, times: Times | None, shift: float | Literal["tokens"]) -> Process:
    """The process with other training times; None: its own. Raises Refused for one that knows N timesteps alone."""
    if times is None and shift == 1:
        return process
    if not isinstance(process, RectifiedFlow):
        raise Refused(
            f"trainer.timesteps = {times!r} and trainer.timestep_shift = {shift!r} are of flow matching; a "
            f"{type(process).__name__} is trained at each of its timesteps alike: leave both out"
        )
    return replace(process, times=times or process.times, times_shift=shift)
