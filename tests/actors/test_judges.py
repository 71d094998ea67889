"""The judging actor against real HTTP judges: mixes, texts, sources, and failures that stay failures."""

import numpy as np
import pytest
import ray

from actors.asking import Failure
from actors.judges import Judges, PixelsLost, reward_text
from rlhf.errors import Refused
from rlhf.types import Item, Prompt
from tests.jobs.light import light_config, write_photos
from tests.judge_server import warmth

ITEM = Item(food_name="红烧肉", food_type="中式快餐", city_name="上海", shop_name="老王饭店")


def prompt(folder, instruction="make it warm", item=None) -> Prompt:
    image = str(folder / "images" / "0.png")
    sizes = {"height": 48, "width": 32}
    return Prompt(image_id="0", instruction=instruction, image=image, item=item, text_key="t", source_key="s", **sizes)


@pytest.fixture
def folder(tmp_path):
    write_photos(tmp_path, train=1, held_out=1)
    return tmp_path


def judge(config, pictures, prompt):
    """Every picture through a real Judges actor, all at once."""
    actor = ray.remote(Judges).options(num_cpus=0.1, max_concurrency=100).remote(config, {})
    try:
        return ray.get([actor.judge.remote([ray.put(picture)], prompt) for picture in pictures], timeout=120)
    finally:
        ray.kill(actor)


def pictures(count):
    return list(np.random.default_rng(1).integers(0, 256, (count, 48, 32, 3), dtype=np.uint8))


def test_a_mix_of_services_scores_each_picture_by_each(cluster, judge_server, folder, kontext):
    url = judge_server()
    reward = {"weights": {"hps": 1.0, "ctr": 2.0, "pickscore": 1.0}}
    judges = {
        "hps": {"url": f"{url}/hpsv2"},
        "ctr": {"url": f"{url}/ctr"},
        "pickscore": {"url": f"{url}/hpsv2"},
        "filter": {"enabled": False},
    }
    data = {"path": str(folder / "train.jsonl"), "item_metadata": "unused"}
    config = light_config(folder, kontext, url, reward=reward, judges=judges, data=data)
    shown = pictures(9)
    scores = judge(config, shown, prompt(folder, item=ITEM))
    for score, picture in zip(scores, shown, strict=True):
        expected = warmth(picture)
        assert score.rewards == {"hps": expected, "ctr": pytest.approx(0.05 + 0.01 * expected), "pickscore": expected}
        assert score.verdict.valid


@pytest.mark.parametrize(("send", "seen"), [(True, "the source photo too"), (False, "the edit alone")])
def test_the_filter_sees_the_source_where_it_is_asked_to(cluster, judge_server, folder, kontext, send, seen):
    url = judge_server()
    judges = {"filter": {"url": f"{url}/filter", "send_source": send}}
    (score,) = judge(light_config(folder, kontext, url, judges=judges), pictures(1), prompt(folder))
    assert score.verdict.reason == f"saw {seen}"


def test_only_the_guilty_pictures_fail_and_say_why(cluster, judge_server, folder, kontext):
    url = judge_server(fail=0.3)
    judges = {"hps": {"url": f"{url}/hpsv2"}, "filter": {"enabled": False}, "retries": 0}
    shown = pictures(12)
    answers = judge(light_config(folder, kontext, url, judges=judges), shown, prompt(folder))
    failed = [isinstance(answer, Failure) for answer in answers]
    assert 0 < sum(failed) < 12
    for answer, picture in zip(answers, shown, strict=True):
        if isinstance(answer, Failure):
            assert answer.judge == "hps" and "status 500" in answer.reason and "(after 1 tries)" in answer.reason
        else:
            assert answer.rewards == {"hps": warmth(picture)}


def test_a_silent_service_is_a_failure_and_a_rejected_picture_gets_no_reward(cluster, judge_server, folder, kontext):
    url = judge_server(reject=1.0)
    nowhere = {"hps": {"url": "http://127.0.0.1:9/hpsv2"}, "retries": 1, "timeout_s": 5.0}
    silent = light_config(folder, kontext, url, judges=nowhere | {"filter": {"enabled": False}})
    (answer,) = judge(silent, pictures(1), prompt(folder))
    assert answer.judge == "hps" and "ConnectError" in answer.reason
    (score,) = judge(light_config(folder, kontext, url, judges=nowhere), pictures(1), prompt(folder))
    assert not score.verdict.valid and score.rewards == {}


def test_a_picture_that_is_gone_is_lost_and_no_failure_of_a_judge(cluster, judge_server, folder, kontext):
    @ray.remote(num_cpus=0.1)
    class Owner:
        def put(self):
            return [ray.put(pictures(1)[0])]

    config = light_config(folder, kontext, judge_server(), judges={"filter": {"enabled": False}})
    owner = Owner.remote()
    reference = ray.get(owner.put.remote(), timeout=60)
    ray.kill(owner)
    actor = ray.remote(Judges).options(num_cpus=0.1, max_concurrency=10).remote(config, {})
    assert isinstance(ray.get(actor.judge.remote(reference, prompt(folder)), timeout=120), PixelsLost)
    ray.kill(actor)


def test_an_empty_instruction_is_filled_from_the_item(tmp_path):
    assert reward_text(prompt(tmp_path, "warm"), "{food_name}") == "warm"
    assert reward_text(prompt(tmp_path, " ", ITEM), "a photo of {food_name}") == "a photo of 红烧肉"
    assert reward_text(prompt(tmp_path, ""), "a dish") == "a dish"
    with pytest.raises(Refused, match=r"'0' has an empty instruction.*food_name.*data\.item_metadata"):
        reward_text(prompt(tmp_path, ""), "{food_name}")
