"""LoRA files of other programs for FLUX and Qwen-Image: from their names to diffusers', and back.

    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight   lora_B.weight
    comfyui     diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight lora_B.weight   alpha
    kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight    lora_up.weight  alpha

Of FLUX, ComfyUI and kohya's scripts name layers as Black Forest Labs' code does, which computes q, k and v (and in single blocks
the MLP's first layer) with one layer. Going there, the adapters of its parts become one: A is stacked and B is block-diagonal, so
that nothing is rounded. Coming back, every part takes its rows of B and the rows of A that they use. alpha / rank goes into B.
Of Qwen-Image all have diffusers' names, behind these prefixes; files without any prefix are read too.

Read are also files with diffusers' names behind PEFT's prefix `base_model.model.`, whose alpha is in a file beside them (see
`lora`). Left out: DoRA, LoHa, LoKr, text encoders.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from rlhf.errors import Refused

Layout = Literal["comfyui", "kohya"]
COMFYUI, KOHYA, PEFT = "diffusion_model.", "lora_unet_", "base_model.model."
HALVES = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
HALVES |= {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}  # as PEFT names them in memory
KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, HALVES))})")
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
"""Of a double block: a layer of Black Forest Labs' code, and diffusers' layers whose outputs are its rows, in order."""
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
SHIFT_FIRST = "final_layer.adaLN_modulation.1"
"""`norm_out.linear`, whose rows are shift and scale here and scale and shift in diffusers."""


class Unreadable(Refused):
    """Keys that belong to no layer, or lack their other half; the message says which."""


@dataclass
class Adapter:
    """Of one layer."""

    A: Tensor | None = None
    B: Tensor | None = None
    alpha: Tensor | None = None
    keys: list[str] = field(default_factory=list)


def flux_layers(denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every layer of Black Forest Labs' code that a Flux transformer has, with its parts in diffusers."""
    found: dict[str, tuple[str, ...]] = {**OUTSIDE, SHIFT_FIRST: ("norm_out.linear",)}
    blocks = (("double_blocks", "transformer_blocks", DOUBLE), ("single_blocks", "single_transformer_blocks", SINGLE))
    for theirs, ours, parts in blocks:
        for number in range(len(getattr(denoiser, ours))):
            for name, layers in parts.items():
                found[f"{theirs}.{number}.{name}"] = tuple(f"{ours}.{number}.{layer}" for layer in layers)
    return found


def layers_of(denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every layer that has a name in the other layouts, with its parts in diffusers; empty for a denoiser that is in none."""
    if isinstance(denoiser, FluxTransformer2DModel):
        return flux_layers(denoiser)
    if isinstance(denoiser, QwenImageTransformer2DModel):
        return {name: (name,) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    return {}


def prefixes(denoiser: nn.Module) -> tuple[str, ...]:
    """How the keys begin that `to_diffusers` reads for this denoiser."""
    bare = ("transformer_blocks.",) if isinstance(denoiser, QwenImageTransformer2DModel) else ()
    return (COMFYUI, KOHYA, PEFT, *bare) if layers_of(denoiser) else ()


def to_diffusers(tensors: Mapping[str, Tensor], denoiser: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A file's tensors under diffusers' names, with alpha multiplied into lora_B. Matrices may lie on the meta device.

    Raises: Unreadable for a key that names no layer of the denoiser or none of an adapter, for two adapters of one layer, and
    for adapters that change nothing.
    """
    layers = layers_of(denoiser)
    weights = {name: module.weight for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    names = {name.replace(".", "_"): name for name in layers} | {name: name for name in (*layers, *weights)}
    found = dict[str, Adapter]()
    for key, tensor in tensors.items():
        matched = KEY.fullmatch(re.sub(rf"^({re.escape(COMFYUI)}|{KOHYA}|{re.escape(PEFT)})(transformer\.)?", "", key))
        if matched is None or matched[1] not in names:
            raise Unreadable(f"{key} names no adapter of a layer of this {type(denoiser).__name__}")
        adapter = found.setdefault(names[matched[1]], Adapter())
        if getattr(adapter, HALVES[matched[2]]) is not None:
            raise Unreadable(f"{key} is a second adapter of its layer, beside {adapter.keys[0]}")
        if matched[2] == "alpha" and not (tensor.numel() == 1 and 0 < tensor.item() < math.inf):
            raise Unreadable(f"{key} is {tensor.tolist()}, but alpha is a number above 0")
        setattr(adapter, HALVES[matched[2]], tensor)
        adapter.keys.append(key)
    made = dict[str, Tensor]()
    for name, adapter in found.items():
        A, B = adapter.A, adapter.B
        parts = layers.get(name, (name,))
        rows = [weights[part].shape[0] for part in parts]
        if A is None or B is None:
            raise Unreadable(f"{adapter.keys[0]} lacks its other half")
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or len(B) != sum(rows):
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise Unreadable(f"{adapter.keys[0]} and its other half have the shapes {shapes}, for {sum(rows)} outputs")
        if adapter.alpha is not None and not A.is_meta:
            B = (B.double() * (adapter.alpha.double() / len(A))).to(B.dtype)
        B = _halves_swapped(B) if name == SHIFT_FIRST else B
        for part, part_rows in zip(parts, B.split(rows), strict=True):
            if len(parts) > 1 and not A.is_meta and not part_rows.any():
                continue  # a part of a fused layer that was not trained
            if f"{prefix}.{part}.lora_A.weight" in made:
                raise Unreadable(f"{adapter.keys[0]} is a second adapter of {part}")
            made[f"{prefix}.{part}.lora_A.weight"], made[f"{prefix}.{part}.lora_B.weight"] = _used(A, part_rows)
    if not any(B.is_meta or B.any() for key, B in made.items() if ".lora_B." in key):
        raise Unreadable(f"every lora_B (lora_up) is zero, of {len(tensors)} tensors: it changes nothing")
    return made


def _used(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rank that B does not use, if it uses any: what `from_diffusers` stacked comes apart again."""
    if A.is_meta or not (used := B.ne(0).any(0)).any():
        return A, B
    return A[used], B[:, used]


def from_diffusers(
    tensors: Mapping[str, Tensor], denoiser: nn.Module, prefix: str, layout: Layout
) -> dict[str, Tensor]:
    """A file's tensors, in diffusers' layout with alpha = rank, under another program's names. See the module."""
    outputs = {name: module.out_features for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    half = ("lora_A.weight", "lora_B.weight") if layout == "comfyui" else ("lora_down.weight", "lora_up.weight")
    made = dict[str, Tensor]()
    for name, parts in layers_of(denoiser).items():
        adapters = {part: adapter for part in parts if (adapter := _adapter(tensors, f"{prefix}.{part}"))}
        if not adapters:
            continue
        stacked = torch.cat([A for A, _ in adapters.values()])
        rows, column = list[Tensor](), 0
        for part in parts:
            wide = stacked.new_zeros(outputs[part], len(stacked))
            if part in adapters:
                _, B = adapters[part]
                wide[:, column : column + B.shape[1]] = B
                column += B.shape[1]
            rows.append(wide)
        B = torch.cat(rows)
        key = f"{COMFYUI}{name}" if layout == "comfyui" else f"{KOHYA}{name.replace('.', '_')}"
        made[f"{key}.{half[0]}"] = stacked
        made[f"{key}.{half[1]}"] = _halves_swapped(B) if name == SHIFT_FIRST else B
        made[f"{key}.alpha"] = torch.tensor(float(len(stacked)))
    return made


def _adapter(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    A = tensors.get(f"{layer}.lora_A.weight")
    return None if A is None else (A, tensors[f"{layer}.lora_B.weight"])


def _halves_swapped(rows: Tensor) -> Tensor:
    return torch.cat(tuple(reversed(rows.chunk(2))))
