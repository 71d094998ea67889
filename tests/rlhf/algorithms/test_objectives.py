"""DPO against closed forms and against the published formula written out again, in double precision."""

import math

import pytest
import torch

from rlhf.algorithms.objectives import DPO, SFT, preference_logit
from rlhf.algorithms.process import RectifiedFlow
from rlhf.types import PairBatch

PROCESS = RectifiedFlow()


def batch(count: int = 3) -> PairBatch:
    g = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(count, 2, 4, 4, generator=g, dtype=torch.float64)

    times = torch.rand(count, generator=g, dtype=torch.float64)
    return PairBatch(winner=normal(), loser=normal(), condition={"c": normal()}, t=times, noise=normal())


def linear(weight: float):
    """A stand-in for a network that really depends on x_t, t and the condition."""
    return lambda x_t, t, condition: weight * x_t + t.view(-1, 1, 1, 1) * condition["c"]


@pytest.mark.parametrize(("bracket", "loss"), [(-4e-4, 0.313262), (4e-4, 1.313262), (0.0, math.log(2))])
def test_closed_forms_at_beta_5000(bracket, loss):
    zero = torch.zeros(1, dtype=torch.float64)
    z = preference_logit(zero + bracket, zero, zero, zero, 5000.0)
    assert -torch.nn.functional.logsigmoid(z).item() == pytest.approx(loss, abs=1e-6)


def test_policy_equal_to_reference():
    loss, scalars = DPO(beta=5000.0)(linear(0.3), linear(0.3), PROCESS, batch())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert scalars["implicit_acc"] == 0


def test_the_gradient_on_the_winners_error_is_a_quarter_of_beta():
    winner = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    z = preference_logit(winner, torch.zeros(1), torch.zeros(1), torch.zeros(1), 8.0)
    (-torch.nn.functional.logsigmoid(z)).mean().backward()
    assert winner.grad.item() == pytest.approx(2.0)


def published(policy, reference, pairs: PairBatch, beta: float) -> torch.Tensor:
    """Diffusion-DPO, arXiv 2311.12908, eq. 14 with mean reduction, one pair and one element at a time."""
    losses = []
    for i in range(len(pairs.t)):
        errors = {}
        for name, x0 in (("w", pairs.winner[i]), ("l", pairs.loser[i])):
            t, noise = pairs.t[i], pairs.noise[i]
            x_t = (1 - t) * x0 + t * noise
            for model, predict in (("p", policy), ("r", reference)):
                prediction = predict(x_t[None], t[None], {"c": pairs.condition["c"][i : i + 1]})[0]
                errors[model + name] = ((prediction - (noise - x0)) ** 2).mean()
        inside = (errors["pw"] - errors["rw"]) - (errors["pl"] - errors["rl"])
        losses.append(torch.log1p(torch.exp(beta / 2 * inside)))
    return torch.stack(losses).mean()


def test_the_loss_is_the_published_formula():
    pairs = batch()
    loss, _ = DPO(beta=3.0)(linear(0.3), linear(-0.2), PROCESS, pairs)
    assert loss.item() == pytest.approx(published(linear(0.3), linear(-0.2), pairs, 3.0).item(), abs=1e-10)


def test_swapping_winner_and_loser_negates_z():
    pairs = batch()
    swapped = PairBatch(winner=pairs.loser, loser=pairs.winner, condition=pairs.condition, t=pairs.t, noise=pairs.noise)
    _, one = DPO(beta=3.0)(linear(0.3), linear(-0.2), PROCESS, pairs)
    _, other = DPO(beta=3.0)(linear(0.3), linear(-0.2), PROCESS, swapped)
    assert one["logit"].item() == pytest.approx(-other["logit"].item(), abs=1e-12)
    assert abs(one["logit"]) > 1e-3


def test_sft_is_the_winners_error_alone():
    pairs = batch()
    loss, _ = SFT()(linear(0.3), linear(9.0), PROCESS, pairs)
    x_t = PROCESS.noisy(pairs.winner, pairs.noise, pairs.t)
    expected = (linear(0.3)(x_t, pairs.t, pairs.condition) - (pairs.noise - pairs.winner)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
