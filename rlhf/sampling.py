"""The only denoising loop: rollouts, evaluation and editing all call it.

Shapes: B batch, C latent channels, h w latents.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from rlhf.models.family import Family
from rlhf.types import Condition


@torch.no_grad()
def sample(family: Family, denoiser: nn.Module, condition: Condition, noise: Tensor, steps: int) -> Tensor:
    """Euler steps along the family's guided prediction from noise (B, C, h, w) to x0, in fp32.

    x is kept in fp32 between steps whatever the network computes in. Equal batch sizes give equal rows whatever the
    neighbours are; different batch sizes do not (about 5e-7 in fp32), so rollouts pad to one size.
    """
    x = noise.float()
    sigmas = family.process.sigmas(steps, family.tokens(x)).to(x.device)
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * family.guided(denoiser, x, sigma.expand(len(x)), condition)
    return x
