"""The only denoising loop: rollouts, evaluation and editing all call it.

Shapes: B batch, C latent channels, h w latents.
"""

import torch
from torch import Tensor, nn

from rlhf.models.family import Family
from rlhf.types import Condition


@torch.no_grad()
def sample(family: Family, denoiser: nn.Module, condition: Condition, noise: Tensor, steps: int) -> Tensor:
    """From noise (B, C, h, w) to x0 along the family's guided prediction, by the solver of its process, in fp32.

    x is kept in fp32 between steps whatever the network computes in. Equal batch sizes give equal rows whatever the
    neighbours are; different batch sizes do not (about 5e-7 in fp32), so rollouts pad to one size.
    """
    solver = family.process.solver(steps, family.tokens(noise), noise.device)
    x = solver.begin(noise.float())
    for i, t in enumerate(solver.times):
        prediction = family.guided(denoiser, solver.x_t(x, i), t.expand(len(x)), condition)
        x = solver.step(x, i, prediction)
    return x
