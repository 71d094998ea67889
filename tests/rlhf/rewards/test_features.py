"""Forwards of one shape and the cache of prompts."""

import pytest
import torch

from rlhf.errors import Refused
from rlhf.rewards.features import cached_texts, existing, forward_rows


def test_every_forward_has_the_same_rows_and_padding_is_dropped():
    shapes = []

    def forward(pixels):
        shapes.append(tuple(pixels.shape))
        return pixels.flatten(1)[:, :2].double()

    pixels = torch.arange(7 * 12).float().reshape(7, 3, 2, 2)
    result = forward_rows(forward, 3, pixels)
    assert shapes == [(3, 3, 2, 2)] * 3
    assert result.dtype == torch.float32 and torch.equal(result, pixels.flatten(1)[:, :2])
    shapes.clear()
    assert torch.equal(forward_rows(forward, None, pixels), result) and shapes == [(7, 3, 2, 2)]


def test_prompts_are_encoded_alone_once_and_normalised():
    asked = []

    def encode(prompt):
        asked.append(prompt)
        return torch.tensor([[3.0, 4.0]]) * len(prompt)

    texts = cached_texts(encode)
    assert torch.allclose(texts(["a", "bb", "a"]), torch.tensor([[0.6, 0.8]] * 3))
    texts(["bb", "a"])
    assert asked == ["a", "bb"]


def test_the_prompts_least_recently_used_are_forgotten():
    asked = []

    def encode(prompt):
        asked.append(prompt)
        return torch.ones(1, 2)

    texts = cached_texts(encode, limit=2)
    for prompts in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):  # c pushes out b, not a
        texts(prompts)
    assert asked == ["a", "b", "c", "b"]
    assert len(texts(["d", "e", "f"])) == 3  # more than the limit at once


def test_paths_are_checked_under_their_key(tmp_path):
    assert existing("judges.x.path", str(tmp_path), "a folder") == tmp_path
    with pytest.raises(Refused, match=r"judges\.x\.path is not set; give a folder"):
        existing("judges.x.path", None, "a folder")
    with pytest.raises(Refused, match=r"judges\.x\.path = .*gone.* give a folder"):
        existing("judges.x.path", tmp_path / "gone", "a folder")
