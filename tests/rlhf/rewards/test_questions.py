"""What judges are asked of a prompt: its text or what stands in for it, columns that are missing, sources at its size."""

from dataclasses import replace

import numpy as np
import pytest
import xxhash
from PIL import Image
from pydantic import ValidationError

from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.rewards.config import JudgesConfig, RewardConfig
from rlhf.rewards.questions import check_prompt, check_prompts, reward_text, sources_of
from rlhf.tables import PromptDataTable
from rlhf.types import Geometry, Prompt, Source
from tests.rlhf.data import photos

ITEM = {
    "food_name": "红烧肉",
    "food_type": "中式快餐",
    "city_name": "上海",
    "shop_name": "老王饭店",
    "价格 in ¥": "12.5",
}


def prompt(instruction="make it warm", item=None, sources=()) -> Prompt:
    geometry = Geometry(height=48, width=32)
    return Prompt(key="0", instruction=instruction, sources=sources, item=item or {}, geometry=geometry)


def test_an_empty_instruction_is_filled_from_the_item():
    assert reward_text(prompt("warm"), "{food_name}") == "warm"
    assert reward_text(prompt(" ", ITEM), "a photo of {food_name}") == "a photo of 红烧肉"
    assert reward_text(prompt("", ITEM), "{food_name} for {价格 in ¥}, {{fresh}}") == "红烧肉 for 12.5, {fresh}"
    assert reward_text(prompt(""), "a dish") == "a dish"
    assert reward_text(prompt(""), None) == ""


@pytest.mark.parametrize(
    ("item", "there"),
    [({}, "it has no item metadata"), ({"price": "3"}, "its item has price")],
)
def test_a_column_that_is_missing_is_named_with_the_key_and_the_template(item, there):
    message = rf"'0' has an empty instruction.*reward\.empty_prompt = '{{food_name}}' names food_name.*{there}"
    with pytest.raises(Refused, match=message):
        reward_text(prompt("", item), "{food_name}")


@pytest.mark.parametrize("template", ["{", "}", "{}", "a {food_name!r}", "{price:.2f}"])
def test_a_template_that_is_none_is_refused_in_the_recipe(template):
    with pytest.raises(ValidationError, match="empty_prompt"):
        RewardConfig(empty_prompt=template)


def test_a_prompt_is_checked_for_all_that_its_judges_read():
    judges = JudgesConfig()
    check_prompt(judges, ["ctr", "hps"], "{food_name}", prompt("", ITEM))
    check_prompt(judges, ["aesthetic"], "{food_name}", prompt(""))
    with pytest.raises(Refused, match="empty_prompt"):
        check_prompt(judges, ["hps"], "{food_name}", prompt(""))
    with pytest.raises(Refused, match=r"prompt '0': the judge 'ctr' reads .*; missing: shop_name"):
        check_prompt(judges, ["ctr"], "x", prompt(item={k: v for k, v in ITEM.items() if k != "shop_name"}))


def test_a_blank_column_gives_no_text():
    for blank in ("", " \t", "\u200b", "\u3000"):
        with pytest.raises(
            Refused, match=r"'0' has an empty instruction.* gives no text for it: food_name of its item is"
        ):
            reward_text(prompt(blank, ITEM | {"food_name": blank}), "{food_name}")
    assert reward_text(prompt("", ITEM | {"food_name": ""}), "a photo of {food_name}") == "a photo of "


def test_all_prompts_without_a_text_are_told_with_their_rows(tmp_path):
    items, data = tmp_path / "items.csv", tmp_path / "rows.jsonl"
    items.write_text("image_id,food_name\n1,apple\n\n2,\n3, \n", encoding="utf-8")
    table = PromptDataTable(path=str(data), item_metadata=str(items))
    prompts = [replace(prompt("", {"food_name": name}), key=key) for key, name in (("1", "a"), ("2", ""), ("3", " "))]
    check_prompts(JudgesConfig(), RewardConfig(type="hps"), table, prompts[:1])
    check_prompts(JudgesConfig(), RewardConfig(weights={"aesthetic": 1}), table, prompts)
    with pytest.raises(BadInput) as caught:
        check_prompts(JudgesConfig(), RewardConfig(type="hps"), table, prompts)
    found = [str(problem) for problem in caught.value.problems]
    for one, line, key in zip(found, (4, 5), "23", strict=True):
        assert one.startswith(f"{items}: line {line}: '{key}' leaves the judges nothing to read; ")
    with pytest.raises(
        BadInput, match=r"items\.csv: has no column dish, which reward\.empty_prompt = .* there are food_name"
    ):
        check_prompts(JudgesConfig(), RewardConfig(type="hps", empty_prompt="{dish}"), table, prompts[:1])


def test_sources_come_at_the_prompts_size_as_media(tmp_path):
    file = tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(file)
    cropped = Source(path=str(file), content=xxhash.xxh3_128_hexdigest(file.read_bytes()), height=48, width=32)
    padded = replace(cropped, fit="pad", mirrored=True)
    first, second = sources_of(prompt(sources=(cropped, padded)))
    assert np.array_equal(first, photos.load(file, 48, 32, "crop")[None])
    assert np.array_equal(second, photos.load(file, 48, 32, "pad")[None, :, ::-1])
    assert not np.array_equal(second, first) and not first.flags.writeable
    assert sources_of(prompt()) == ()
    with pytest.raises(Refused, match=r"source\.png changed since it was checked"):
        sources_of(prompt(sources=(replace(cropped, content="what was checked"),)))
