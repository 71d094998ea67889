"""DPO against closed forms and against the published formula written out again, in double precision."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from rlhf.diffusion.ddpm import DDPM
from rlhf.diffusion.objectives import DPO, SFT, WEIGHTINGS, preference_logit
from rlhf.diffusion.process import RectifiedFlow, per_sample
from rlhf.types import POLICY, REFERENCE, Batch
from tests.worlds import part

PROCESS = RectifiedFlow()
BETAS = [0.25, 0.5, 0.125, 0.25]
"""Four timesteps whose alphas are exact in single precision, in which diffusers multiplies them."""
PROCESSES = {
    "flow": PROCESS,
    "epsilon": DDPM(config={"_class_name": "DDIMScheduler", "trained_betas": BETAS}),
    "v_prediction": DDPM(
        config={"_class_name": "DDIMScheduler", "trained_betas": BETAS, "prediction_type": "v_prediction"}
    ),
}
EVERY_PROCESS = pytest.mark.parametrize("name", PROCESSES)


def batch(count: int = 3, frames: tuple[int, ...] = (), roles: tuple[str, ...] = ("winner", "loser")) -> Batch:
    g = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(count, 2, *frames, 4, 4, generator=g, dtype=torch.float64)

    times = torch.randint(1, len(BETAS) + 1, (count,), generator=g).double() / len(BETAS)
    x0 = {role: normal() for role in roles}
    weight = {role: torch.ones(count) for role in roles}
    return Batch(x0=x0, condition={"c": normal()}, t=times, noise=normal(), weight=weight)


def single(of: Batch) -> Batch:
    """The same in fp32."""
    return replace(
        of,
        x0={role: latents.float() for role, latents in of.x0.items()},
        condition={name: tensor.float() for name, tensor in of.condition.items()},
        t=of.t.float(),
        noise=of.noise.float(),
    )


def linear(weight: float):
    """A stand-in for a network that really depends on x_t, t and the condition."""
    return lambda x_t, t, condition: weight * x_t + per_sample(t, x_t) * condition["c"]


def sides(policy: float, reference: float) -> dict:
    return {POLICY: linear(policy), REFERENCE: linear(reference)}


@pytest.mark.parametrize(("bracket", "loss"), [(-4e-4, 0.313262), (4e-4, 1.313262), (0.0, math.log(2))])
def test_closed_forms_at_beta_5000(bracket, loss):
    zero = torch.zeros(1, dtype=torch.float64)
    z = preference_logit(zero + bracket, zero, zero, zero, 5000.0)
    assert -torch.nn.functional.logsigmoid(z).item() == pytest.approx(loss, abs=1e-6)


@EVERY_PROCESS
def test_policy_equal_to_reference(name):
    loss, scalars = DPO(beta=5000.0)(sides(0.3, 0.3), PROCESSES[name], batch())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert scalars["implicit_acc"] == 0


def test_the_gradient_on_the_winners_error_is_a_quarter_of_beta():
    winner = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    z = preference_logit(winner, torch.zeros(1), torch.zeros(1), torch.zeros(1), 8.0)
    (-torch.nn.functional.logsigmoid(z)).mean().backward()
    assert winner.grad.item() == pytest.approx(2.0)


def published(name: str, policy, reference, pairs: Batch, beta: float) -> tuple[float, float]:
    """Diffusion-DPO, arXiv 2311.12908, eq. 14 with mean reduction, in plain numbers: mean loss and mean logit.

    Forward processes: DDPM eq. 4 with the product of 1 − beta up to the timestep; flow matching's straight line.
    """
    losses, logits = [], []
    for i, t in enumerate(pairs.t.tolist()):
        noise = pairs.noise[i].flatten().tolist()
        alpha = math.prod(1 - beta_k for beta_k in BETAS[: round(t * len(BETAS))])
        errors = {}
        for side, x0 in (
            ("w", pairs.x0["winner"][i].flatten().tolist()),
            ("l", pairs.x0["loser"][i].flatten().tolist()),
        ):
            if name == "flow":
                x_t = [(1 - t) * x + t * n for x, n in zip(x0, noise, strict=True)]
                target = [n - x for x, n in zip(x0, noise, strict=True)]
            else:
                x_t = [math.sqrt(alpha) * x + math.sqrt(1 - alpha) * n for x, n in zip(x0, noise, strict=True)]
                target = noise
            if name == "v_prediction":
                target = [math.sqrt(alpha) * n - math.sqrt(1 - alpha) * x for x, n in zip(x0, noise, strict=True)]
            seen = torch.tensor(x_t, dtype=torch.float64).view(1, *pairs.noise.shape[1:])
            for model, predict in (("p", policy), ("r", reference)):
                prediction = (
                    predict(seen, pairs.t[i : i + 1], {"c": pairs.condition["c"][i : i + 1]}).flatten().tolist()
                )
                squares = [(p - v) ** 2 for p, v in zip(prediction, target, strict=True)]
                errors[model + side] = math.fsum(squares) / len(squares)
        inside = (errors["pw"] - errors["rw"]) - (errors["pl"] - errors["rl"])
        losses.append(math.log1p(math.exp(beta / 2 * inside)))
        logits.append(-beta / 2 * inside)
    return math.fsum(losses) / len(losses), math.fsum(logits) / len(logits)


@EVERY_PROCESS
def test_the_loss_is_the_published_formula(name):
    pairs = batch(5)
    loss, scalars = DPO(beta=3.0)(sides(0.3, -0.2), PROCESSES[name], pairs)
    expected_loss, expected_logit = published(name, linear(0.3), linear(-0.2), pairs, 3.0)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-12)
    assert scalars["logit"].item() == pytest.approx(expected_logit, abs=1e-12)


def test_the_processes_have_losses_of_their_own():
    pairs = batch(5)
    losses = [DPO(beta=3.0)(sides(0.3, -0.2), process, pairs)[0].item() for process in PROCESSES.values()]
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 1e-3


@EVERY_PROCESS
def test_swapping_winner_and_loser_negates_z(name):
    pairs = batch()
    swapped = replace(pairs, x0={"winner": pairs.x0["loser"], "loser": pairs.x0["winner"]})
    _, one = DPO(beta=3.0)(sides(0.3, -0.2), PROCESSES[name], pairs)
    _, other = DPO(beta=3.0)(sides(0.3, -0.2), PROCESSES[name], swapped)
    assert one["logit"].item() == pytest.approx(-other["logit"].item(), abs=1e-12)
    assert abs(one["logit"]) > 1e-3


def test_sft_is_the_targets_error_alone():
    examples = batch(roles=("target",))
    loss, scalars = SFT()({POLICY: linear(0.3)}, PROCESS, examples)
    x0 = examples.x0["target"]
    x_t = PROCESS.noisy(x0, examples.noise, examples.t)
    expected = (linear(0.3)(x_t, examples.t, examples.condition) - (examples.noise - x0)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert scalars == {"target_error": loss}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_errors_are_weighted_over_t_as_in_diffusers_trainers(weighting):
    examples = batch(roles=("target",))
    x0, t = examples.x0["target"], examples.t
    loss, scalars = SFT(weighting=weighting)({POLICY: linear(0.3)}, PROCESS, examples)
    prediction = linear(0.3)(PROCESS.noisy(x0, examples.noise, t), t, examples.condition)
    error = (prediction - (examples.noise - x0)).square().flatten(1).mean(1)
    theirs = compute_loss_weighting_for_sd3(weighting, t)
    assert loss.item() == pytest.approx((error * theirs).mean().item(), rel=1e-6)
    assert scalars["target_error"].item() == pytest.approx(error.mean().item(), abs=1e-12)


EVERY_OBJECTIVE = pytest.mark.parametrize("objective", [DPO(beta=3.0), SFT()], ids=["dpo", "sft"])


@EVERY_OBJECTIVE
def test_weight_one_is_the_plain_mean_to_the_bit(objective):
    """In single precision, over a count whose mean rounds."""
    examples = single(batch(7, roles=objective.roles))
    loss, _ = objective(sides(0.3, -0.2), PROCESS, examples)
    rows = [objective(sides(0.3, -0.2), PROCESS, part(examples, i, i + 1))[0] for i in range(7)]
    assert loss == torch.stack(rows).mean()


@EVERY_OBJECTIVE
def test_a_row_of_weight_zero_changes_nothing_and_the_others_count_as_they_are_weighted(objective):
    examples = batch(3, roles=objective.roles)
    weighted = {role: torch.tensor([0.5, 2.5, 0.0], dtype=torch.float64) for role in objective.roles}
    loss, scalars = objective(sides(0.3, -0.2), PROCESS, replace(examples, weight=weighted))
    rows = [objective(sides(0.3, -0.2), PROCESS, part(examples, i, i + 1)) for i in range(2)]
    assert loss.item() == pytest.approx((0.5 * rows[0][0] + 2.5 * rows[1][0]).item() / 3, rel=1e-12)
    for name, value in scalars.items():
        assert value.item() == pytest.approx((0.5 * rows[0][1][name] + 2.5 * rows[1][1][name]).item() / 3, rel=1e-6)


@EVERY_OBJECTIVE
def test_frames_and_masks(objective):
    """Five dimensions, and a mask that keeps the first frame: as if the others were not there, at half the mean."""
    examples = batch(3, frames=(2,), roles=objective.roles)
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    masked = replace(examples, loss_mask={role: mask for role in objective.roles})
    first = replace(
        examples,
        x0={role: latents[:, :, 0] for role, latents in examples.x0.items()},
        condition={"c": examples.condition["c"][:, :, 0]},
        noise=examples.noise[:, :, 0],
    )
    _, whole = objective(sides(0.3, -0.2), PROCESS, masked)
    _, alone = objective(sides(0.3, -0.2), PROCESS, first)
    errors = [name for name in whole if name.endswith("_error")]
    assert errors
    for name in errors:
        assert whole[name].item() == pytest.approx(alone[name].item() / 2, rel=1e-12)


def test_a_pair_counts_for_the_smaller_of_its_weights():
    pairs = batch(2)
    apart = {"winner": torch.tensor([1.0, 2.0]), "loser": torch.tensor([2.0, 1.0])}
    one, _ = DPO(beta=3.0)(sides(0.3, -0.2), PROCESS, replace(pairs, weight=apart))
    other, _ = DPO(beta=3.0)(sides(0.3, -0.2), PROCESS, pairs)
    assert one == other
