"""Objectives: from predictions of a policy (and of frozen sides) to a loss.

An objective knows no model and no data source: it is handed a function `predict` per side, the family's process and a batch.
Left out: weighting of preferences over t (public flow-matching DPO uses a constant β; so do we).

Shapes: B examples, C latent channels, … height and width, with frames before them where there are any, D = C·… dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.diffusion.process import Process
from rlhf.types import POLICY, REFERENCE, Batch, Condition

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, C, …), t (B,), condition) -> prediction (B, C, …), fp32. A frozen side's carries no gradient."""
Loss = tuple[Tensor, Mapping[str, Tensor]]
"""The loss and scalars to log, all of them means over B by the batch's weights."""


class Objective(Protocol):
    """Roles of the latents that it reads, frozen sides that the trainer must keep for it, and a call."""

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def sides(self) -> tuple[str, ...]: ...
    def __call__(self, predict: Mapping[str, Predict], process: Process, batch: Batch) -> Loss: ...


def errors(predict: Predict, process: Process, batch: Batch, roles: tuple[str, ...]) -> tuple[Tensor, ...]:
    """e of every role, each (B,): mean over C, … of (prediction − target)², times the role's mask if it has one.

    All roles go through the network as one batch of len(roles)·B, with the same (t, noise). The noising is done in fp32.
    """
    x0 = torch.cat([batch.x0[role] for role in roles])
    noise, t = torch.cat([batch.noise] * len(roles)), torch.cat([batch.t] * len(roles))
    condition = {name: torch.cat([tensor] * len(roles)) for name, tensor in batch.condition.items()}
    prediction = predict(process.noisy(x0, noise, t), t, condition)
    squares = (prediction - process.target(x0, noise, t)).square().chunk(len(roles))
    return tuple(
        (square * batch.loss_mask[role] if role in batch.loss_mask else square).flatten(1).mean(1)
        for role, square in zip(roles, squares, strict=True)
    )


def preference_logit(
    policy_w: Tensor, policy_l: Tensor, reference_w: Tensor, reference_l: Tensor, beta: float
) -> Tensor:
    """z = −(β/2)·[(e_θw − e_θl) − (e_rw − e_rl)] (Wallace et al., Diffusion-DPO, arXiv 2311.12908, eq. 14), shape (B,)."""
    return -0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l))


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Diffusion-DPO: loss = mean(−log σ(z)), one (t, noise) per pair for winner, loser, policy AND reference.

    A pair counts for the smaller of its two weights. With mean reduction β's strength per dimension is β/D.
    DPO's known failure is that both errors rise, so each is logged apart, minus its reference.
    """

    beta: float
    roles: ClassVar[tuple[str, ...]] = ("winner", "loser")
    sides: ClassVar[tuple[str, ...]] = (REFERENCE,)

    def __call__(self, predict: Mapping[str, Predict], process: Process, batch: Batch) -> Loss:
        # The reference first: it keeps no activations, so the policy's are never in memory beside it.
        with torch.no_grad():
            reference_w, reference_l = errors(predict[REFERENCE], process, batch, self.roles)
        policy_w, policy_l = errors(predict[POLICY], process, batch, self.roles)
        weight = torch.minimum(*(batch.weight[role] for role in self.roles))
        z = preference_logit(policy_w, policy_l, reference_w, reference_l, self.beta)

        def mean(values: Tensor) -> Tensor:
            return (values * weight).mean()

        return -mean(F.logsigmoid(z)), {
            "implicit_acc": mean((z > 0).float()),
            "logit": mean(z),
            "winner_error": mean(policy_w),
            "loser_error": mean(policy_l),
            "winner_error_minus_reference": mean(policy_w - reference_w),
            "loser_error_minus_reference": mean(policy_l - reference_l),
        }


WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "sigma_sqrt": lambda t: t**-2.0,
    "cosmap": lambda t: 2 / (torch.pi * (1 - 2 * t + 2 * t**2)),
}
"""What an error at t counts, of a flow (σ = t): diffusers' `compute_loss_weighting_for_sd3`; cosmap: SD3 (2403.03206), 3.1."""


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning on targets: loss = mean w(t)·e(policy). Keeps no frozen side."""

    weighting: str = "none"
    """One of WEIGHTINGS."""
    roles: ClassVar[tuple[str, ...]] = ("target",)
    sides: ClassVar[tuple[str, ...]] = ()

    def __call__(self, predict: Mapping[str, Predict], process: Process, batch: Batch) -> Loss:
        (error,) = errors(predict[POLICY], process, batch, self.roles)
        weight = batch.weight["target"]
        loss = (error * weight * WEIGHTINGS[self.weighting](batch.t)).mean()
        return loss, {"target_error": (error.detach() * weight).mean()}
