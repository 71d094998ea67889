"""`FAMILIES` names every model family once: `FAMILIES[name](path=folder, guidance_scale=3.5, dtype=torch.bfloat16)`."""

from rlhf.models.flux_kontext import FluxKontext

FAMILIES = {"flux_kontext": FluxKontext}
