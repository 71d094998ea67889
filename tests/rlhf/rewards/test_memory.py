"""Peaks of judges: the weights that a replica holds, a batch that grows with its size, and what cannot be known."""

import pytest

from rlhf.rewards import load_reward, tiny
from rlhf.rewards.config import CLIPJudgeConfig, CTRJudgeConfig, FilterJudgeConfig, HPSJudgeConfig, PythonJudgeConfig
from rlhf.rewards.ctr import build, model
from rlhf.rewards.ctr.model import Product
from rlhf.rewards.memory import judge_peak
from tests.rlhf.rewards import tiny_clip

GIB = 2**30
ITEM = {"food_name": "tea", "food_type": "drink", "city_name": "a town", "shop_name": "a shop"}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Name → (the table's class, where a tiny checkpoint lies)."""
    folder = tmp_path_factory.mktemp("judges")
    tokenizer = build.small_tokenizer([model.describe(Product.of(ITEM))])
    model.save(folder / "ctr", model.CTRModel(build.small_config(tokenizer)), tokenizer)
    return {
        "hps": (HPSJudgeConfig, tiny.write_hpsv2(folder / "hps.pt")),
        "ctr": (CTRJudgeConfig, folder / "ctr"),
        "clip": (CLIPJudgeConfig, tiny_clip.write_clip(folder / "clip")),
    }


def held(reward):
    """Bytes of the network inside a reward."""
    network = getattr(reward, "model", None) or reward.features.model
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("name", ["hps", "ctr", "clip"])
def test_a_judge_holds_its_network_and_what_a_batch_needs(judges, name):
    table, path = judges[name]
    small, large = (judge_peak(name, table(path=str(path), max_batch_size=size), None).kinds for size in (8, 16))
    assert small["parameters"] == large["parameters"] == held(load_reward(name, table(path=str(path)), "cpu"))
    assert small["activations"] > 0 and large["activations"] == pytest.approx(2 * small["activations"], rel=0.25)
    half = judge_peak(name, table(path=str(path), dtype="bfloat16"), None).kinds
    assert half["parameters"] == pytest.approx(small["parameters"] / 2, rel=0.05), "but for buffers of whole numbers"


def test_the_filter_takes_what_vllm_is_told_to():
    judge = FilterJudgeConfig(path="somewhere", gpu_memory_utilization=0.25)
    assert judge_peak("filter", judge, 80 * GIB).nbytes == 20 * GIB
    assert judge_peak("filter", judge, None) is None


def test_what_cannot_be_known_is_not_told():
    assert judge_peak("mine", PythonJudgeConfig(function="module:function"), 80 * GIB) is None
    assert judge_peak("hps", HPSJudgeConfig(path="not/there.pt"), 80 * GIB) is None
