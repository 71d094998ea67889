"""Optimizers over FSDP2 shards against the libraries' own on whole parameters."""

import math
from importlib.util import find_spec
from typing import get_args

import pytest
import torch
from torch import nn

from rlhf.errors import Refused
from rlhf.training.optimizers import OPTIMIZERS, check_optimizer, make_optimizer
from rlhf.training_tables import TrainerConfig
from tests.worlds import OPTIMIZER_NAMES, needs_bitsandbytes

SHAPES = {
    "conv": (5, 4, 3, 3),
    "linear": (7, 6),
    "vector": (5,),
    "one_row": (1, 6),  # none on the second of two ranks
    "one": (1,),
    "wide": (
        65,
        256,
    ),  # above 4,096 values per rank, whole blocks of 256: kept in 8 bits, the same on any number of ranks
}
SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=g) for name, shape in SHAPES.items()}


class Bag(nn.Module):
    """Parameters whose gradients are what it is called with."""

    def __init__(self):
        super().__init__()
        for name, value in tensors(0).items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, gradients):
        return sum((getattr(self, name) * gradient).sum() for name, gradient in gradients.items())


def gradients(optimizer, step):
    """Prodigy goes far only where gradients point the same way."""
    return {name: value * (0.1 + step) for name, value in tensors(1 if optimizer == "prodigy" else step + 1).items()}


def rate(optimizer, step):
    return 1.0 if optimizer == "prodigy" else SETTINGS["learning_rate"] / (step + 1)


STEPS = {"prodigy": 24}
"""Of a comparison; others: 4."""


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_optimizer_whose_package_is_absent_is_refused():
    with pytest.raises(Refused, match=r'trainer\.optimizer = "adamw_8bit" needs bitsandbytes.*take "adafactor"'):
        check_optimizer("adamw_8bit")
    check_optimizer("adafactor")


def sharded(mesh, optimizer, steps):
    """Whole parameters after some steps, made as the trainer makes them: the optimizer before the first forward."""
    from rlhf.shards import distributed

    with torch.device("meta"):
        bag = Bag()
    distributed.shard(bag, (), mesh, None).to_empty(device="cpu")
    for name, parameter in bag.named_parameters():
        rows, start = parameter.to_local(), distributed.first_row(parameter)
        rows.data.copy_(tensors(0)[name][start : start + len(rows)])
    config = TrainerConfig(optimizer=optimizer, **SETTINGS | {"learning_rate": rate(optimizer, 0)})
    made = make_optimizer(bag.parameters(), config)
    for step in range(steps):
        bag(gradients(optimizer, step)).backward()
        made.param_groups[0]["lr"] = rate(optimizer, step)
        made.step()
        made.zero_grad(set_to_none=True)
    return {name: p.full_tensor().detach() for name, p in bag.named_parameters()}


class WholeProdigy:
    """The paper's algorithm 4 with the Adam step, word for word, on whole tensors; its factors d0 and 1 − β3 cancel."""

    def __init__(self, parameters, lr, weight_decay, betas, eps):
        self.x, self.eps, self.decay = [*parameters], eps, weight_decay
        self.beta1, self.beta2 = betas
        self.beta3 = math.sqrt(self.beta2)
        self.x0 = [x.detach().clone() for x in self.x]
        self.m, self.v, self.s = ([torch.zeros_like(x) for x in self.x] for _ in range(3))
        self.d, self.r, self.k = 1e-6, 0.0, 0
        self.param_groups = [{"lr": lr}]

    @torch.no_grad()
    def step(self):
        self.k += 1
        d = self.d
        rate = self.param_groups[0]["lr"] * math.sqrt(1 - self.beta2**self.k) / (1 - self.beta1**self.k) * d
        self.r = self.beta3 * self.r + (1 - self.beta3) * rate * d * sum(
            (x.grad * (x0 - x)).sum().item() for x, x0 in zip(self.x, self.x0, strict=True)
        )
        for i, x in enumerate(self.x):
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * d * x.grad
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * d**2 * x.grad**2
            self.s[i] = self.beta3 * self.s[i] + (1 - self.beta3) * d**2 * x.grad
        self.d = max(d, self.r / sum(s.abs().sum().item() for s in self.s))
        for x, m, v in zip(self.x, self.m, self.v, strict=True):
            x.mul_(1 - self.decay * rate)
            x.sub_(rate * m / (v.sqrt() + self.d * self.eps))

    def zero_grad(self, set_to_none):
        for x in self.x:
            x.grad = None


def whole(mesh, optimizer, steps):
    """The same by the library's own optimizer on plain tensors."""
    from transformers.optimization import Adafactor

    bag = Bag()
    adam = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    as_diffusion_dpo = {"scale_parameter": False, "relative_step": False, "clip_threshold": 1.0}
    if optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit as make

        settings = adam
    else:
        make, settings = {
            "adamw": (torch.optim.AdamW, adam),
            "adafactor": (Adafactor, {"lr": 1e-2, "weight_decay": 0.1, **as_diffusion_dpo}),
            "prodigy": (WholeProdigy, adam),
            "sgd": (torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}),
        }[optimizer]
    made = make(bag.parameters(), **settings)
    for step in range(steps):
        bag(gradients(optimizer, step)).backward()
        made.param_groups[0]["lr"] = rate(optimizer, step)
        made.step()
        made.zero_grad(set_to_none=True)
    return {name: p.detach() for name, p in bag.named_parameters()}


def largest(one, other):
    return {name: (one[name] - other[name]).abs().max().item() for name in one}


def rounding(weights, steps):
    """What another order of sums may add up to: each step rounds a weight by eps × its size, and moves it by the rate × 1,
    which follows from Adafactor's means over up to 256 values. All in fp32."""
    size = max(value.abs().max().item() for value in weights.values())
    return steps * torch.finfo(torch.float32).eps * (size + SETTINGS["learning_rate"] * 256)


@pytest.mark.parametrize("optimizer", OPTIMIZER_NAMES)
def test_one_and_two_ranks_step_like_the_library_on_whole_parameters(one_rank, two_ranks, optimizer):
    steps = STEPS.get(optimizer, 4)
    (expected,) = one_rank.run(whole, optimizer, steps)
    (alone,) = one_rank.run(sharded, optimizer, steps)
    together, other = two_ranks.run(sharded, optimizer, steps)
    assert all(largest(expected, tensors(0))[name] > 5e-3 for name in SHAPES)
    assert max(largest(alone, expected).values()) < rounding(expected, steps)
    assert max(largest(together, alone).values()) < rounding(expected, steps)
    assert largest(together, other) == dict.fromkeys(SHAPES, 0.0)


@needs_bitsandbytes
def test_eight_bits_stay_near_adamw_and_are_not_it(two_ranks):
    exact, _ = two_ranks.run(sharded, "adamw", 4)
    rounded, _ = two_ranks.run(sharded, "adamw_8bit", 4)
    difference = largest(exact, rounded)
    assert all(difference[name] < rounding(exact, 4) for name in SHAPES if name != "wide")
    assert 1e-5 < difference["wide"] < 1e-2


def test_every_optimizer_of_the_config_is_there():
    assert list(get_args(TrainerConfig.model_fields["optimizer"].annotation)) == list(OPTIMIZERS)
