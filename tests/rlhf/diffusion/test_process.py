"""Rectified flow: the sigma table of the real model and exact identities between error parametrisations."""

import pytest
import torch

from rlhf.diffusion.process import RectifiedFlow

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
    times = torch.tensor([PROCESS.draw_t(seed) for seed in range(4000)], dtype=torch.float64)
    logits = torch.logit(times)
    assert PROCESS.draw_t(7) == PROCESS.draw_t(7)
    assert logits.mean().abs() < 0.05
    assert (logits.std() - 1).abs() < 0.05
