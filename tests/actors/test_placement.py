"""The resource table: the real 12B model's numbers without loading it, and refusals."""

import json
import shutil

import pytest

from actors import placement
from rlhf.tables import OnlineDPOConfig

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


def config(model, **trainer) -> OnlineDPOConfig:
    return OnlineDPOConfig(
        model={"path": str(model)},
        data={"path": "unused"},
        reward={"type": "hps"},
        judges={"hps": {"url": "http://127.0.0.1:9"}, "filter": {"enabled": False}},
        trainer={"ranks": 4, "num_cpus": 1.0, **trainer},
        samplers={"count": 3, "num_cpus": 1.0},
    )


def by_name(roles):
    return {role.name: role for role in roles}


def test_the_real_model_in_numbers(model):
    parameters = 11.9e9
    roles = by_name(placement.roles(config(model, ema_decay=0.99)))
    block = 340e6  # a double block, gathered in bf16, one in use and one on its way
    shard = (4 + 8 + 4 + 2 + 4) * parameters / 4
    assert roles["trainer rank"].nbytes == pytest.approx(shard + 2 * 2 * block, rel=0.005)
    assert roles["sampler"].nbytes == pytest.approx(2 * parameters, rel=0.01)
    assert placement.checkpoint_bytes(config(model, ema_decay=0.99)) == pytest.approx(18 * parameters, rel=0.02)
    assert placement.export_bytes(config(model, ema_decay=0.99)) == pytest.approx(8 * parameters, rel=0.02)
    lora = by_name(placement.roles(config(model, lora={"rank": 16})))["trainer rank"]
    assert 2 * parameters / 4 < lora.nbytes < 2.6 * parameters / 4


def test_a_cluster_that_is_too_small_is_refused_with_the_table(model):
    needed = placement.roles(config(model))
    with pytest.raises(placement.NotEnoughResources) as refusal:
        placement.check(needed, {"CPU": 2.0, "GPU": 1.0, "memory": 1e12})
    message = str(refusal.value)
    assert "7.05 CPU needed, 2 free" in message
    assert "7 GPU needed, 1 free" in message
    assert "trainer rank" in message and "sampler" in message
    placement.check(needed, {"CPU": 8.0, "GPU": 7.0, "memory": 1e12})


def test_memory_counts_where_there_is_no_gpu(model):
    needed = placement.roles(config(model, num_gpus=0.0))
    with pytest.raises(placement.NotEnoughResources, match="GiB of memory needed"):
        placement.check(needed, {"CPU": 8.0, "GPU": 7.0, "memory": 1e11})
