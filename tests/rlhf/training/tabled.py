"""A small video denoiser with what checkpoints do not hold: a buffer and a table that is a plain attribute, and its family."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from rlhf.diffusion.process import RectifiedFlow
from rlhf.shards.files import DIFFUSERS
from rlhf.types import Batch

CHANNELS = 4


def wave(device: str | None = None) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, CHANNELS, device=device)


def turns(device: str | None = None) -> torch.Tensor:
    return torch.polar(torch.ones(CHANNELS, device=device), wave(device))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(CHANNELS, CHANNELS)
        self.register_buffer("wave", wave(), persistent=False)
        self.turns = turns()

    def forward(self, x):
        return x + self.mix(x * self.wave.to(x.dtype)) * self.turns.real.to(x.dtype)


class Tabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixings = nn.ModuleList([Mixing(), Mixing()])
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        for mixing in self.mixings:
            x = mixing(x)
        return self.out(x)


@dataclass(frozen=True, kw_only=True)
class TabledFamily:
    """As much of a family as the trainer and a sampler's denoiser need."""

    denoiser_path: Path
    finishes: bool = True
    dtype: torch.dtype = torch.bfloat16
    base: ClassVar = "bf16"
    process: ClassVar = RectifiedFlow()
    blocks: ClassVar = (Mixing,)
    lora_targets: ClassVar = ("mix",)

    def empty_denoiser(self, dtype):
        with torch.device("meta"):
            denoiser = Tabled()
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.to(dtype)
        return denoiser

    def load_denoiser(self, device):
        torch.manual_seed(0)
        denoiser = Tabled().eval().requires_grad_(False)
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return denoiser

    def finish(self, denoiser, device):
        for module in denoiser.modules():
            if isinstance(module, Mixing) and self.finishes:
                module.wave, module.turns = wave(device), turns(device)

    def predict(self, denoiser, x_t, t, condition):
        """(B, C, F, h, w) fp32."""
        return denoiser(x_t.to(self.dtype).movedim(1, -1)).movedim(-1, 1).float()


def write(folder: Path) -> Path:
    """The checkpoint that `load_denoiser` holds."""
    folder.mkdir()
    weights = TabledFamily(denoiser_path=folder).load_denoiser("cpu").state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / f"{DIFFUSERS}.safetensors")
    return folder


def frames(count: int, seed: int) -> Batch:
    """Random pairs of three frames."""
    generator = torch.Generator().manual_seed(seed)
    winner, loser, noise = (torch.randn(count, CHANNELS, 3, 4, 2, generator=generator) for _ in range(3))
    return Batch(
        x0={"winner": winner, "loser": loser},
        condition={},
        t=torch.rand(count, generator=generator),
        noise=noise,
        weight={"winner": torch.ones(count), "loser": torch.ones(count)},
    )
