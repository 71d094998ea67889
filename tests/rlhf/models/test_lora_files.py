"""Which families other programs have layouts for; what is written is tested in tests/jobs/test_export.py."""

import pytest
import torch

from rlhf.errors import Refused
from rlhf.models.lora_files import check_layout
from rlhf.models.tiny import write_stable_diffusion
from tests import worlds


def test_layouts_are_refused_where_no_program_names_the_layers(kontext, tmp_path):
    flux = worlds.family(kontext, torch.float32)
    unet = worlds.family(write_stable_diffusion(tmp_path / "unet"), torch.float32, kind="stable_diffusion")
    for layout in ("diffusers", "comfyui", "kohya"):
        check_layout(flux, layout, "run.lora_layouts")
    check_layout(unet, "diffusers", "--layout")
    with pytest.raises(
        Refused, match=r"run\.lora_layouts: kohya is known of FLUX and Qwen-Image, not of a UNet2DCondition"
    ):
        check_layout(unet, "kohya", "run.lora_layouts")
