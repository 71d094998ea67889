"""Broken pictures are broken each in its way, and prompts are those of the product's filter."""

import numpy as np
import pytest
import torch
import transformers

from jobs.world import filter
from rlhf.rewards.filters import FAIL, PASS
from tests.jobs.world.shots import shots


@pytest.mark.parametrize("fault", filter.FAULTS)
def test_every_fault_changes_much_of_a_picture_and_draws_anew(fault):
    picture = shots().photos[0, 0].float()
    one, same, other = (filter.FAULTS[fault](picture, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == picture.shape
    assert ((one - picture).abs().amax(-1) > 10).float().mean() > 0.08


def test_spoiled_pictures_have_the_fault_that_is_named():
    pictures = shots().photos[:12, 0]
    broken, faults = filter.spoiled(pictures, np.random.default_rng(0))
    assert broken.dtype == torch.uint8 and broken.shape == pictures.shape and set(faults) <= set(filter.FAULTS)
    assert len(set(faults)) > 2


def test_it_is_trained_on_the_products_own_prompt_and_saved(tmp_path):
    filter.train_filter(tmp_path, shots().photos[:, 0], steps=6, seed=0)  # past the change to the whole prompt
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    text = processor.tokenizer.decode(filter._Asked(processor).ids("Make it brighter."))
    assert "You are an image quality auditor" in text and text.endswith("<|im_start|>assistant\n")
    assert all(len(processor.tokenizer(word).input_ids) == 1 for word in (PASS, FAIL))
    probabilities = filter.pass_probabilities(tmp_path, shots().photos[:3, 0])
    assert probabilities.shape == (3,) and ((probabilities > 0) & (probabilities < 1)).all()
