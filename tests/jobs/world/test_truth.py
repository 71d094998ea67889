"""The true click rate and what was kept of the subject, by pictures whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.world.looks import blurred, render, to_uint8
from jobs.world.truth import PRODUCTS, as_pixels, attributes, kept, product_of, true_rate, true_rate_judge
from tests.jobs.world.shots import before_and_after, shots


def plain(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue]).mul(255).round().to(torch.uint8).expand(1, 16, 16, 3)


def test_attributes_of_plain_pictures():
    shown = attributes(plain(0.6, 0.4, 0.2))
    assert shown.brightness.item() == pytest.approx(0.4, abs=0.002)
    assert shown.warmth.item() == pytest.approx(1.0, abs=0.01)
    assert shown.vividness.item() == pytest.approx(2 / 3, abs=0.005)
    assert shown.clutter.item() == 0


def test_sharpness_falls_with_blur():
    sharp = shots().photos[:8, 0]
    soft = to_uint8(blurred(as_pixels(sharp), torch.full((8,), 1.5)))
    assert (attributes(soft).sharpness < attributes(sharp).sharpness).all()


def test_the_rate_has_an_optimum_of_brightness_and_a_price_for_another_colour():
    lemons = product_of({"food_name": "Lemons"})
    dark, best, burnt = (
        true_rate(plain(*(level * x for x in (1.15, 1.0, 0.85))), [lemons]).item() for level in (0.2, 0.56, 0.86)
    )
    assert dark < best > burnt
    yellow, blue_lemons = plain(0.8, 0.7, 0.3), replace(lemons, colour=(0.3, 0.2, 0.8))
    assert true_rate(yellow, [lemons]) > true_rate(yellow, [blue_lemons])


def test_the_taste_of_a_product_is_added_to_the_log_odds():
    one, other = PRODUCTS[0], PRODUCTS[1]
    same_colour = replace(other, colour=one.colour)
    picture = shots().photos[:1, 0]
    apart = true_rate(picture, [same_colour]).logit() - true_rate(picture, [one]).logit()
    assert apart.item() == pytest.approx(other.taste - one.taste, abs=1e-5)


def test_the_judge_is_the_rate():
    pictures = shots().photos[:3, 0].numpy()
    items = [{"food_name": product.name} for product in shots().products[:3]]
    assert true_rate_judge(list(pictures), ["", "", ""], items) == true_rate(pictures, shots().products[:3]).tolist()


def test_light_and_colour_keep_the_subject_and_another_photo_does_not():
    photos, count = shots().photos, len(shots())
    dull, bright = (
        to_uint8(render(photos, torch.tensor([look]).expand(count, -1)))
        for look in ([-0.4, -0.5, 0.6, 0.0, 0.0], [0.0, 0.5, 1.0, 0.0, 0.0])
    )
    assert kept(dull, dull).min() > 0.999
    assert kept(dull, bright).mean() > 0.9
    assert kept(dull, bright.roll(1, 0)).mean() < 0.3
    noise = np.random.default_rng(0).integers(0, 255, dull.shape, np.uint8)
    assert kept(dull, noise).abs().mean() < 0.1
    source, cleaned = before_and_after("background")
    assert kept(source, cleaned).mean() > 0.6
