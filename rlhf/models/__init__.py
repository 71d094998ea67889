"""`FAMILIES` names every model family once; `load_family` makes that of a recipe."""

import pkgutil
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.models.flux_kontext import FluxKontext
from rlhf.models.qwen_image_edit import QwenImageEdit
from rlhf.models.stable_diffusion import StableDiffusion
from rlhf.models.wan_subject import WanSubject
from rlhf.tables import ModelTable

FAMILIES: dict[str, Callable[..., Family]] = {
    "flux_kontext": FluxKontext,
    "qwen_image_edit": QwenImageEdit,
    "stable_diffusion": StableDiffusion,
    "wan_subject": WanSubject,
}


def load_family(model: ModelTable) -> Family:
    """The family of a recipe's [model]. Raises Refused for a name that is neither in FAMILIES nor can be imported."""
    try:
        make = FAMILIES.get(model.family) or pkgutil.resolve_name(model.family)
        if not callable(make):
            raise TypeError(f"it is a {type(make).__name__}")
    except (Exception, SystemExit) as error:  # importing runs the module, which may raise anything
        raise Refused(
            f"model.family = {model.family!r} is neither one of {', '.join(FAMILIES)} nor module:NAME of a family that can "
            f"be imported here: {type(error).__name__}: {error}"
        ) from error
    guidance = {} if model.guidance_scale is None else {"guidance_scale": model.guidance_scale}
    denoiser = Path(model.denoiser) if model.denoiser else None
    return make(
        path=Path(model.path), denoiser=denoiser, dtype=getattr(torch, model.dtype), base=model.base, **guidance
    )
