"""CLIP score and PickScore against transformers' own logits, and what is refused. The contract: test_rewards.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from rlhf.errors import Refused
from rlhf.rewards import load_reward
from rlhf.rewards.clip import CLIPFeatures
from rlhf.rewards.config import CLIPJudgeConfig
from tests.rlhf.rewards import asking, tiny_clip

ROUNDING = 3 * 8 * 8 * torch.finfo(torch.float32).eps
"""Of a cosine, up to the order of sums: eps × the terms of the longest, which goes over a patch's pixels, × 1."""
PROMPTS = ["a red apple", "一只猫", "", "far more than the seventy-seven tokens that CLIP reads " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.write_clip(tmp_path_factory.mktemp("models") / "clip", seed=3)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    shapes = ((1312, 784, 3), (50, 120, 3), (64, 64, 3), (3, 5, 3))
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def logits(folder, pictures):
    """(4, 4) logits_per_image, by the library alone."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    images = [Image.fromarray(picture) for picture in pictures]
    inputs = processor(images=images, text=PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 77
    with torch.no_grad():
        return model(**inputs).logits_per_image


def score(name, pictures, prompts=PROMPTS, **keys):
    return asking.score(load_reward(name, CLIPJudgeConfig(**keys), "cpu"), pictures, prompts)


def copy(folder, target):
    return shutil.copytree(folder, target)


def test_pickscore_is_the_logit_of_picture_and_prompt(folder, pictures, logits):
    expected = logits.diagonal()
    assert score("pickscore", pictures, path=str(folder)) == pytest.approx(expected.tolist(), abs=100 * ROUNDING)
    assert expected.std() > 1 and expected.abs().max() > 10


def test_clip_score_is_the_cosine(folder, pictures, logits):
    expected = (logits.diagonal() / 100).tolist()
    scores = score("clip", pictures, path=str(folder))
    assert scores == pytest.approx(expected, abs=ROUNDING)
    assert min(scores) < 0  # neither clamped nor weighted


def test_the_logit_scale_is_the_models(folder, tmp_path, pictures):
    other = copy(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file(state | {"logit_scale": torch.tensor(2.0)}, other / "model.safetensors", {"format": "pt"})
    cosines = np.array(score("clip", pictures, path=str(other)))
    assert score("pickscore", pictures, path=str(other)) == pytest.approx((np.exp(2.0) * cosines).tolist(), rel=1e-5)


def test_bfloat16_is_close_and_keeps_the_scale(folder, pictures):
    low, high = (score("clip", pictures, path=str(folder), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert low == pytest.approx(high, abs=0.02) and low != high
    features = CLIPFeatures("pickscore", CLIPJudgeConfig(path=str(folder), dtype="bfloat16"), "cpu")
    assert features.model.dtype == torch.bfloat16 and features.scale == pytest.approx(100, rel=1e-6)


def test_the_ends_of_a_long_picture_are_cut(folder):
    """As the published scorers do: 1280×640 and 640×1280 are read as their middle 640×640, but for a blurred edge."""
    rng = np.random.default_rng(1)
    middle = rng.integers(0, 256, (640, 640, 3), dtype=np.uint8)
    pads = [rng.integers(0, 256, (320, 640, 3), dtype=np.uint8) for _ in range(2)]
    tall = np.concatenate([pads[0], middle, pads[1]])
    wide = np.concatenate([pads[0].transpose(1, 0, 2), middle, pads[1].transpose(1, 0, 2)], axis=1)
    a, b, c = score("clip", [middle, tall, wide], ["x"] * 3, path=str(folder))
    assert a == pytest.approx(b, abs=0.01) and a == pytest.approx(c, abs=0.01)


def test_a_strip_is_cut_before_it_is_resized(folder, monkeypatch):
    strip = np.random.default_rng(0).integers(0, 256, (4, 20_000, 3), dtype=np.uint8)
    features = CLIPFeatures("clip", CLIPJudgeConfig(path=str(folder)), "cpu")
    seen = []
    process = features.processor.image_processor.preprocess
    monkeypatch.setattr(
        features.processor.image_processor,
        "preprocess",
        lambda images, **keys: (seen.extend(images), process(images, **keys))[1],
    )
    media = strip[None], strip[None, :, 9968:10032]
    whole, middle = (features.images([one]) for one in media)  # both in the same place
    assert torch.equal(whole, middle) and [image.size for image in seen] == [(64, 4)] * 2


def test_a_processor_elsewhere_is_used(folder, tmp_path, pictures):
    model, processor = copy(folder, tmp_path / "model"), tmp_path / "processor"
    processor.mkdir()
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / file).rename(processor / file)
    with pytest.raises(Refused, match=r"holds no image processor and no tokenizer; set judges\.pickscore\.proc"):
        score("pickscore", pictures, path=str(model))
    with pytest.raises(Refused, match=r"judges\.pickscore\.processor = .*gone"):
        score("pickscore", pictures, path=str(model), processor=str(tmp_path / "gone"))
    together = score("pickscore", pictures, path=str(folder))
    assert score("pickscore", pictures, path=str(model), processor=str(processor)) == together


def test_the_file_layout_of_the_published_folders_loads(folder, tmp_path, pictures):
    """preprocessor_config.json with plain sizes, vocab.json and merges.txt: as uploaded in 2022."""
    old = copy(folder, tmp_path / "old")
    processor = CLIPProcessor.from_pretrained(folder)
    settings = json.loads((old / "processor_config.json").read_text())["image_processor"]
    settings |= {"size": 64, "crop_size": 64, "feature_extractor_type": "CLIPFeatureExtractor"}
    del settings["image_processor_type"]
    (old / "preprocessor_config.json").write_text(json.dumps(settings))
    (old / "vocab.json").write_text(json.dumps(processor.tokenizer.get_vocab()))
    (old / "merges.txt").write_text("#version: 0.2\n")
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    for file in ("processor_config.json", "tokenizer.json"):
        (old / file).unlink()
    assert score("clip", pictures, path=str(old)) == score("clip", pictures, path=str(folder))


def test_a_processor_of_another_model_is_refused(folder, tmp_path, pictures):
    other = CLIPProcessor.from_pretrained(folder)
    other.tokenizer.add_tokens(["<one-more>"])
    other.save_pretrained(tmp_path / "words")
    with pytest.raises(Refused, match=r"judges\.clip\.processor: .* has 515 tokens, but the model knows 514"):
        score("clip", pictures, path=str(folder), processor=str(tmp_path / "words"))
    other = CLIPProcessor.from_pretrained(folder, crop_size=32)
    other.save_pretrained(tmp_path / "size")
    with pytest.raises(Refused, match=r"judges\.clip\.processor: .* crops pictures to 32, but the model reads 64"):
        score("clip", pictures, path=str(folder), processor=str(tmp_path / "size"))


def test_folders_that_are_no_clip_are_refused(folder, tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"judges\.clip\.path = .*has no config\.json"):
        score("clip", pictures, path=str(tmp_path / "empty"))
    other = copy(folder, tmp_path / "siglip")
    (other / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(Refused, match=r"judges\.clip\.path = .*type 'siglip', not 'clip'"):
        score("clip", pictures, path=str(other))
    (copy(folder, tmp_path / "bare") / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"judges\.clip\.path = .*does not load"):
        score("clip", pictures, path=str(tmp_path / "bare"))


def test_missing_weights_are_never_drawn_at_random(folder, tmp_path, pictures):
    other = copy(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match=r"weights lack 1 tensors, the first is visual_projection\.weight"):
        score("clip", pictures, path=str(other))


def test_the_same_seed_writes_the_same_weights(folder, tmp_path):
    again, other = (load_file(tiny_clip.write_clip(tmp_path / str(s), seed=s) / "model.safetensors") for s in (3, 4))
    reference = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], reference[name]) for name in reference)
    assert any(not torch.equal(other[name], reference[name]) for name in reference)
