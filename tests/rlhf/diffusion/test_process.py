"""Rectified flow: the sigma table of the real model and exact identities between error parametrisations."""

import pytest
import torch

from rlhf.diffusion.ddpm import DDPM
from rlhf.diffusion.process import RectifiedFlow, with_times
from rlhf.errors import Refused

PROCESS = RectifiedFlow()
TABLE = [1, 0.9791, 0.9562, 0.9311, 0.9034, 0.8727, 0.8386, 0.8003, 0.7571, 0.7080]
TABLE += [0.6516, 0.5862, 0.5095, 0.4184, 0.3081, 0.1720, 0]


def test_the_sigma_table_of_kontext_at_1312_by_784():
    assert PROCESS.sigmas(16, 4018).tolist() == pytest.approx(TABLE, abs=5e-5)


def test_error_identities_hold_in_double_precision():
    g = torch.Generator().manual_seed(0)
    x0, noise, velocity = (torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.rand(5, generator=g, dtype=torch.float64)
    wide = t.view(-1, 1, 1, 1)
    x_t = PROCESS.noisy(x0, noise, t)
    v_error = (velocity - PROCESS.target(x0, noise, t)).square()
    epsilon_error = (x_t + (1 - wide) * velocity - noise).square()
    x0_error = (x_t - wide * velocity - x0).square()
    torch.testing.assert_close(epsilon_error, (1 - wide) ** 2 * v_error, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(x0_error, wide**2 * v_error, rtol=1e-12, atol=1e-14)


def test_the_ends_are_data_and_noise():
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(PROCESS.noisy(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(PROCESS.noisy(x0, noise, torch.ones(2)), noise)


def test_training_times_are_logit_normal_and_depend_on_the_seed_alone():
    times = torch.tensor([PROCESS.draw_t(seed, 256) for seed in range(4000)], dtype=torch.float64)
    logits = torch.logit(times)
    assert PROCESS.draw_t(7, 256) == PROCESS.draw_t(7, 9999)
    assert logits.mean().abs() < 0.05
    assert (logits.std() - 1).abs() < 0.05


def drawn(times, shift=1.0, tokens=256):
    process = with_times(PROCESS, times, shift)
    return torch.tensor([process.draw_t(seed, tokens) for seed in range(4000)], dtype=torch.float64)


def test_other_times_follow_their_formulas():
    """Each as a function of the same uniform numbers, whose quantiles are known: 4000 draws know them to 0.02."""
    uniform = drawn("uniform")
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(uniform.quantile(quantiles), quantiles, atol=0.025, rtol=0)
    u = uniform
    torch.testing.assert_close(drawn("mode"), 1 - u - 1.29 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u))
    assert drawn("mode").min() >= 0 and drawn("mode").max() <= 1
    for name in ("uniform", "logit_normal", "mode", None):
        t = drawn(name)
        torch.testing.assert_close(drawn(name, 3.0), 3 * t / (1 + 2 * t))
        assert drawn(name, 3.0).mean() > t.mean() > drawn(name, 0.5).mean()
    assert torch.equal(drawn(None), drawn("logit_normal"))


def test_a_shift_by_tokens_is_that_of_sampling():
    """At 4018 tokens the middle of the schedule is e^μ / (e^μ + 1), with Kontext's μ = 1.1368."""
    u, shifted = drawn("uniform"), drawn("uniform", "tokens", tokens=4018)
    shift = PROCESS.sigmas(2, 4018)[1].double() / (1 - PROCESS.sigmas(2, 4018)[1].double())
    torch.testing.assert_close(shifted, shift * u / (1 + (shift - 1) * u), rtol=1e-5, atol=1e-6)
    assert shift.item() == pytest.approx(3.117, abs=0.001)


def test_a_process_of_timesteps_takes_no_other_times(tmp_path):
    ddpm = DDPM(config={"_class_name": "DDIMScheduler", "prediction_type": "epsilon"})
    assert with_times(ddpm, None, 1.0) is ddpm and with_times(PROCESS, None, 1.0) is PROCESS
    for times, shift in (("uniform", 1.0), (None, 3.0), (None, "tokens")):
        with pytest.raises(Refused, match=r"trainer\.timesteps = .* are of flow matching; a DDPM is trained at each"):
            with_times(ddpm, times, shift)
