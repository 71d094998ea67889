"""The resource table: the real 12B model's numbers without loading it, and refusals."""

import json
import shutil

import pytest

from actors import placement
from rlhf.diffusion.objectives import DPO
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.trainable import load_trainable
from rlhf.tables import EditModelTable, SamplersConfig
from rlhf.training_tables import TrainableTable, TrainerConfig

FULL_12B = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}


@pytest.fixture
def model(kontext, tmp_path):
    """The real transformer's config in a folder whose other parts are tiny."""
    shutil.copytree(kontext, tmp_path / "kontext")
    (tmp_path / "kontext" / "transformer" / "config.json").write_text(json.dumps(FULL_12B))
    return tmp_path / "kontext"


class World:
    """Four ranks and three samplers of the real model."""

    def __init__(self, model, trainable=None, **trainer):
        family = load_family(EditModelTable(path=str(model)))
        self.trainer = TrainerConfig(**{"ranks": 4, "num_cpus": 1.0, **trainer})
        self.counts = load_trainable(TrainableTable(**(trainable or {})), family).counts(family, DPO.sides)
        sizes = placement.ModelSizes(family)
        self.rank = placement.trainer_role(sizes, self.trainer, self.counts)
        self.sampler = placement.sampler_role(sizes, SamplersConfig(count=3, num_cpus=1.0), encodes=False)
        self.roles = [self.rank, self.sampler, placement.judging_role()]

    @property
    def checkpoint(self):
        return placement.checkpoint_bytes(self.trainer, self.counts)

    def export(self, dtype="float32"):
        return placement.export_bytes(self.trainer, self.counts, dtype)


def test_the_real_model_in_numbers(model):
    parameters = 11.9e9
    full = World(model, ema_decay=0.99)
    block = 340e6  # a double block, gathered in bf16, one in use and one on its way
    shard = (4 + 8 + 4 + 2 + 4) * parameters / 4
    assert full.rank.nbytes == pytest.approx(shard + 2 * 2 * block, rel=0.005)
    assert full.sampler.nbytes == pytest.approx(2 * parameters, rel=0.01)
    assert full.checkpoint == pytest.approx(18 * parameters, rel=0.02)
    assert full.export() == pytest.approx(8 * parameters, rel=0.02) == 2 * full.export("bfloat16")
    lora = World(model, {"kind": "lora", "rank": 16})
    assert 2 * parameters / 4 < lora.rank.nbytes < 2.6 * parameters / 4
    both = World(model, {"kind": "lora", "rank": 16, "patterns": ["transformer_blocks.18", "norm_out"]})
    more = 340e6 + 2 * 3072 * 3072  # a double block and the last norm: master, moments, gradient, reference
    assert both.rank.nbytes - lora.rank.nbytes == pytest.approx((4 + 8 + 4 + 4 - 2) * more / 4, rel=0.05)
    assert both.export() - lora.export() == pytest.approx(4 * more, rel=0.05)


def test_a_pattern_that_the_model_has_not_is_refused_before_anything_starts(model):
    with pytest.raises(Refused, match=r"trainable.patterns: 'transformer_block.0' matches no module"):
        World(model, {"kind": "modules", "patterns": ["transformer_block.0"]})


def test_a_cluster_that_is_too_small_is_refused_with_the_table(model):
    needed = World(model).roles
    with pytest.raises(placement.NotEnoughResources) as refusal:
        placement.check(needed, {"CPU": 2.0, "GPU": 1.0, "memory": 1e12})
    message = str(refusal.value)
    assert "7.05 CPU needed, 2 free" in message
    assert "7 GPU needed, 1 free" in message
    assert "trainer rank" in message and "sampler" in message
    placement.check(needed, {"CPU": 8.0, "GPU": 7.0, "memory": 1e12})


def test_memory_counts_where_there_is_no_gpu(model):
    needed = World(model, num_gpus=0.0).roles
    with pytest.raises(placement.NotEnoughResources, match="GiB of memory needed"):
        placement.check(needed, {"CPU": 8.0, "GPU": 7.0, "memory": 1e11})


def test_roles_that_run_before_the_rest_need_nothing_at_once():
    encoder = placement.Role(kind="encoder", name="encoder", count=2, num_cpus=1, num_gpus=0, nbytes=0, before=True)
    trainer = placement.Role(kind="trainer", name="trainer rank", count=1, num_cpus=1, num_gpus=0, nbytes=0)
    assert "needed at once" not in placement.table([encoder], {"CPU": 2})
    (line,) = [line for line in placement.table([encoder, trainer], None).splitlines() if "needed at once" in line]
    assert line.split()[3] == "1.00"
