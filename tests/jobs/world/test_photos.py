"""A photo and the same product on plain ground; equal generators draw equal pictures."""

import numpy as np
import pytest

from jobs.world.photos import SCENES, photo


@pytest.mark.parametrize("scene", SCENES)
def test_both_pictures_show_the_product_and_only_one_the_wall(scene):
    colour = (0.8, 0.2, 0.6)
    photographed, plain = photo(scene, colour, 48, 64, np.random.default_rng(3)).astype(float)
    assert photographed.shape == (48, 64, 3)
    assert photographed[:8].std((0, 1)).mean() > 2 * plain[:8].std((0, 1)).mean()
    pink = [
        ((side[..., 0] > 1.25 * side[..., 1]) & (side[..., 2] > side[..., 1])).sum() for side in (photographed, plain)
    ]
    assert min(pink) > 40
    same = np.abs(photographed - plain).max(-1) < 2  # the product covers the ground on both
    assert same.sum() > 100 and not same[:8].any()


def test_equal_generators_draw_equal_pictures():
    one, same, other = (photo("cake", (0.5, 0.4, 0.3), 32, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
