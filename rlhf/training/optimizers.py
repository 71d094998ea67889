"""The optimizers of `trainer.optimizer` over FSDP2 shards, and their state as files want it.

Every parameter is a DTensor whose rows (dimension 0) are spread over the ranks, unevenly or with none on some of them. AdamW
is elementwise and torch's knows DTensors. Adafactor takes means over whole parameters: torch's is another algorithm (its
rate always follows the weights' RMS) and wrong on two ranks, transformers' refuses DTensors; the one below sums over ranks.

Left out: Adafactor's relative steps, parameter scaling and first moment, which Diffusion-DPO switches off.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, zeros

from rlhf.errors import Refused
from rlhf.tables import TrainerConfig


def adamw(parameters: Iterable[DTensor], config: TrainerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **_adam_settings(config))


def adafactor(parameters: Iterable[DTensor], config: TrainerConfig) -> torch.optim.Optimizer:
    return Adafactor(parameters, lr=config.scaled_learning_rate, weight_decay=config.weight_decay)


def adamw_8bit(parameters: Iterable[DTensor], config: TrainerConfig) -> torch.optim.Optimizer:
    return AdamW8bit(parameters, **_adam_settings(config))


def _adam_settings(config: TrainerConfig) -> dict[str, Any]:
    return {
        "lr": config.scaled_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }


OPTIMIZERS: Mapping[str, Callable[[Iterable[DTensor], TrainerConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "adamw_8bit": adamw_8bit,
}


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5) with a rate from outside, over shards.

    Steps as transformers.optimization.Adafactor(scale_parameter=False, relative_step=False, clip_threshold=1.0) would on
    the whole parameters. The second moment of (…, n, m) is kept as its means over m, (…, n), and over n, (…, m).
    """

    def __init__(self, parameters: Iterable[DTensor], *, lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient. A collective: some short sums per parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: DTensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, **self._second_moment(parameter)}
        state["step"] += 1
        new = (
            state["step"] ** -0.8
        )  # 1 − β2 of this step (section 7.2); 1 at the first, so that zeros need no correction
        moment = {key: value.to_local() for key, value in state.items() if key != "step"}
        weights, gradient = parameter.to_local(), parameter.grad.to_local()
        square = gradient.square() + 1e-30
        if parameter.ndim == 1:
            moment["exp_avg_sq"].mul_(1 - new).add_(square, alpha=new)
            update = moment["exp_avg_sq"].rsqrt() * gradient
        else:
            row, column = moment["exp_avg_sq_row"], moment["exp_avg_sq_col"]
            row.mul_(1 - new).add_(square.mean(-1), alpha=new)
            if parameter.ndim == 2:  # the means over rows run over the ranks
                rows = parameter.shape[0]
                column.mul_(1 - new).add_(_over_ranks(square.sum(-2), parameter) / rows, alpha=new)
                row_mean = _over_ranks(row.sum(-1, keepdim=True), parameter) / rows
            else:
                column.mul_(1 - new).add_(square.mean(-2), alpha=new)
                row_mean = row.mean(-1, keepdim=True)
            update = (row / row_mean).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2) * gradient
        rms = (_over_ranks(update.square().sum(), parameter) / parameter.numel()).sqrt()
        weights.mul_(1 - lr * weight_decay).sub_(update.mul_(lr / rms.clamp(min=1.0)))

    @staticmethod
    def _second_moment(parameter: DTensor) -> dict[str, DTensor]:
        shape, mesh, by_rows = parameter.shape, parameter.device_mesh, parameter.placements
        if len(shape) == 1:
            return {"exp_avg_sq": zeros(shape, device_mesh=mesh, placements=by_rows)}
        return {
            "exp_avg_sq_row": zeros(shape[:-1], device_mesh=mesh, placements=by_rows),
            "exp_avg_sq_col": zeros(
                (*shape[:-2], shape[-1]), device_mesh=mesh, placements=[Replicate()] if len(shape) == 2 else by_rows
            ),
        }


def _over_ranks(part: Tensor, parameter: DTensor) -> Tensor:
    """The sum of every rank's `part`."""
    return DTensor.from_local(part, parameter.device_mesh, [Partial()], run_check=False).full_tensor()


class AdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' AdamW8bit, which knows no DTensor, on this rank's rows: AdamW is elementwise.

    Its blocks of 256 values share a scale and run along a rank's flat rows, and shards below 4,096 values keep 32 bits, so
    both the rounding and the state depend on the number of ranks.
    """

    def __init__(self, parameters: Iterable[DTensor], **settings: Any):
        try:
            from bitsandbytes.optim import AdamW8bit as OfPlainTensors  # only when chosen: it loads a native library
        except ImportError as error:
            raise Refused(
                'trainer.optimizer = "adamw_8bit" needs bitsandbytes, which `make install EXTRA=gpu` brings; '
                'without it take "adafactor"'
            ) from error

        super().__init__(parameters, settings)
        self._rows = {p: nn.Parameter(p.to_local().detach()) for group in self.param_groups for p in group["params"]}
        self._inner = OfPlainTensors(self._rows.values(), **settings)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every row that this rank holds. No collective."""
        (group,), (inner_group,) = self.param_groups, self._inner.param_groups
        inner_group["lr"] = group["lr"]
        for parameter, rows in self._rows.items():
            # Anew in each step: at its first forward FSDP moves uneven shards into padded memory.
            rows.data = parameter.to_local()
            if parameter.grad is not None and rows.numel():
                rows.grad = parameter.grad.to_local()
        self._inner.step()
        for parameter, rows in self._rows.items():
            if rows.grad is not None:
                rows.grad = None
                self.state[parameter] = self._inner.state[rows]


# --- state -------------------------------------------------------------------------------------------------------------

_NOT_SAVED = ("step", "qmap1", "qmap2")
"""The count of updates is kept once for all; the two maps from 8 bits to numbers are constants of bitsandbytes."""


def state_by_rows(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, DTensor]
) -> dict[str, list[tuple[str, DTensor]]]:
    """What fits any number of ranks, the same on all of them: state key → (parameter name, its DTensor)."""
    files: dict[str, list[tuple[str, DTensor]]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                files.setdefault(key, []).append((name, value))
    return files


def state_of_this_rank(optimizer: torch.optim.Optimizer, parameters: Mapping[str, DTensor]) -> dict[str, Tensor]:
    """What belongs to this rank of this number of ranks: "state key/parameter name" → tensor."""
    return {
        f"{key}/{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and key not in _NOT_SAVED
    }


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[DTensor], *, updates: int) -> None:
    """Give `parameters` of a fresh optimizer the state that `updates` updates leave, its values yet to be filled in.

    Only the optimizer knows the shapes, so it makes them itself: one update with zero gradients at rate 0. A collective.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        step = state["step"]
        state["step"] = torch.full_like(step, updates) if isinstance(step, Tensor) else updates
