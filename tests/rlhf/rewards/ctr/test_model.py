"""The CTR model: FEAST's text, transform, losses and shapes; checkpoints that load back to the same bits."""

import math

import numpy as np
import pytest
import torch

from rlhf.errors import Refused
from rlhf.rewards.ctr import build as ctr_build
from rlhf.rewards.ctr import model as ctr
from rlhf.rewards.ctr.model import (
    CTRModel,
    Product,
    binomial_loss,
    compound_loss,
    describe,
    encode_items,
    transform,
)
from rlhf.rewards.protocols import Reward
from tests.rlhf.rewards.asking import ctr_reward, score

ITEMS = [
    {"food_name": "红烧肉", "food_type": "中式快餐", "city_name": "上海", "shop_name": "老王饭店"},
    {"food_name": "Golden Delicious", "food_type": "Apple", "city_name": "Stockholm", "shop_name": "Öland小铺"},
]
PRODUCTS = [Product.of(item) for item in ITEMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = ctr_build.small_tokenizer(map(describe, PRODUCTS))
    torch.manual_seed(0)
    model = CTRModel(ctr_build.small_config(tokenizer))
    return ctr.save(tmp_path_factory.mktemp("ctr") / "model", model, tokenizer)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in ((96, 64, 3), (50, 120, 3))]


def test_item_text_is_the_seeds():
    assert describe(PRODUCTS[0]) == "菜品:红烧肉 类型:中式快餐 城市:上海 店铺:老王饭店"


def test_compound_loss_by_hand():
    predicted, rate = torch.tensor([0.2, 0.4]), torch.tensor([0.0, 0.1])
    squares = (1 * 0.04 + 10 * 0.09) / 2
    spread = (0.01 - 0.0025) ** 2
    p = [math.exp(0.2) / (math.exp(0.2) + math.exp(0.4)), math.exp(0.4) / (math.exp(0.2) + math.exp(0.4))]
    q = [1 / (1 + math.exp(0.1)), math.exp(0.1) / (1 + math.exp(0.1))]
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = squares + 0.1 * spread + 0.01 * divergence
    assert compound_loss(predicted, rate).item() == pytest.approx(expected, rel=1e-5)


def test_compound_loss_is_zero_only_at_the_target_and_defined_for_one_row():
    rate = torch.tensor([0.02, 0.3, 0.0])
    assert compound_loss(rate, rate).item() == pytest.approx(0, abs=1e-7)
    assert compound_loss(rate + 0.1, rate).item() > 0.01
    assert compound_loss(torch.tensor([0.3]), torch.tensor([0.1])).item() == pytest.approx(10 * 0.04, rel=1e-5)


def test_binomial_loss_weighs_by_impressions():
    logits = torch.tensor([0.0, math.log(0.1 / 0.9)])
    rate, views = torch.tensor([0.5, 0.1]), torch.tensor([100.0, 900.0])
    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert binomial_loss(logits, rate, views).item() == pytest.approx(0.1 * math.log(2) + 0.9 * entropy, rel=1e-5)
    logits.requires_grad_()
    binomial_loss(logits, rate, views).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2), atol=1e-7, rtol=0)


def test_binomial_loss_is_the_likelihood_up_to_the_coefficient():
    """Its difference between two models is that of torch's log-probabilities, per impression.

    In double precision: theirs cancel log-factorials of thousands, of which single precision keeps three digits here.
    """
    clicks, views = torch.tensor([3.0, 0.0, 250.0]).double(), torch.tensor([20.0, 7.0, 1000.0]).double()
    a, b = torch.tensor([-1.5, -2.0, -1.0]).double(), torch.tensor([0.3, -4.0, -1.2]).double()
    law = [torch.distributions.Binomial(views, logits=logits).log_prob(clicks).sum() for logits in (a, b)]
    losses = [binomial_loss(logits, clicks / views, views) for logits in (a, b)]
    assert (losses[0] - losses[1]).item() == pytest.approx((law[1] - law[0]).item() / 1027, rel=1e-9)


def test_binomial_loss_of_parts_adds_up():
    logits, rate, views = (
        torch.tensor([0.1, -2.0, 1.0]),
        torch.tensor([0.5, 0.1, 0.9]),
        torch.tensor([10.0, 500.0, 3.0]),
    )
    parts = [binomial_loss(logits[i], rate[i], views[i], 513) for i in (slice(0, 1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(binomial_loss(logits, rate, views).item(), rel=1e-6)


def test_transform_pads_with_white_and_keeps_the_whole_picture():
    pixels = transform(np.zeros((100, 50, 3), np.uint8), 64)
    mean, std = (torch.tensor(x)[:, None, None] for x in (ctr.IMAGENET_MEAN, ctr.IMAGENET_STD))
    raw = pixels * std + mean
    torch.testing.assert_close(raw[:, :, :16], torch.ones(3, 64, 16))
    torch.testing.assert_close(raw[:, :, 48:], torch.ones(3, 64, 16))
    torch.testing.assert_close(raw[:, :, 16:48], torch.zeros(3, 64, 32), atol=1e-6, rtol=0)


def test_score_is_the_models_sigmoid(folder, pictures):
    reward = ctr_reward(folder)
    model, tokenizer = ctr.load(folder)
    ids, mask = encode_items(tokenizer, PRODUCTS, model.config.max_tokens)
    with torch.no_grad():
        logits = model.eval()(torch.stack([transform(p, 64) for p in pictures]), ids, mask)
    scores = score(reward, pictures, ["", ""], ITEMS)
    assert scores == pytest.approx(logits.sigmoid().tolist(), abs=1e-6)
    assert isinstance(reward, Reward) and all(0 < score < 1 for score in scores)


def test_score_depends_on_picture_and_item(folder, pictures):
    reward = ctr_reward(folder)
    a, b = score(reward, [pictures[0]] * 2, ["", ""], ITEMS)
    c, _ = score(reward, [pictures[1]] * 2, ["", ""], ITEMS)
    assert a != b and a != c


def test_it_scores_in_bf16(folder, pictures):
    exact = score(ctr_reward(folder), pictures, ["", ""], ITEMS)
    low = score(ctr_reward(folder, dtype="bfloat16"), pictures, ["", ""], ITEMS)
    assert low == pytest.approx(exact, rel=0.05)


def test_neighbours_change_no_bit_of_a_score_in_padded_batches(folder, pictures):
    """The first of eight and, as 8 + 2 are scored, of two; the place in the batch is the same, as it must be."""
    reward = ctr_reward(folder, batch_rows=8)
    together = score(reward, pictures * 5, [""] * 10, ITEMS * 5)
    (alone,) = score(reward, pictures[:1], [""], ITEMS[:1])
    assert together[0] == together[8] == alone


def test_a_missing_column_is_an_error_that_names_it(folder, pictures):
    without = {column: text for column, text in ITEMS[0].items() if column != "city_name"}
    with pytest.raises(Refused, match=r"'ctr' reads .*; missing: city_name \(there: food_name, food_type, shop_name\)"):
        score(ctr_reward(folder), pictures, ["", ""], [ITEMS[0], without])


def test_other_columns_are_not_read(folder, pictures):
    more = [item | {"price": "12.5"} for item in ITEMS]
    reward = ctr_reward(folder)
    assert score(reward, pictures, ["", ""], more) == score(reward, pictures, ["", ""], ITEMS)


def test_a_checkpoint_loads_back_to_the_same_bits(folder, tmp_path):
    model, tokenizer = ctr.load(folder)
    again, _ = ctr.load(ctr.save(tmp_path / "again", model, tokenizer))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_incomplete_and_misfitting_checkpoints_are_refused(folder, tmp_path):
    with pytest.raises(Refused, match=r"config\.json is missing"):
        ctr.load(tmp_path)
    model, tokenizer = ctr.load(folder)
    bad = ctr.save(tmp_path / "bad", model, tokenizer)
    from safetensors.torch import load_file, save_file

    state = load_file(bad / "model.safetensors")
    save_file({name: t for name, t in state.items() if name != "modality"}, bad / "model.safetensors")
    with pytest.raises(Refused, match="modality"):
        ctr.load(bad)


def test_the_seeds_backbones_are_the_same_code_path():
    """The published shapes, built empty: Chinese-BERT-wwm-ext and ConvNeXtV2-Huge-22k-512."""
    config = ctr.CTRModelConfig(
        text={"model_type": "bert", "vocab_size": 21128},
        image={"model_type": "convnextv2", "hidden_sizes": [352, 704, 1408, 2816], "depths": [3, 3, 27, 3]},
    )
    with torch.device("meta"):
        model = CTRModel(config)
    assert model.text_projection[0].weight.shape == (512, 768)
    assert model.image_projection[0].weight.shape == (512, 2816) and model.head[-1].out_features == 1
    assert model.head[0].weight.shape == (128, 512)
    assert len(model.fusion.layers) == 4 and model.fusion.layers[0].self_attn.num_heads == 4


def test_the_wide_part_adds_nothing_at_first_and_sees_what_norms_hide(folder):
    model, tokenizer = ctr.load(folder)
    fresh = CTRModel(model.config)
    ids, mask = encode_items(tokenizer, PRODUCTS, 64)
    pixels = torch.randn(2, 3, 64, 64)
    added, _ = fresh.wide(pixels, ids, mask)
    assert torch.equal(added, torch.zeros(2))
    with torch.no_grad():
        for parameter in fresh.wide.parameters():
            torch.nn.init.normal_(parameter)
        logit, statistics = fresh.wide(pixels, ids, mask)
        brighter, changed = fresh.wide(pixels + 1, ids, mask)
        doubled, spread = fresh.wide(2 * pixels, ids, mask)
        padded, _ = fresh.wide(pixels, torch.where(mask > 0, ids, 7), mask)
        other, _ = fresh.wide(pixels, ids.flip(0), mask.flip(0))
        deep = fresh.eval()(pixels, ids, mask)
        fresh.wide.words.weight += 1.0
        more = fresh(pixels, ids, mask)
    filters = model.config.filters
    torch.testing.assert_close(changed[:, filters:], statistics[:, filters:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spread[:, filters:], 2 * statistics[:, filters:], atol=1e-2, rtol=1e-2)
    assert (changed - statistics)[:, :filters].abs().min() > 1e-3 and not torch.equal(brighter, doubled)
    assert torch.equal(padded, logit) and (other - logit).abs().min() > 1e-3
    torch.testing.assert_close(more, deep + mask.sum(1), atol=1e-4, rtol=1e-5)


def test_small_tokens_are_whole_words_with_their_field():
    items = [*PRODUCTS, Product(food_name="Red Delicious", food_type="Apple", city_name="上海", shop_name="老王饭店")]
    tokenizer = ctr_build.small_tokenizer(map(describe, items))
    assert "[UNK]" not in tokenizer.tokenize(describe(items[2]))
    assert tokenizer.tokenize("类型:Apple 店铺:老王饭店 Delicious") == ["类型:apple", "店铺:老王饭店", "delicious"]
    assert tokenizer.tokenize("类型:Pear") == ["类", "##型", "##:", "##p", "##e", "##a", "##r"], "seen once: spelled"
    again = ctr_build.small_tokenizer(map(describe, reversed(items)))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("类型:鱼")["input_ids"][1] == again.unk_token_id, "a character never seen"
    assert (again.cls_token_id, again.sep_token_id) == (again("x")["input_ids"][0], again("x")["input_ids"][-1])


def test_a_small_convnext_runs_in_the_same_model():
    config = ctr.CTRModelConfig(
        text={"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2},
        image={"model_type": "convnextv2", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
        image_size=64,
    )
    ids = torch.ones(3, 8, dtype=torch.long)
    assert CTRModel(config).eval()(torch.zeros(3, 3, 64, 64), ids, ids).shape == (3,)
