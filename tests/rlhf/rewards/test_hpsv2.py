"""HPSv2 against open_clip by hand, and the transform against the one the hpsv2 package ships.

The whole against the package's own code: test_hpsv2_package.py; what every reward keeps: test_rewards.py.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rlhf.errors import Refused
from rlhf.rewards import tiny
from rlhf.rewards.hpsv2 import FILES, find_checkpoint, load_model, transform
from tests.rlhf.rewards.asking import hps_reward, score

PROMPTS = ["a red apple", "一只猫", "a red apple"]
ROUNDING = 3 * 8 * 8 * torch.finfo(torch.float32).eps
"""Of a cosine, up to the order of sums: eps × the terms of the longest, which goes over a patch's pixels, × 1."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_hpsv2(tmp_path_factory.mktemp("hps") / "tiny.pt", seed=3)


@pytest.fixture(scope="module")
def reward(checkpoint):
    return hps_reward(checkpoint)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in ((96, 64, 3), (50, 120, 3), (64, 64, 3))]


def package_transform(size: int):
    """The evaluation transform of the `hpsv2` package, loaded without importing the package (it lacks a file)."""
    spec = importlib.util.find_spec("hpsv2")
    folder = Path(spec.submodule_search_locations[0]) / "src" / "open_clip"
    package = types.ModuleType("hps_package")
    package.__path__ = [str(folder)]
    sys.modules["hps_package"] = package
    module = importlib.import_module("hps_package.transform")
    return module.image_transform(size, is_train=False, resize_longest_max=True)


@pytest.mark.parametrize("shape", [(1312, 784), (784, 1312), (224, 224), (100, 37), (1, 300), (2000, 2000)])
def test_transform_equals_the_official_one(shape):
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    if min(shape) * 224 / max(shape) < 0.5:
        assert transform(picture, 224).shape == (3, 224, 224)  # the official one makes an empty picture of it
        return
    official = package_transform(224)(Image.fromarray(picture))
    torch.testing.assert_close(transform(picture, 224), official, rtol=0, atol=1e-6)


def test_transform_keeps_the_whole_picture_and_pads_with_black():
    picture = np.full((1312, 784, 3), 255, np.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = transform(picture, 224) * std + mean
    white = pixels[0].round().bool()
    assert white.sum() == 224 * 134  # 784·224/1312 = 133.9
    assert not white[:, :45].any() and white[:, 45:179].all() and not white[:, 179:].any()


def test_scores_are_the_cosine_by_hand(reward, checkpoint, pictures):
    model = open_clip.CLIP(**tiny.CLIP_CONFIG).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with torch.no_grad():
        pixels = torch.stack([package_transform(64)(Image.fromarray(picture)) for picture in pictures])
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.tokenize(PROMPTS), normalize=True)
    expected = (image * text).sum(-1).tolist()
    assert score(reward, pictures, PROMPTS) == pytest.approx(expected, abs=ROUNDING)
    assert np.diff(sorted(expected)).min() > 10 * ROUNDING, "a mixed-up answer would not show"


def test_bfloat16_is_close(checkpoint, reward, pictures):
    low = score(hps_reward(checkpoint, dtype="bfloat16"), pictures, PROMPTS)
    assert low == pytest.approx(score(reward, pictures, PROMPTS), abs=0.01)


def test_the_same_seed_writes_the_same_weights(tmp_path, checkpoint):
    again = torch.load(tiny.write_hpsv2(tmp_path / "a.pt", seed=3), weights_only=True)["state_dict"]
    other = torch.load(tiny.write_hpsv2(tmp_path / "b.pt", seed=4), weights_only=True)["state_dict"]
    reference = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], reference[name]) for name in reference)
    assert any(not torch.equal(other[name], reference[name]) for name in reference)


def test_safetensors_and_module_prefix_load(tmp_path, checkpoint, reward, pictures):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    save_file({f"module.{name}": tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps(tiny.CLIP_CONFIG))
    other = hps_reward(tmp_path / "w.safetensors")
    assert score(other, pictures, PROMPTS) == score(reward, pictures, PROMPTS)


def test_a_folder_is_searched_for_the_version(tmp_path, checkpoint):
    with pytest.raises(Refused, match=FILES["v2.0"]):
        find_checkpoint(tmp_path, "v2.0")
    (tmp_path / FILES["v2.0"]).write_bytes(b"")
    assert find_checkpoint(tmp_path, "v2.0").name == "HPS_v2_compressed.pt"
    assert find_checkpoint(checkpoint, "v2.1") == checkpoint


def test_wrong_checkpoints_are_refused(tmp_path, checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    cases = {
        "state_dict": {"weights": state},
        "logit_scale": {"state_dict": {name: tensor for name, tensor in state.items() if name != "logit_scale"}},
        "stranger": {"state_dict": state | {"stranger": torch.zeros(1)}},
    }
    for name, content in cases.items():
        file = tmp_path / f"{name}.pt"
        torch.save(content, file)
        file.with_suffix(".json").write_text(json.dumps(tiny.CLIP_CONFIG))
        with pytest.raises(Refused, match=name):
            load_model(file)


def test_pickled_code_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pt")
    (tmp_path / "evil.json").write_text(json.dumps(tiny.CLIP_CONFIG))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
