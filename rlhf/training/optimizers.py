"""The optimizers of `trainer.optimizer` over FSDP2 shards, and their state as files want it.

A parameter's rows may be uneven over the ranks, with none on some. AdamW is elementwise and torch's knows DTensors. Adafactor
takes means over whole parameters: torch's is another algorithm (its rate always follows the weights' RMS) and wrong on two
ranks, transformers' refuses DTensors; the one below sums over ranks. Left out: Adafactor's relative steps, parameter scaling
and first moment, which Diffusion-DPO switches off.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, zeros
from torch.optim import Optimizer

from rlhf.errors import Refused
from rlhf.shards.distributed import over_ranks
from rlhf.training.prodigy import Prodigy
from rlhf.training_tables import TrainerConfig


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5) with a rate from outside, over shards.

    Steps as transformers.optimization.Adafactor(scale_parameter=False, relative_step=False, clip_threshold=1.0) would on
    the whole parameters. The second moment of (…, n, m) is kept as its means over m, (…, n), and over n, (…, m).
    """

    def __init__(self, parameters: Iterable[DTensor], **settings: float):
        """settings: `lr` and `weight_decay`."""
        super().__init__(parameters, settings)

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
        # 1 − β2 of this step (section 7.2); 1 at the first, so that zeros need no correction.
        new = state["step"] ** -0.8
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
                column.mul_(1 - new).add_(over_ranks(square.sum(-2), parameter) / rows, alpha=new)
                row_mean = over_ranks(row.sum(-1, keepdim=True), parameter) / rows
            else:
                column.mul_(1 - new).add_(square.mean(-2), alpha=new)
                row_mean = row.mean(-1, keepdim=True)
            update = (row / row_mean).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2) * gradient
        rms = (over_ranks(update.square().sum(), parameter) / parameter.numel()).sqrt()
        weights.mul_(1 - lr * weight_decay).sub_(update.mul_(lr / rms.clamp(min=1.0)))

    @staticmethod
    def _second_moment(parameter: DTensor) -> dict[str, DTensor]:
        shape, by_rows = parameter.shape, parameter.placements
        new = partial(zeros, device_mesh=parameter.device_mesh)
        if len(shape) == 1:
            return {"exp_avg_sq": new(shape, placements=by_rows)}
        of_columns = [Replicate()] if len(shape) == 2 else by_rows
        return {
            "exp_avg_sq_row": new(shape[:-1], placements=by_rows),
            "exp_avg_sq_col": new((*shape[:-2], shape[-1]), placements=of_columns),
        }


def check_optimizer(name: str) -> None:
    """Raise Refused where an optimizer needs a package that is not installed."""
    if name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise Refused(
            'trainer.optimizer = "adamw_8bit" needs bitsandbytes, which `make install EXTRA=gpu` brings; '
            'without it take "adafactor"'
        )


class AdamW8bit(Optimizer):
    """bitsandbytes' AdamW8bit, which knows no DTensor, on this rank's rows: AdamW is elementwise.

    Its blocks of 256 values share a scale and run along a rank's flat rows, and shards below 4,096 values keep 32 bits, so
    both the rounding and the state depend on the number of ranks.
    """

    def __init__(self, parameters: Iterable[DTensor], **settings: Any):
        check_optimizer("adamw_8bit")
        from bitsandbytes.optim import AdamW8bit as OfPlainTensors  # only when chosen: it loads a native library

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


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adafactor": Adafactor,
    "adamw_8bit": AdamW8bit,
    "prodigy": Prodigy,
    "sgd": torch.optim.SGD,
}


def make_optimizer(parameters: Iterable[DTensor], config: TrainerConfig) -> Optimizer:
    """The one that `trainer.optimizer` names."""
    settings: dict[str, Any] = {"lr": config.scaled_learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        settings |= {"momentum": config.sgd_momentum}
    elif config.optimizer != "adafactor":
        settings |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    return OPTIMIZERS[config.optimizer](parameters, **settings)


_NOT_SAVED = ("step", "qmap1", "qmap2")
"""The count of updates is kept once for all; the two maps from 8 bits to numbers are constants of bitsandbytes."""


def state_of(
    optimizer: Optimizer, parameters: Mapping[str, DTensor]
) -> tuple[dict[str, dict[str, DTensor]], dict[str, Tensor]]:
    """What fits any number of ranks, by state key and parameter name, and what is this rank's, by "key/name"."""
    by_rows: dict[str, dict[str, DTensor]] = {}
    of_this_rank = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                by_rows.setdefault(key, {})[name] = value
            elif isinstance(value, Tensor) and key not in _NOT_SAVED:
                of_this_rank[f"{key}/{name}"] = value
    return by_rows, of_this_rank


@torch.no_grad()
def make_state(optimizer: Optimizer, parameters: Iterable[DTensor], *, updates: int) -> None:
    """Give `parameters` of a fresh optimizer the state that `updates` updates leave, its values yet to be filled in.

    Only the optimizer knows the shapes, so it makes them itself: one update with zero gradients at rate 0. A collective.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    (group,) = optimizer.param_groups
    rate, group["lr"] = group["lr"], 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    group["lr"] = rate
    for state in optimizer.state.values():
        if (step := state.get("step")) is not None:
            state["step"] = torch.full_like(step, updates) if isinstance(step, Tensor) else updates
