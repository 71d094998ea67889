"""The LAION aesthetic predictor against the published network written out, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from rlhf.errors import Refused
from rlhf.rewards import load_reward
from rlhf.rewards.clip import load_head
from rlhf.rewards.config import AestheticJudgeConfig
from tests.rlhf.rewards import asking, tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.write_clip(tmp_path_factory.mktemp("models") / "clip", seed=3)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return tiny_clip.write_aesthetic_head(tmp_path_factory.mktemp("models") / "head.pth", seed=3)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((130, 78, 3), (50, 120, 3), (64, 64, 3))]


def score(clip, head, pictures, **keys):
    reward = load_reward("aesthetic", AestheticJudgeConfig(path=str(clip), head=str(head), **keys), "cpu")
    return asking.score(reward, pictures, [""] * len(pictures))


def test_the_rating_by_hand(clip, head, pictures):
    network = nn.Sequential(
        nn.Linear(32, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()
    state = torch.load(head, weights_only=True)
    names = [f"layers.{index}.{kind}" for index in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    assert list(state) == names
    network.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        features = model.get_image_features(**inputs).pooler_output
        expected = network(features / features.norm(dim=-1, keepdim=True))[:, 0].tolist()
    scores = score(clip, head, pictures)
    # Up to the order of sums: eps × the terms of the longest, over the head's first layer, × the size of a rating.
    assert scores == pytest.approx(expected, abs=torch.finfo(torch.float32).eps * 1024 * max(map(abs, expected)))
    assert len({round(value, 2) for value in scores}) == 3


def test_safetensors_give_the_same_bits(clip, head, pictures, tmp_path):
    save_file(torch.load(head, weights_only=True), tmp_path / "head.safetensors")
    assert score(clip, tmp_path / "head.safetensors", pictures) == score(clip, head, pictures)


def test_bfloat16_is_of_the_clip_alone(clip, head, pictures):
    low = score(clip, head, pictures, dtype="bfloat16")
    assert low == pytest.approx(score(clip, head, pictures), abs=0.05)
    reward = load_reward("aesthetic", AestheticJudgeConfig(path=str(clip), head=str(head), dtype="bfloat16"), "cpu")
    assert {parameter.dtype for parameter in reward.head.parameters()} == {torch.float32}


def test_the_version_names_both_files(clip, head, tmp_path):
    versions = set()
    for other in (head, tiny_clip.write_aesthetic_head(tmp_path / "head.pth", seed=4)):
        judge = AestheticJudgeConfig(path=str(clip), head=str(other))
        versions.add(load_reward("aesthetic", judge, "cpu").version)
    assert len(versions) == 2 and all(v.startswith("head@") and "+clip@" in v for v in versions)


def test_a_head_of_another_width_is_refused(clip, pictures, tmp_path):
    head = tiny_clip.write_aesthetic_head(tmp_path / "wide.pth", width=768)
    message = r"judges\.aesthetic\.head = .*wide\.pth' reads features of width 768, but judges\.aesthetic\.path .* 32"
    with pytest.raises(Refused, match=message):
        score(clip, head, pictures)


def test_files_that_are_no_head_are_refused(clip, head, pictures, tmp_path):
    state = torch.load(head, weights_only=True)
    cases = {
        "no matrix `layers.0.weight`": {"weight": torch.zeros(1, 32)},
        "aesthetic predictor": [1, 2],
        "layers.7.weight": {name: value for name, value in state.items() if name != "layers.7.weight"},
        "layers.2.weight": state | {"layers.2.weight": torch.zeros(64, 1024)},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(Refused, match=rf"(?s)judges\.aesthetic\.head = .*{message}"):
            score(clip, tmp_path / "bad.pth", pictures)
    with pytest.raises(Refused, match=r"judges\.aesthetic\.head = .*gone\.pth"):
        score(clip, tmp_path / "gone.pth", pictures)


def test_pickled_code_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"layers.0.weight": Bomb()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_head(tmp_path / "evil.pth", 32)
    assert not (tmp_path / "ran").exists()
