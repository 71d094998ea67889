"""Small real things that many tests share: tiny folders of every family, every way to train one, random pairs for Kontext."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf.diffusion.objectives import DPO
from rlhf.models import load_family, tiny
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from rlhf.models.tiny_wan import write_wan_subject
from rlhf.models.trainable import Trainable, load_trainable
from rlhf.tables import ModelTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainableTable, TrainerConfig
from rlhf.types import Batch
from tests import strange

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes comes with EXTRA=gpu: once it is there diffusers imports it in every process",
)
OPTIMIZER_NAMES = [
    "adamw",
    "adafactor",
    pytest.param("adamw_8bit", marks=needs_bitsandbytes),
    "prodigy",
    "sgd",
]
RANK, ALPHA = 4, 8.0
PATTERNS = {
    "flux_kontext": ("transformer_blocks.*.ff", "single_transformer_blocks.1", "norm_out"),
    "qwen_image_edit": ("transformer_blocks.*.img_mlp", "transformer_blocks.0", "norm_out"),
    "stable_diffusion": ("*.transformer_blocks.0.attn2", "up_blocks.*.resnets", "conv_out"),
    "wan_subject": ("blocks.*.attn2.?_vae", "blocks.1", "proj_out"),
    "tests.strange:Strange": ("blocks.0.looking", "blocks.1", "out"),
}
"""By family: modules inside an FSDP block that LoRA adapts too, whole FSDP blocks (alone, and as a list), one of the root."""

UNREACHED = {
    "qwen_image_edit": re.compile(r"transformer_blocks\.1\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)\."),
}
"""By family: the parameters of the tiny network from which no gradient comes, since the last block's text goes nowhere."""


def _lora(**more) -> TrainableTable:
    return TrainableTable(kind="lora", rank=RANK, alpha=ALPHA, **more)


TRAINABLES = {
    "full": lambda patterns: TrainableTable(),
    "lora": lambda patterns: _lora(),
    "modules": lambda patterns: TrainableTable(kind="modules", patterns=patterns),
    "lora_modules": lambda patterns: _lora(patterns=patterns),
}
"""Every way to train: its `[trainable]`, from the family's patterns."""

WRITERS = {
    "flux_kontext": tiny.write_flux_kontext,
    "qwen_image_edit": partial(write_qwen_image_edit, zero_cond_t=True),
    "qwen_image_edit painting": partial(write_qwen_image_edit, pipeline="QwenImagePipeline"),
    "stable_diffusion": tiny.write_stable_diffusion,
    "stable_diffusion xl": partial(tiny.write_stable_diffusion, xl=True, prediction_type="v_prediction"),
    "wan_subject": write_wan_subject,
    "wan_subject fused": partial(write_wan_subject, fused=True),
    "tests.strange:Strange": strange.write,
}
"""A tiny checkpoint of every kind that a family must serve, by the family's name and a word for the kind."""


def family(path: Path, dtype: torch.dtype = torch.bfloat16, kind: str = "flux_kontext"):
    name = str(dtype).removeprefix("torch.")
    return load_family(ModelTable(family=kind.split()[0], path=str(path), dtype=name))


def trainable(how: str, family, kind: str = "flux_kontext") -> Trainable:
    return load_trainable(TRAINABLES[how](PATTERNS[kind.split()[0]]), family)


def trainer(
    mesh,
    path: Path,
    *,
    kind: str = "flux_kontext",
    how: str = "full",
    beta: float = 5000.0,
    dtype=torch.bfloat16,
    **changes,
) -> Trainer:
    found, rate = family(path, dtype, kind), 1.0 if changes.get("optimizer") == "prodigy" else 1e-3
    return Trainer(
        family=found,
        config=TrainerConfig(**{"learning_rate": rate, "ema_decay": 0.9, **changes}),
        trainable=trainable(how, found, kind),
        objective=DPO(beta=beta),
        mesh=mesh,
        seed=7,
    )


def pairs(count: int, seed: int = 0, height: int = 48, width: int = 32, channels: int = 4) -> Batch:
    """`count` random pairs for the tiny Kontext world."""
    g = torch.Generator().manual_seed(seed)
    shape = (count, channels, height // 8, width // 8)

    def normal(*size):
        return torch.randn(*size, generator=g)

    return Batch(
        x0={"winner": normal(*shape), "loser": normal(*shape)},
        condition={
            "prompt_embeds": normal(count, 24, 32),
            "pooled_prompt_embeds": normal(count, 32),
            "source_latents": normal(*shape),
        },
        t=torch.rand(count, generator=g),
        noise=normal(*shape),
        weight={"winner": torch.ones(count), "loser": torch.ones(count)},
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Rows [start, stop) of a batch."""

    def rows(tensors):
        return {name: tensor[start:stop] for name, tensor in tensors.items()}

    return Batch(
        x0=rows(batch.x0),
        condition=rows(batch.condition),
        t=batch.t[start:stop],
        noise=batch.noise[start:stop],
        weight=rows(batch.weight),
        loss_mask=rows(batch.loss_mask),
    )
