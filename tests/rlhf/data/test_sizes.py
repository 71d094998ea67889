"""Buckets: their sides, their areas, and which one a picture goes to."""

import math

import pytest

from rlhf.data.sizes import sides, sizes_of
from rlhf.tables import BucketsTable, SizedModelTable
from rlhf.types import Geometry

MODEL = SizedModelTable(path="x", height=1024, width=1024)


def test_the_buckets_of_512_squared_by_64():
    """Those that kohya's sd-scripts log with their defaults, 256 to 1024."""
    wide = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576)]
    found = sides(512**2, BucketsTable(step=64, min_side=256, max_side=1024))
    assert found == [*wide, (512, 512), *((w, h) for h, w in reversed(wide))]


@pytest.mark.parametrize("step", [16, 32, 64])
@pytest.mark.parametrize("area", [1024**2, 700_000, 512**2])
def test_sides_are_whole_steps_within_their_bounds_and_areas_nearly_what_is_asked_for(area, step):
    table = BucketsTable(step=step, min_side=256, max_side=2048)
    found = sides(area, table)
    assert len(found) == len(set(found)) and {(w, h) for h, w in found} == set(found)
    for height, width in found:
        assert height % step == width % step == 0
        assert min(height, width) >= 256 and max(height, width) <= 2048
        full = min(area, min(height, width) * 2048)  # where the longer side is bounded
        assert full * (1 - 2 * step / 256) < height * width <= area
    aspects = [height / width for height, width in found]
    assert aspects == sorted(aspects) and aspects[0] < 0.3 and aspects[-1] > 3


def test_a_picture_goes_to_the_nearest_aspect_and_one_size_takes_all():
    (sizes,) = sizes_of(MODEL, BucketsTable(step=64))
    assert sizes(4000, 3000) == Geometry(height=1152, width=896)
    assert sizes(3000, 4000) == Geometry(height=896, width=1152)
    assert sizes(7, 7) == Geometry(height=1024, width=1024)
    for height, width in ((1000, 10), (10, 1000)):
        far = sizes(height, width)
        assert math.log(far.height / far.width) * math.log(height / width) > 0 and max(far.height, far.width) == 2048
    (one,) = sizes_of(MODEL, None)
    assert one(1000, 10) == Geometry(height=1024, width=1024)


def test_several_areas_are_several_sets():
    small, large = sizes_of(MODEL, BucketsTable(areas=(512**2, 1024**2)))
    assert small(1, 1) == Geometry(height=512, width=512) and large(1, 1) == Geometry(height=1024, width=1024)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_side": 512, "max_side": 256}, "min_side = 512 is above max_side = 256"),
        ({"areas": (1000,)}, "areas holds 1000, whose square is below min_side = 256: give 65536 or more"),
    ],
)
def test_bounds_that_allow_nothing_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        BucketsTable(**changes)
