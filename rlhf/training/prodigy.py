"""Prodigy (Mishchenko & Defazio, arXiv 2306.06101) over FSDP2 shards: AdamW that finds its rate by itself.

d, the estimate of the distance to the solution, is one number for all parameters, from sums over all of them: over all ranks too,
where the authors' package would keep one d per rank. As their README advises for diffusion models, the moments' bias is corrected
and a warmup does not enter the denominator (`use_bias_correction`, `safeguard_warmup`). Left out: `growth_rate`, `slice_p`.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, zeros
from torch.optim import Optimizer

from rlhf.shards.distributed import over_ranks

D0 = 1e-6
"""The first d."""


class Prodigy(Optimizer):
    """Algorithm 4 of the paper with the Adam step. The rate from outside multiplies d: 1 is meant, or a schedule below it."""

    def __init__(self, parameters: Iterable[DTensor], *, lr: float, betas: tuple[float, float], **settings: float):
        """settings: `eps` and `weight_decay`, which is decoupled."""
        super().__init__(parameters, {"lr": lr, "betas": betas, **settings})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient. A collective: two numbers over the ranks."""
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= _begun(parameter)
        shared = (self.state[parameter] for parameter in parameters if "d" in self.state[parameter])
        first = next(shared, self.state[parameters[0]])
        if "d" not in first:  # kept beside one parameter, since they are of all
            for name, value in (("d", D0), ("distance", 0.0)):
                first[name] = zeros((1,), device_mesh=parameters[0].device_mesh, placements=[Replicate()])
                first[name].to_local().fill_(value)
        d, distance = first["d"].to_local(), first["distance"].to_local()
        beta1, beta2 = group["betas"]
        count = first["step"] + 1
        rate = d * (group["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count))
        sums = d.new_zeros(2, dtype=torch.float64)
        for parameter in parameters:
            state, gradient = self._local(parameter), parameter.grad.to_local()
            self.state[parameter]["step"] += 1
            sums[0] += (gradient * (state["p0"] - parameter.to_local())).sum(dtype=torch.float64)
            state["exp_avg"].mul_(beta1).add_(d * (1 - beta1) * gradient)
            state["exp_avg_sq"].mul_(beta2).add_(d**2 * (1 - beta2) * gradient**2)
            if group["lr"] > 0:
                state["s"].mul_(math.sqrt(beta2)).add_(d * (d / D0) * gradient)
            sums[1] += state["s"].abs().sum(dtype=torch.float64)
        inner, size = over_ranks(sums, parameters[0])
        if group["lr"] > 0:
            distance.mul_(math.sqrt(beta2)).add_(d / D0 * rate * inner)
            d.copy_(torch.where(size > 0, torch.maximum(d, distance / size), d))
        for parameter in parameters:
            state, weights = self._local(parameter), parameter.to_local()
            weights.mul_(1 - rate * group["weight_decay"])
            weights.sub_(rate * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + d * group["eps"]))

    def _local(self, parameter: DTensor) -> dict[str, Tensor]:
        return {key: value.to_local() for key, value in self.state[parameter].items() if isinstance(value, DTensor)}


def _begun(parameter: DTensor) -> dict[str, int | DTensor]:
    """p0 is where the parameter began, s a mean of its gradients."""
    new = partial(zeros, parameter.shape, device_mesh=parameter.device_mesh, placements=parameter.placements)
    p0 = new()
    p0.to_local().copy_(parameter.to_local())
    return {"step": 0, "exp_avg": new(), "exp_avg_sq": new(), "s": new(), "p0": p0}
