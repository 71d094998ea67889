"""`FAMILIES` names every model family once: `FAMILIES[name](path=folder, guidance_scale=3.5, dtype=torch.bfloat16)`."""

from collections.abc import Callable

from rlhf.models.family import Family
from rlhf.models.flux_kontext import FluxKontext
from rlhf.models.stable_diffusion import StableDiffusion

FAMILIES: dict[str, Callable[..., Family]] = {"flux_kontext": FluxKontext, "stable_diffusion": StableDiffusion}
