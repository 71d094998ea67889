"""Frozen linear layers in 8 or 4 bits, through which adapters are trained: `model.base`.

    fp8    float8_e4m3fn times a scale per output row                (Micikevicius et al., arXiv 2209.05433)
    int8   −127 … 127 times a scale per output row
    nf4    16 quantiles of a normal distribution, two to a byte, times a scale per 64 values of a row
                                                                     (QLoRA, Dettmers et al., arXiv 2305.14314)
    fp4    the same with a sign, two bits of exponent and one of mantissa, as bitsandbytes' fp4

Rows are quantised by themselves, so a rank needs only its own rows of the checkpoint, and FSDP shards them as any others. It
gathers all parameters in the compute dtype: bfloat16 holds every value of these, and scales are rounded to it beforehand. A layer
computes with the restored weight, in forward and backward alike, and keeps no copy of it between the two. Plain torch, on any
device. Left out: products in 8 bits, quantised norms and embeddings, double quantisation, weights that are quantised in files.

Shapes: O outputs, I inputs, K scales a row.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rlhf.shards.files import SafetensorsFolder

Base = Literal["bf16", "fp8", "int8", "nf4", "fp4"]
BLOCK = 64
"""Values that share a scale in 4 bits."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in _FP4)
"""By code, as in the papers and in bitsandbytes."""
CODES: Mapping[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}
LARGEST = {"fp8": torch.finfo(torch.float8_e4m3fn).max, "int8": 127.0}
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8, "fp4": torch.uint8}


class QuantisedLinear(nn.Linear):
    """A linear layer with a frozen `weight` (O, I), of 4 bits (O, I/2), and `weight_scale` (O, K), yet to be filled."""

    def __init__(self, plain: nn.Linear, base: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.base = plain.in_features, plain.out_features, base
        device, width = plain.weight.device, plain.in_features
        stored = torch.empty(
            self.out_features, width // 2 if base in CODES else width, dtype=STORED[base], device=device
        )
        scale = torch.empty(self.out_features, width // _block(base, width), dtype=plain.weight.dtype, device=device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        y = _Through.apply(x, self.weight, self.weight_scale, self.base)
        return y if self.bias is None else y + self.bias


class _Through(torch.autograd.Function):
    """x @ weight.T, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, base: str) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.base = base
        return nn.functional.linear(x, restored(weight, scale, base, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        return gradient @ restored(weight, scale, ctx.base, gradient.dtype), None, None, None


def restored(weight: Tensor, scale: Tensor, base: str, dtype: torch.dtype) -> Tensor:
    """The matrix (O, I) that a quantised one stands for."""
    if base in CODES:
        # FSDP hands bytes over in the compute dtype.
        both = weight.to(torch.uint8)
        codes = torch.stack([both >> 4, both & 15], dim=-1).flatten(1)
        values = _code_values(base, dtype, weight.device)[codes.int()]
    else:
        values = weight.to(dtype)
    rows, width = values.shape
    return (values.view(rows, scale.shape[1], -1) * scale.to(dtype).unsqueeze(-1)).view(rows, width)


def quantise(weight: Tensor, base: str) -> dict[str, Tensor]:
    """`weight` and `weight_scale` of rows (O, I) of a matrix; scales in fp32 that bfloat16 holds."""
    block = _block(base, weight.shape[1])
    parts = weight.float().unflatten(1, (-1, block))
    most = parts.abs().amax(-1)
    # A row of zeros has any scale.
    scale = torch.where(most > 0, most / LARGEST.get(base, 1.0), 1.0).bfloat16().float()
    scaled = parts / scale.unsqueeze(-1)
    if base not in CODES:
        scaled = scaled.clamp(-LARGEST[base], LARGEST[base]).flatten(1)
        return {"weight": (scaled.round() if base == "int8" else scaled).to(STORED[base]), "weight_scale": scale}
    codes = _nearest(scaled.flatten(1), base)
    return {"weight": codes[:, ::2] << 4 | codes[:, 1::2], "weight_scale": scale}


def _nearest(values: Tensor, base: str) -> Tensor:
    """uint8: the code of the nearest value."""
    order = sorted(range(16), key=CODES[base].__getitem__)
    levels = torch.tensor([CODES[base][code] for code in order], device=values.device)
    between = (levels[1:] + levels[:-1]) / 2
    return torch.tensor(order, dtype=torch.uint8, device=values.device)[torch.bucketize(values.contiguous(), between)]


def _block(base: str, width: int) -> int:
    """Values that share a scale; a row that is no whole blocks has one."""
    return BLOCK if base in CODES and width % BLOCK == 0 else width


@lru_cache(maxsize=16)
def _code_values(base: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    with unset_fake_temporarily():
        return torch.tensor(CODES[base], dtype=dtype, device=device)


def quantise_layers(denoiser: nn.Module, blocks: tuple[type[nn.Module], ...], base: str) -> nn.Module:
    """Put a `QuantisedLinear` in place of every linear layer inside the blocks, adapters' apart; unless on meta it is filled."""
    if base == "bf16":
        return denoiser
    inside = [block for block in denoiser.modules() if isinstance(block, blocks)]
    owners = [module for block in inside for module in block.modules()]
    for owner in owners:
        if isinstance(owner, nn.ModuleDict):  # PEFT's, of adapters
            continue
        for name, layer in list(owner.named_children()):
            if type(layer) is not nn.Linear or layer.in_features % 2:
                continue
            made = QuantisedLinear(layer, base)
            if not layer.weight.is_meta:
                for key, value in quantise(layer.weight, base).items():
                    getattr(made, key).copy_(value)
            setattr(owner, name, made)
    return denoiser


def rows_of(
    checkpoint: SafetensorsFolder, name: str, parameter: Tensor, first: int, last: int, base: str, dtype: torch.dtype
) -> Tensor:
    """Rows of a parameter of the base: those of the checkpoint, or what becomes of them, rounded to the compute dtype first."""
    layer, _, key = name.rpartition(".")
    if parameter.dtype not in STORED.values() and key != "weight_scale":
        return checkpoint.rows(name, first, last, parameter.shape)
    weight = f"{layer}.weight"
    shape = checkpoint.where[weight].shape if weight in checkpoint.where else ()
    return quantise(checkpoint.rows(weight, first, last, shape).to(dtype), base)[key]
