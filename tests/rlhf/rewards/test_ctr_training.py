"""Training learns what decides the clicks, says what it was scored on, and refuses what it cannot use."""

import math

import numpy as np
import pytest
import torch

from rlhf.rewards import ctr_training
from rlhf.rewards.ctr import CTRModel, describe, load, save
from rlhf.rewards.ctr_config import CTRModelSection, CTRTrainConfig
from rlhf.rewards.ctr_data import Click
from rlhf.rewards.ctr_small import small_config, small_tokenizer
from rlhf.rewards.images import encode_png
from rlhf.types import Item

FOODS = ["苹果", "banana"]


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Bright pictures and apples are clicked more."""
    folder, rng = tmp_path_factory.mktemp("clicks"), np.random.default_rng(0)
    rows = []
    for index in range(160):
        brightness, food = rng.random(), index % 2
        picture = np.clip(rng.normal(255 * brightness, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        (folder / f"{index}.png").write_bytes(encode_png(picture))
        rate = 1 / (1 + math.exp(-(3 * brightness - 2.5 - food)))
        item = Item(food_name=FOODS[food], food_type="水果", city_name="上海", shop_name="小铺")
        rows.append(Click(image=folder / f"{index}.png", item=item, rate=rate, impressions=500))
    return rows


SMALL = CTRModelSection(image_size=32, max_tokens=40)


def train(clicks, held_out, seed=0, **config):
    settings = CTRTrainConfig(**{"epochs": 20, "batch_size": 16, **config})
    return ctr_training.train(clicks, held_out, SMALL, settings, seed=seed, progress=lambda line: None)


@pytest.mark.parametrize("loss", ["binomial", "compound"])
def test_it_learns_picture_and_item_on_held_out_rows(clicks, loss):
    _, _, metrics = train(clicks[40:], clicks[:40], loss=loss)
    assert metrics["correlation"] > 0.9 and metrics["rows"] == 40 and metrics["train_rows"] == 120


def test_shuffled_rates_teach_nothing(clicks):
    rates = np.random.default_rng(1).permutation([click.rate for click in clicks[40:]])
    shuffled = [
        Click(image=click.image, item=click.item, rate=rate, impressions=500)
        for click, rate in zip(clicks[40:], rates, strict=True)
    ]
    _, _, metrics = train(shuffled, clicks[:40])
    assert not metrics["correlation"] > 0.6


def test_the_same_seed_gives_the_same_weights(clicks, tmp_path):
    model, tokenizer, _ = train(clicks[:32], [], epochs=1)
    again, _, _ = train(clicks[:32], [], epochs=1)
    other, _, _ = train(clicks[:32], [], epochs=1, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    loaded, _ = load(save(tmp_path / "ctr", model, tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_binomial_loss_needs_impressions(clicks):
    bare = [Click(image=click.image, item=click.item, rate=click.rate, impressions=None) for click in clicks[:32]]
    with pytest.raises(ValueError, match="impressions and clicks"):
        train(bare, [], loss="binomial")
    assert "binomial_loss" not in train(bare, bare, epochs=1)[2]


def test_a_non_finite_loss_stops(clicks):
    with pytest.raises(RuntimeError, match=r"learning_rate"):
        train(clicks[:64], [], learning_rate=1e30, max_grad_norm=1e30, epochs=4)


def test_the_first_prediction_is_the_mean_rate(clicks):
    model, _ = ctr_training.create(clicks, SMALL)
    mean = np.mean([click.rate for click in clicks])
    assert torch.sigmoid(model.head[-1].bias).item() == pytest.approx(mean, abs=1e-6)


def test_pretrained_backbones_are_loaded_and_learn_at_their_own_rates(clicks, tmp_path):
    tokenizer = small_tokenizer(describe(click.item) for click in clicks)
    source = CTRModel(small_config(tokenizer, image_size=32, max_tokens=40))
    source.text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    source.image.save_pretrained(tmp_path / "image")
    section = CTRModelSection(text=str(tmp_path / "text"), image=str(tmp_path / "image"), image_size=32, max_tokens=40)
    model, _ = ctr_training.create(clicks, section)
    for name in ("text", "image"):
        state = getattr(source, name).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(model, name).state_dict().items())
    rates = [group["lr"] for group in ctr_training.parameter_groups(model, section, CTRTrainConfig())]
    assert rates == [1e-3, 2e-5, 5e-6]
    scratch, _ = ctr_training.create(clicks, SMALL)
    groups = ctr_training.parameter_groups(scratch, SMALL, CTRTrainConfig())
    assert [group["lr"] for group in groups] == [1e-3] * 3
    assert sum(len(group["params"]) for group in groups) == len(list(scratch.parameters()))
