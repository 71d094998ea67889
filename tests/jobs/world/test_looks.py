"""Looks do what their numbers say, and edits move what they are asked for."""

import pytest
import torch

from jobs.world.looks import BLUR, KINDS, blurred, draw_source, edit, render
from jobs.world.measure import ASKED
from jobs.world.truth import attributes
from tests.jobs.world.shots import before_and_after, shots

NEUTRAL = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])


def test_a_neutral_look_is_the_photo_and_a_plain_one_the_other_canvas():
    photos = shots().photos[:3]
    for background, side in ((0.0, 0), (1.0, 1)):
        look = NEUTRAL.clone()
        look[:, 4] = background
        wanted = photos[:, side].permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(render(photos, look.expand(3, -1)), wanted, atol=1e-5, rtol=0)


def test_light_and_colour_are_the_factors_that_they_are_called():
    grey = torch.full((1, 2, 9, 9, 3), 100, dtype=torch.uint8)
    brighter = render(grey, torch.tensor([[0.5, 0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(brighter, torch.full((1, 3, 9, 9), 100 / 255 * 2.718281828**0.5))
    warm = render(grey, torch.tensor([[0.0, 1.0, 3.0, 0.0, 0.0]]))  # grey has no colour to make vivid
    torch.testing.assert_close(warm[0, :, 0, 0], 100 / 255 * torch.tensor([1.22, 1.04, 0.74]))


def test_blur_keeps_the_sum_and_has_its_deviation():
    dot = torch.zeros(1, 1, 21, 21)
    dot[0, 0, 10, 10] = 1
    spread = blurred(dot, torch.tensor([1.3]))[0, 0]
    places = torch.arange(21.0) - 10
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * places**2).sum().sqrt().item() == pytest.approx(
        1.3, abs=0.02
    )  # cut at 4 pixels: 3 deviations
    torch.testing.assert_close(blurred(dot, torch.zeros(1)), dot)


@pytest.mark.parametrize("kind", ASKED)
def test_an_edit_moves_what_it_is_asked_for(kind):
    name, sign = ASKED[kind]
    before, after = (getattr(attributes(pictures), name) for pictures in before_and_after(kind))
    assert (sign * (after - before) > 0).float().mean() >= 0.9


def test_sharper_is_less_blur_and_no_edit_blurs():
    random = torch.Generator().manual_seed(0)
    look = draw_source(200, random)
    for index, kind in enumerate(KINDS):
        after = edit(look, torch.full((200,), index), random)
        assert (after[:, BLUR] <= look[:, BLUR]).all()
        assert (after[:, BLUR] < look[:, BLUR]).all() == (kind in ("sharper", "improve"))
