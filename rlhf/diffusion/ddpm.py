"""The process of Stable Diffusion's networks, which know N timesteps, and sampling by any scheduler of diffusers.

Apart from `process.py`, because importing diffusers takes seconds that the processes without a network need not pay. Left out:
the target "sample"; SNR weights (Diffusion-DPO has none); schedulers whose Brownian noise no seed per picture can reach.

Shapes: B batch, N training timesteps, … any latent dimensions.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
import torch
import xxhash
from torch import Tensor

from rlhf.diffusion.process import Network, per_sample
from rlhf.errors import Refused
from rlhf.types import seed_from

BETA_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "rescale_betas_zero_snr"),
)
UNSEEDED = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


def scheduler_class(config: Mapping[str, Any], file: str) -> type:
    """The diffusers class that a scheduler_config.json names. Raises Refused naming `file` if it cannot be used."""
    name = str(config.get("_class_name"))
    if name in UNSEEDED:
        raise Refused(
            f"{file}: _class_name = {name!r} draws Brownian noise for a whole batch at once, so that a candidate would "
            "depend on its neighbours; use e.g. DPMSolverMultistepScheduler with algorithm_type sde-dpmsolver++"
        )
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or "beta_start" not in inspect.signature(found).parameters:
        raise Refused(f"{file}: _class_name = {name!r} is no DDPM scheduler of diffusers {diffusers.__version__}")
    return found


def row_generators(noise: Tensor) -> list[torch.Generator]:
    """A generator per row of noise (B, …), seeded by the row's own bytes."""
    seeds = [seed_from("solver", xxhash.xxh3_64_intdigest(row.cpu().numpy().tobytes())) for row in noise]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """x_t = √ᾱ·x0 + √(1 − ᾱ)·ε, ᾱ = ᾱ_k, at the timestep k = t·N − 1 (Ho et al., arXiv 2006.11239, eq. 4).

    The target is ε (ibid., eq. 14) or v = √ᾱ·ε − √(1 − ᾱ)·x0 (Salimans and Ho, arXiv 2202.00512, section 4), whichever the
    checkpoint's scheduler config says; ᾱ comes from its betas. Only t = (k + 1)/N with k = 0 … N − 1 is trained, uniformly,
    as in Diffusion-DPO; t = 0, which is data (ᾱ = 1), is no timestep. Sampling is by the scheduler that the config names.
    """

    config: Mapping[str, Any]
    """The checkpoint's scheduler_config.json."""
    file: str = "scheduler_config.json"
    """Where it was read, for messages."""

    def __post_init__(self):
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise Refused(
                f"{self.file}: prediction_type = {self.prediction_type!r} cannot be trained; epsilon and v_prediction can"
            )
        scheduler_class(self.config, self.file)

    @property
    def prediction_type(self) -> str:
        return self.config.get("prediction_type", "epsilon")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of the N timesteps, (N,) in double precision."""
        betas = {key: self.config[key] for key in BETA_KEYS if key in self.config}
        return diffusers.DDPMScheduler(**betas).alphas_cumprod.double()

    def timestep(self, t: Tensor) -> Tensor:
        """k = t·N − 1, fp32, shape (B,). A whole one is exactly whole, also from a t in fp32; samplers may ask between."""
        k = t.double() * len(self.alphas_cumprod) - 1
        return torch.where((k - k.round()).abs() < 1e-3, k.round(), k).float()

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ, √(1 − ᾱ)) for broadcasting against `like`, in its dtype."""
        with_data = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod])
        alpha = per_sample(with_data.to(t.device)[self.timestep(t).round().long() + 1], like)
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def draw_t(self, seed: int, tokens: int) -> float:
        count = len(self.alphas_cumprod)
        return (torch.randint(count, (), generator=torch.Generator().manual_seed(seed)).item() + 1) / count

    def sample(self, network: Network, noise: Tensor, steps: int, tokens: int) -> Tensor:
        """Stochastic schedulers draw each row's noise from a generator that the row's own starting noise seeds: the same
        start draws the same, whatever its neighbours in the batch and on whatever device."""
        scheduler: Any = scheduler_class(self.config, self.file).from_config(dict(self.config))  # type: ignore[attr-defined]
        scheduler.set_timesteps(steps, device=noise.device)
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": row_generators(noise)} if draws else {}
        x = noise * scheduler.init_noise_sigma
        for i, timestep in enumerate(scheduler.timesteps):
            # Double, so that a network is asked for the scheduler's own timestep and not for its neighbour in fp32.
            t = (timestep.double() + 1) / len(self.alphas_cumprod)
            prediction = network(scheduler.scale_model_input(x, timestep), t, i)
            x = scheduler.step(prediction, timestep, x, **options, return_dict=False)[0]
        return x
