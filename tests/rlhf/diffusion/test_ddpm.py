"""DDPM against numbers worked out by hand, diffusers' own noising, and exact identities; its solvers row by row."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from rlhf.diffusion.ddpm import DDPM
from rlhf.errors import Refused
from rlhf.types import noise_from

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
STEPS = torch.arange(1000)


def ddpm(prediction_type: str = "epsilon", scheduler: str = "DDIMScheduler", **changes) -> DDPM:
    return DDPM(config={"_class_name": scheduler, "prediction_type": prediction_type, **BETAS, **changes})


def test_alphas_are_the_products_of_one_minus_beta():
    expected, product = [], 1.0
    for k in range(1000):
        product *= 1 - (math.sqrt(0.00085) + k / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        expected.append(product)
    assert ddpm().alphas_cumprod.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[-1] == pytest.approx(0.00466, abs=1e-5), "the signal that is left at the end of Stable Diffusion's"


def test_betas_may_be_a_table_and_zero_signal_is_kept():
    assert ddpm(trained_betas=[0.25, 0.5, 0.125]).alphas_cumprod.tolist() == [0.75, 0.375, 0.328125]
    assert ddpm(rescale_betas_zero_snr=True).alphas_cumprod[-1] == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target_are_diffusers(prediction_type):
    process, theirs = ddpm(prediction_type), DDPMScheduler(**BETAS)
    x0, noise = noise_from(0, (1000, 2, 2, 2)), noise_from(1, (1000, 2, 2, 2))
    t = (STEPS + 1) / 1000
    # Two scales, two products and a sum, each rounded by eps / 2 × size at most, on both sides.
    rounding = 5 * torch.finfo(torch.float32).eps * max(x0.abs().max(), noise.abs().max()).item()
    torch.testing.assert_close(process.noisy(x0, noise, t), theirs.add_noise(x0, noise, STEPS), rtol=0, atol=rounding)
    expected = noise if prediction_type == "epsilon" else theirs.get_velocity(x0, noise, STEPS)
    torch.testing.assert_close(process.target(x0, noise, t), expected, rtol=0, atol=rounding)


def test_velocity_and_x_t_give_back_data_and_noise_in_double_precision():
    process = ddpm("v_prediction")
    x0, noise = noise_from(0, (1000, 3)).double(), noise_from(1, (1000, 3)).double()
    t = (STEPS.double() + 1) / 1000
    x_t, v, alpha = process.noisy(x0, noise, t), process.target(x0, noise, t), process.alphas_cumprod[:, None]
    torch.testing.assert_close(alpha.sqrt() * x_t - (1 - alpha).sqrt() * v, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((1 - alpha).sqrt() * x_t + alpha.sqrt() * v, noise, rtol=1e-12, atol=1e-12)


def test_timesteps_are_whole_from_single_precision_and_exact_between():
    process = ddpm()
    assert torch.equal(process.timestep(((STEPS + 1) / 1000).float()), STEPS.float())
    between = torch.tensor([0.5, 332.3334, 799.2], dtype=torch.float64)
    assert torch.equal(process.timestep((between + 1) / 1000), between.float())


def test_no_noise_is_left_at_time_0():
    x0 = torch.randn(2, 3)
    assert torch.equal(ddpm().noisy(x0, torch.randn(2, 3), torch.zeros(2)), x0)


def test_training_times_are_uniform_over_the_timesteps_and_depend_on_the_seed_alone():
    process = ddpm(num_train_timesteps=10)
    times = [process.draw_t(seed, 1) for seed in range(5000)]
    assert times[7] == process.draw_t(7, 1)
    assert set(times) == {k / 10 for k in range(1, 11)}
    assert all(abs(times.count(t) / 5000 - 0.1) < 0.02 for t in set(times))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, r"scheduler_config.json: prediction_type = 'sample'.*epsilon and v_prediction"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, r"scheduler_config.json: _class_name = 'FlowMatch.*no DDPM"),
        ({"scheduler": "Eulr"}, r"_class_name = 'Eulr' is no DDPM scheduler"),
        ({"scheduler": "DPMSolverSDEScheduler"}, r"Brownian.*use e.g. DPMSolverMultistepScheduler"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_its_file_and_key(changes, message):
    with pytest.raises(Refused, match=message):
        ddpm(**changes)


def walk(process: DDPM, noise: torch.Tensor) -> torch.Tensor:
    """A sample with a stand-in for a network."""
    return process.sample(lambda x_t, t, i: torch.tanh(x_t + t.float()), noise, 5, 4)


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "SASolverScheduler"])
def test_a_stochastic_solver_repeats_itself_row_by_row(scheduler):
    process, noise = ddpm(scheduler=scheduler), noise_from(0, (3, 2, 4, 4))
    whole = walk(process, noise)
    assert torch.equal(walk(process, noise), whole)
    for row, order in enumerate(([0, 2, 1], [2, 1, 0], [1, 0, 2])):  # each keeps its place, so that no rounding changes
        assert torch.equal(walk(process, noise[order])[row], whole[row]), "a row depends on its neighbours"
    assert (walk(process, noise + 1e-4) - whole).abs().mean() > 0.1, "another start draws other noise"


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_deterministic_solver_draws_nothing(scheduler):
    process, noise = ddpm(scheduler=scheduler), noise_from(0, (3, 2, 4, 4))
    before = torch.random.get_rng_state()
    assert (walk(process, noise + 1e-4) - walk(process, noise)).abs().mean() < 0.1
    assert torch.equal(torch.random.get_rng_state(), before)
