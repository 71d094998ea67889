"""LoRA through PEFT: a frozen base with one adapter that trains and, in the trainer, a second one that is the reference.

With two adapters the reference is exact after every refresh; switching the adapter off would only be the reference until
the first one. Sampler and trainer use the same parameter names, so publishing is the same as for full weights.
"""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.tables import LoRAConfig
from rlhf.types import seed_from

POLICY, REFERENCE = "policy", "reference"


def add_adapters(
    denoiser: nn.Module, config: LoRAConfig, targets: Sequence[str], adapters: Sequence[str], dtype: torch.dtype
) -> None:
    """Freeze the base and put LoRA layers of `dtype` (dropout 0) on every module whose name ends in one of `targets`.

    PEFT raises ValueError when no module matches. Weights are uninitialised until filled.
    """
    peft_config = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=list(config.targets or targets)
    )
    denoiser.requires_grad_(False)
    for adapter in adapters:
        inject_adapter_in_model(peft_config, denoiser, adapter_name=adapter)
    for name, module in denoiser.named_modules():
        if is_adapter(f"{name}."):
            module.to(dtype)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(is_trained(name))
    activate(denoiser, adapters[0])


def activate(denoiser: nn.Module, adapter: str) -> None:
    """Make `adapter` the one in use.

    PEFT's own `set_adapter` also flips `requires_grad`, which FSDP reads only once and the optimizer never expects, so the
    name is set directly.
    """
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [adapter]


@contextmanager
def using(denoiser: nn.Module, adapter: str):
    """Use `adapter` inside the block and the policy's after it."""
    activate(denoiser, adapter)
    try:
        yield
    finally:
        activate(denoiser, POLICY)


def base_name(name: str) -> str:
    """A parameter's name in the plain checkpoint: PEFT wraps adapted layers in `base_layer`."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def is_trained(name: str) -> bool:
    return is_adapter(name) and f".{POLICY}." in name


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The start of an adapter, fp32: A uniform in ±1/sqrt(in) (PEFT's Kaiming choice), B zero.

    The reference adapter starts with the same values as the policy's.
    """
    if ".lora_B." in name:
        return torch.zeros(tuple(shape))
    generator = torch.Generator().manual_seed(seed_from(seed, name.replace(f".{REFERENCE}.", f".{POLICY}.")))
    return torch.empty(tuple(shape)).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


def file_key(name: str, prefix: str) -> str:
    """A policy adapter parameter's key in a diffusers LoRA file, e.g. transformer.x.attn.to_q.lora_A.weight."""
    return f"{prefix}.{name.replace(f'.{POLICY}.', '.')}"


def file_metadata(config: LoRAConfig, targets: Sequence[str], prefix: str) -> dict[str, str]:
    """Header that carries rank and alpha: without it diffusers would take alpha = rank."""
    values = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": sorted(config.targets or targets)}
    return {"lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in values.items()})}
