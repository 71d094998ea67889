"""How FLUX and Qwen-Image make tokens of latents.

Shapes: B batch, C latent channels, h w latents.
"""

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w/4, 4C): 2×2 patches become tokens."""
    B, C, h, w = latents.shape
    return latents.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, 4 * C)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`."""
    B, _, C4 = tokens.shape
    return tokens.view(B, h // 2, w // 2, C4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C4 // 4, h, w)
