"""Sizes that pictures are brought to: one for all, or buckets of one area in several aspects, as NovelAI's and kohya's trainers.

A bucket's sides are multiples of a step between two bounds; its area is the largest such that is not above the area asked for.
"""

import math
from dataclasses import dataclass

from rlhf.tables import BucketsTable, SizedModelTable
from rlhf.types import Geometry


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`sizes(height, width)`: what a picture of that many pixels is brought to, the nearest in aspect."""

    sizes: tuple[Geometry, ...]

    def __call__(self, height: int, width: int) -> Geometry:
        aspect = math.log(height / width)
        return min(self.sizes, key=lambda size: abs(math.log(size.height / size.width) - aspect))


def sizes_of(model: SizedModelTable, buckets: BucketsTable | None) -> tuple[Sizes, ...]:
    """Of every area that examples are trained at."""
    whole = Geometry(height=model.height, width=model.width, frames=model.frames)
    if buckets is None:
        return (Sizes(sizes=(whole,)),)
    areas = buckets.areas or (model.height * model.width,)
    return tuple(
        Sizes(sizes=tuple(Geometry(height=h, width=w, frames=model.frames) for h, w in sides(area, buckets)))
        for area in areas
    )


def sides(area: int, buckets: BucketsTable) -> list[tuple[int, int]]:
    """(height, width) of every bucket of an area, from the widest to the tallest."""
    step, least, most = buckets.step, buckets.min_side, buckets.max_side
    square = math.isqrt(area) // step * step
    found = {(square, square)}
    for side in range(-(-least // step) * step, most + 1, step):
        other = min(area // side, most) // step * step
        if other >= least:
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: size[0] / size[1])
