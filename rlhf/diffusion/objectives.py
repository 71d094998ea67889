"""Objectives: from predictions of a policy (and a reference) to a loss.

An objective knows no model and no data source. It is handed two functions `predict(x_t, t, condition) -> prediction` and
the family's process. Left out: weighting of the loss over t (public flow-matching DPO uses a constant β; so do we).

Shapes: B pairs, D = C·h·w latent dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.diffusion.process import Process
from rlhf.types import Condition, PairBatch

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, C, h, w), t (B,), condition) -> prediction (B, C, h, w), fp32."""


class Objective(Protocol):
    """`needs_reference` says whether the trainer keeps a reference; `__call__` gives the loss and scalars to log."""

    @property
    def needs_reference(self) -> bool: ...

    def __call__(
        self, policy: Predict, reference: Predict, process: Process, batch: PairBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...


def squared_error(
    predict: Predict, process: Process, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """e = mean over C, h, w of (prediction − target)², shape (B,). The noising is done in fp32."""
    prediction = predict(process.noisy(x0, noise, t), t, condition)
    return (prediction - process.target(x0, noise, t)).square().flatten(1).mean(1)


def preference_logit(
    policy_w: Tensor, policy_l: Tensor, reference_w: Tensor, reference_l: Tensor, beta: float
) -> Tensor:
    """z = −(β/2)·[(e_θw − e_θl) − (e_rw − e_rl)] (Wallace et al., Diffusion-DPO, arXiv 2311.12908, eq. 14), shape (B,)."""
    return -0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l))


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Diffusion-DPO: loss = mean(−log σ(z)), one (t, noise) per pair for winner, loser, policy AND reference.

    Winner and loser run as one batch of 2B through each model. With mean reduction β's strength per dimension is β/D.
    DPO's known failure is that both errors rise, so each is logged apart, minus its reference.
    """

    beta: float
    needs_reference: bool = True

    def __call__(
        self, policy: Predict, reference: Predict, process: Process, batch: PairBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        x0 = torch.cat([batch.winner, batch.loser])
        noise, t = torch.cat([batch.noise] * 2), torch.cat([batch.t] * 2)
        condition = {name: torch.cat([tensor] * 2) for name, tensor in batch.condition.items()}
        with (
            torch.no_grad()
        ):  # first, so that a LoRA policy's adapter is the active one when backward recomputes blocks
            reference_w, reference_l = squared_error(reference, process, x0, noise, t, condition).chunk(2)
        policy_w, policy_l = squared_error(policy, process, x0, noise, t, condition).chunk(2)
        z = preference_logit(policy_w, policy_l, reference_w, reference_l, self.beta)
        loss = -F.logsigmoid(z).mean()
        return loss, {
            "implicit_acc": (z > 0).float().mean(),
            "logit": z.mean(),
            "winner_error": policy_w.mean(),
            "loser_error": policy_l.mean(),
            "winner_error_minus_reference": (policy_w - reference_w).mean(),
            "loser_error_minus_reference": (policy_l - reference_l).mean(),
        }


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning on the winners: loss = mean e(policy). Keeps no reference."""

    needs_reference: bool = False

    def __call__(
        self, policy: Predict, reference: Predict, process: Process, batch: PairBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = squared_error(policy, process, batch.winner, batch.noise, batch.t, batch.condition).mean()
        return loss, {"winner_error": loss.detach()}
