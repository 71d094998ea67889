"""The only denoising loop: rollouts, evaluation and editing all call it.

Shapes: B batch, C latent channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.family import Family
from rlhf.tables import SamplingTable
from rlhf.types import Condition


@torch.no_grad()
def sample_batch(
    family: Family,
    denoiser: nn.Module,
    condition: Condition,
    unguided: Condition | None,
    noise: Tensor,
    sampling: SamplingTable,
) -> Tensor:
    """From noise (B, C, …) to x0 along the family's guided prediction, by the solver of its process, in fp32.

    unguided: the condition of the family's `unguided` prompts where it `needs_unguided`, else None. x is kept in fp32
    between steps whatever the network computes in. A row's bits may depend on its place in the batch and on the batch size;
    they never depend on what the other rows are. So whoever must repeat a sample keeps both.
    """
    solver = family.process.solver(sampling.steps, family.tokens(noise), noise.device)
    x, state = solver.begin(noise.float()), dict[str, Any]()
    for i, t in enumerate(solver.times):
        prediction = family.guided(
            denoiser,
            solver.x_t(x, i),
            t.expand(len(x)),
            condition,
            unguided,
            guidance_scale=sampling.guidance_scale,
            step=i,
            state=state,
        )
        x = solver.step(x, i, prediction)
    return x
