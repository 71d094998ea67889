"""Model folders: the sizes that a network takes, and the names of families."""

from functools import partial

import pytest
import torch

from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.folder import latent_shape
from rlhf.models.tiny import write_stable_diffusion
from rlhf.tables import ModelTable
from rlhf.types import Geometry


@pytest.fixture(scope="module")
def folders(tmp_path_factory, kontext):
    diffusion = write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")
    return {"flux_kontext": kontext, "stable_diffusion": diffusion}


def test_sizes_that_the_network_cannot_take_name_their_keys():
    sized = partial(latent_shape, 4, 8)
    assert sized(Geometry(height=48, width=32), patch=2) == (4, 6, 4)
    for height, width in ((40, 32), (32, 40)):
        with pytest.raises(Refused, match=rf"{height}×{width} pixels \(model.height, model.width\).*multiples of 16"):
            sized(Geometry(height=height, width=width), patch=2)
        assert sized(Geometry(height=height, width=width)) == (4, height // 8, width // 8)
    with pytest.raises(Refused, match="3 frames: this model makes pictures"):
        sized(Geometry(height=48, width=32, frames=3))


def test_a_family_is_one_of_ours_or_importable(folders):
    path = str(folders["stable_diffusion"])
    ours = load_family(ModelTable(family="stable_diffusion", path=path, dtype="float16", guidance_scale=3.0))
    named = load_family(ModelTable(family="rlhf.models.stable_diffusion:StableDiffusion", path=path))
    assert type(named) is type(ours) and (ours.dtype, named.dtype) == (torch.float16, torch.bfloat16)
    assert ours.guidance_scale == 3.0
    ours = "flux_kontext, qwen_image_edit, stable_diffusion"
    for name in ("flux", "no.such.module:Family", "rlhf.models:Nothing"):
        with pytest.raises(Refused, match=rf"model.family = '{name}' is neither one of {ours}"):
            load_family(ModelTable(family=name, path=path))
