"""The linear start is worth decibels before any training, and training is worth more: of every family's VAE."""

import pytest
import torch

from jobs.world import edits, vae
from jobs.world.data import random_of
from jobs.world.edits import EDIT_MODELS
from jobs.world.looks import to_uint8
from rlhf.models import load_family
from rlhf.types import Source
from tests.jobs.world.shots import shots

FAMILIES = pytest.mark.parametrize("family", EDIT_MODELS)


@pytest.fixture(scope="module")
def given():
    return vae.pictures(shots(), 48, random_of(7, "vae"))


@FAMILIES
def test_the_start_is_a_linear_autoencoder_and_far_better_than_random_weights(given, family):
    """18 dB is an error of an eighth of the range. A constant grey picture is at about 14."""
    shown = given / 2 + 0.5
    torch.manual_seed(0)
    untrained = EDIT_MODELS[family].vae()
    untrained.model.eval()
    random = vae.decibels(vae.reconstructed(untrained, shown), shown)
    vae.start_linear(untrained, given)
    drawn = vae.reconstructed(untrained, shown)
    assert vae.decibels(drawn, shown) > max(18.0, random + 5)
    dark, bright = shown.mean((1, 2, 3)).argsort()[[0, -1]]
    assert drawn[bright].mean() > drawn[dark].mean()  # the norms do not hide brightness


@FAMILIES
def test_training_gains_and_latents_are_standard(given, family, tmp_path):
    shown = given / 2 + 0.5
    kind = EDIT_MODELS[family]
    short, longer = (vae.train_vae(kind.vae, shots(), steps=steps, seed=0) for steps in (1, 60))
    gained = vae.decibels(vae.reconstructed(longer, shown), shown) - vae.decibels(
        vae.reconstructed(short, shown), shown
    )
    assert gained > 1
    model = edits.model_of(tmp_path / "model", family)
    edits.write_untrained(model, longer)
    loaded = load_family(model)
    picture = loaded.target(Source(path="", content="", height=edits.SIZE, width=edits.SIZE), edits.GEOMETRY)
    rows = loaded.load_codec("cpu").encode([picture] * len(given), [[one[None]] for one in to_uint8(shown)])
    latents = torch.stack([row.tensors["latents"] for row in rows]).float()
    assert abs(latents.mean().item()) < 0.2 and 0.8 < latents.std().item() < 1.2
