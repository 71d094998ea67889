"""`FAMILIES` names every model family once: `FAMILIES[name](path=folder, guidance_scale=3.5, dtype=torch.bfloat16)`."""

from collections.abc import Callable
from pathlib import Path

from rlhf.models.family import Family, compute_dtype
from rlhf.models.flux_kontext import FluxKontext
from rlhf.models.stable_diffusion import StableDiffusion
from rlhf.tables import CheckpointConfig

FAMILIES: dict[str, Callable[..., Family]] = {"flux_kontext": FluxKontext, "stable_diffusion": StableDiffusion}


def load_family(model: CheckpointConfig, mixed_precision: str, guidance_scale: float | None = None) -> Family:
    """The family of a recipe. `guidance_scale` None: the family's own default."""
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    denoiser = Path(model.denoiser) if model.denoiser else None
    return FAMILIES[model.family](
        path=Path(model.path), denoiser=denoiser, dtype=compute_dtype(mixed_precision), **guidance
    )
