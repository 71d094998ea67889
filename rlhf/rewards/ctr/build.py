"""An untrained CTR model from its section of a recipe, and which of its parameters learn at which rate."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.rewards.ctr.clicks import Click
from rlhf.rewards.ctr.config import LEARNING_RATE, SMALL_LEARNING_RATE, CTRModelSection, CTRTrainConfig
from rlhf.rewards.ctr.model import CTRModel, CTRModelConfig, describe
from rlhf.rewards.ctr.small import small_config, small_tokenizer


def create(clicks: Sequence[Click], section: CTRModelSection) -> tuple[CTRModel, PreTrainedTokenizerBase]:
    """An untrained CTR model over the configured backbones, its output bias at the mean click rate of `clicks`."""
    if section.text is None or section.image is None:
        tokenizer: PreTrainedTokenizerBase = small_tokenizer(describe(click.item) for click in clicks)
        model = CTRModel(small_config(tokenizer, image_size=section.image_size or 64, max_tokens=section.max_tokens))
    else:
        tokenizer = AutoTokenizer.from_pretrained(section.text)
        config = CTRModelConfig(
            text=AutoConfig.from_pretrained(section.text).to_dict(),
            image=AutoConfig.from_pretrained(section.image).to_dict(),
            image_size=section.image_size or 512,
            max_tokens=section.max_tokens,
        )
        model = CTRModel(config)
        model.text.load_state_dict(AutoModel.from_pretrained(section.text).state_dict())
        model.image.load_state_dict(AutoModel.from_pretrained(section.image).state_dict())
    mean = min(max(float(np.mean([click.rate for click in clicks])), 1e-4), 1 - 1e-4)
    torch.nn.init.constant_(model.head[-1].bias, math.log(mean / (1 - mean)))
    return model, tokenizer


def parameter_groups(model: CTRModel, section: CTRModelSection, config: CTRTrainConfig) -> list[dict]:
    """Heads, text, image, each at its own rate (by default FEAST's); a small model from scratch all at the heads'.

    The rate is also `initial_lr`, which a schedule scales. Frozen parameters are in no group.
    """
    backbones = [list(model.text.parameters()), list(model.image.parameters())]
    known = {id(parameter) for group in backbones for parameter in group}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in known]
    rates = [config.learning_rate or LEARNING_RATE, config.text_learning_rate, config.image_learning_rate]
    if section.text is None:
        rates = [config.learning_rate or SMALL_LEARNING_RATE] * 3
    groups = zip([heads, *backbones], rates, strict=True)
    return [{"params": [p for p in group if p.requires_grad], "lr": rate, "initial_lr": rate} for group, rate in groups]
