"""The linear start is worth decibels before any training, and training is worth more."""

import pytest
import torch

from jobs.world import vae
from jobs.world.data import random_of
from tests.jobs.world.shots import shots


@pytest.fixture(scope="module")
def given():
    return vae.pictures(shots(), 48, random_of(7, "vae"))


def test_the_start_is_a_linear_autoencoder_and_far_better_than_random_weights(given):
    """18 dB is an error of an eighth of the range. A constant grey picture is at about 14."""
    shown = given / 2 + 0.5
    torch.manual_seed(0)
    model = vae.untrained().eval()
    random = vae.decibels(vae.reconstructed(model, shown), shown)
    vae.start_linear(model, given)
    drawn = vae.reconstructed(model, shown)
    assert vae.decibels(drawn, shown) > max(18.0, random + 5)
    dark, bright = shown.mean((1, 2, 3)).argsort()[[0, -1]]
    assert drawn[bright].mean() > drawn[dark].mean()  # the group norms do not hide brightness


def test_training_gains_and_latents_are_standard(given):
    shown = given / 2 + 0.5
    short, longer = (vae.train_vae(shots(), steps=steps, seed=0) for steps in (1, 60))
    assert (
        vae.decibels(vae.reconstructed(longer, shown), shown) > vae.decibels(vae.reconstructed(short, shown), shown) + 1
    )
    with torch.no_grad():
        mode = longer.encode(given).latent_dist.mode()
    latents = (mode - longer.config.shift_factor) * longer.config.scaling_factor
    assert abs(latents.mean().item()) < 0.2 and 0.8 < latents.std().item() < 1.2
