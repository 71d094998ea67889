"""Small real things that many tests share: tiny folders of every family, a trainer on one, and random pairs for Kontext."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf.diffusion.objectives import DPO
from rlhf.models import FAMILIES, tiny
from rlhf.tables import LoRAConfig, TrainerConfig
from rlhf.training.trainer import Trainer
from rlhf.types import PairBatch

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes comes with EXTRA=gpu: once it is there diffusers imports it in every process",
)
OPTIMIZER_NAMES = [
    "adamw",
    "adafactor",
    pytest.param("adamw_8bit", marks=needs_bitsandbytes),
]
LORA = LoRAConfig(rank=4, alpha=8.0)


WRITERS = {
    "flux_kontext": tiny.write_flux_kontext,
    "stable_diffusion": tiny.write_stable_diffusion,
    "stable_diffusion xl": partial(tiny.write_stable_diffusion, xl=True, prediction_type="v_prediction"),
}
"""A tiny checkpoint of every kind that a family must serve, by the family's name and a word for the kind."""


def family(path: Path, dtype: torch.dtype = torch.bfloat16, kind: str = "flux_kontext"):
    return FAMILIES[kind.split()[0]](path=path, dtype=dtype)


def trainer(
    mesh,
    path: Path,
    *,
    kind: str = "flux_kontext",
    lora: bool = False,
    beta: float = 5000.0,
    dtype=torch.bfloat16,
    **changes,
) -> Trainer:
    settings = dict(learning_rate=1e-3, ema_decay=0.9, mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
    config = TrainerConfig(**{**settings, "lora": LORA if lora else None, **changes})
    return Trainer(family=family(path, dtype, kind), config=config, objective=DPO(beta=beta), mesh=mesh, seed=7)


def pairs(count: int, seed: int = 0, height: int = 48, width: int = 32, channels: int = 4) -> PairBatch:
    """`count` random pairs for the tiny Kontext world."""
    g = torch.Generator().manual_seed(seed)
    shape = (count, channels, height // 8, width // 8)

    def normal(*size):
        return torch.randn(*size, generator=g)

    return PairBatch(
        winner=normal(*shape),
        loser=normal(*shape),
        condition={
            "prompt_embeds": normal(count, 24, 32),
            "pooled_prompt_embeds": normal(count, 32),
            "source_latents": normal(*shape),
        },
        t=torch.rand(count, generator=g),
        noise=normal(*shape),
    )


def part(batch: PairBatch, start: int, stop: int) -> PairBatch:
    """Pairs [start, stop) of a batch."""
    return PairBatch(
        winner=batch.winner[start:stop],
        loser=batch.loser[start:stop],
        condition={name: tensor[start:stop] for name, tensor in batch.condition.items()},
        t=batch.t[start:stop],
        noise=batch.noise[start:stop],
    )
