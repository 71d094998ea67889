"""Photos of every product, drawn once for these tests."""

from functools import cache

import torch
from torch import Tensor

from jobs.world.data import Shots, random_of, shoot
from jobs.world.looks import KINDS, Kind, draw_source, edit, render, to_uint8
from jobs.world.truth import PRODUCTS


@cache
def shots() -> Shots:
    return shoot(2 * len(PRODUCTS), 7, "tests")


def before_and_after(kind: Kind) -> tuple[Tensor, Tensor]:
    """uint8 (B, H, W, 3) each."""
    random = random_of(7, kind)
    look = draw_source(len(shots()), random)
    after = edit(look, torch.full((len(look),), KINDS.index(kind)), random)
    return to_uint8(render(shots().photos, look)), to_uint8(render(shots().photos, after))
