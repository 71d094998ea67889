"""A click log with a known cause, and tiny pretrained backbones, for the tests of the CTR training."""

import math
from pathlib import Path

import numpy as np
from transformers import BertConfig, BertModel, ConvNextV2Config, ConvNextV2Model

from rlhf.data.media import encode_png
from rlhf.rewards.ctr.build import small_tokenizer
from rlhf.rewards.ctr.clicks import Click
from rlhf.rewards.ctr.config import CTRModelSection
from rlhf.rewards.ctr.model import Product, describe

FOODS = ["苹果", "banana"]
SHOPS = ["老王小铺", "兰州饭店", "Öland超市", "Green小铺"]


def write_clicks(folder: Path, count: int = 160) -> list[Click]:
    """Bright pictures and apples are clicked more. Eight products; each is in four pictures in a row."""
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        brightness, food = rng.random(), index // 4 % 2
        picture = np.clip(rng.normal(255 * brightness, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        (folder / f"{index}.png").write_bytes(encode_png(picture))
        rate = 1 / (1 + math.exp(-(3 * brightness - 2.5 - food)))
        item = Product(food_name=FOODS[food], food_type="水果", city_name="上海", shop_name=SHOPS[index // 8 % 4])
        views = int(rng.integers(20, 1000))
        rows.append(
            Click(image=folder / f"{index}.png", item=item, rate=round(rate * views) / views, impressions=views)
        )
    return rows


def write_backbones(folder: Path, clicks: list[Click], dropout: float = 0.0) -> CTRModelSection:
    """A random BERT and a random ConvNeXtV2 as their publishers lay them out; no batch norm in either."""
    tokenizer = small_tokenizer(describe(click.item) for click in clicks)
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    image = ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
    BertModel(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    ConvNextV2Model(image).save_pretrained(folder / "image")
    return CTRModelSection(text=str(folder / "text"), image=str(folder / "image"), image_size=32, max_tokens=40)
