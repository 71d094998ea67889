"""The judging actor against real HTTP judges: mixes, texts, sources, and failures that stay failures."""

import numpy as np
import pytest
import ray
import xxhash

from actors.judges import Answer, Failure, Judges, PixelsLost
from rlhf.rewards.config import JudgesConfig, ServeConfig
from rlhf.types import Geometry, Prompt, Source
from serve_apps import deploy
from tests.conftest import SERVE_PORT
from tests.jobs.light import write_photos
from tests.judge_server import warmth
from tests.rlhf.data import photos

NAMES = ("unlike_the_source", "without_sources")
ITEM = {"food_name": "红烧肉", "food_type": "中式快餐", "city_name": "上海", "shop_name": "老王饭店"}


def prompt(folder, instruction="make it warm", item=None) -> Prompt:
    """One whose source is a photo in the folder."""
    image = folder / "images" / "0.png"
    content = xxhash.xxh3_128_hexdigest(image.read_bytes()) if image.exists() else "gone"
    source = Source(path=str(image), content=content, height=48, width=32)
    geometry = Geometry(height=48, width=32)
    return Prompt(key="0", instruction=instruction, sources=(source,), item=item or {}, geometry=geometry)


@pytest.fixture
def folder(tmp_path):
    write_photos(tmp_path, train=1, held_out=1)
    return tmp_path


def judging_actor(judges, rewards, apps=None, *, ask_filter, empty_prompt="{food_name}"):
    actor = ray.remote(Judges).options(num_cpus=0.1, max_concurrency=100)
    config = JudgesConfig.model_validate({"timeout_s": 30.0} | judges)
    return actor.remote(config, rewards, apps or {}, ask_filter=ask_filter, empty_prompt=empty_prompt)


def judge(judges, pictures, prompt, rewards=("hps",), apps=None, *, ask_filter=False):
    """Every picture through a real Judges actor, all at once."""
    actor = judging_actor(judges, rewards, apps, ask_filter=ask_filter)
    try:
        return ray.get([actor.judge.remote([ray.put(picture)], prompt) for picture in pictures], timeout=120)
    finally:
        ray.kill(actor)


def pictures(count):
    return list(np.random.default_rng(1).integers(0, 256, (count, 48, 32, 3), dtype=np.uint8))


def test_a_mix_of_services_scores_each_picture_by_each(cluster, judge_server, folder):
    url = judge_server()
    judges = {"hps": {"url": f"{url}/hpsv2"}, "ctr": {"url": f"{url}/ctr"}, "pickscore": {"url": f"{url}/hpsv2"}}
    shown = pictures(9)
    answers = judge(judges, shown, prompt(folder, item=ITEM), ("hps", "ctr", "pickscore"))
    for answer, picture in zip(answers, shown, strict=True):
        score, expected = answer.whole(), warmth(picture)
        assert score.rewards == {"hps": expected, "ctr": pytest.approx(0.05 + 0.01 * expected), "pickscore": expected}
        assert score.verdict.valid


@pytest.mark.parametrize(("send", "seen"), [(True, "the source photo too"), (False, "the edit alone")])
def test_the_filter_sees_the_source_where_it_is_asked_to(cluster, judge_server, folder, send, seen):
    url = judge_server()
    judges = {"hps": {"url": f"{url}/hpsv2"}, "filter": {"url": f"{url}/filter", "send_source": send}}
    (answer,) = judge(judges, pictures(1), prompt(folder), ask_filter=True)
    assert answer.whole().verdict.reason == f"saw {seen}"


def test_a_source_that_is_gone_is_a_failure_that_names_it(cluster, judge_server, folder):
    judges = {"filter": {"url": f"{judge_server()}/filter", "send_source": True}, "retries": 0}
    about = prompt(folder)
    (folder / "images" / "0.png").unlink()
    (answer,) = judge(judges, pictures(1), about, (), ask_filter=True)
    failure = answer.whole()
    assert failure.judge == "filter" and "FileNotFoundError" in failure.reason and "0.png" in failure.reason


def unlike_the_source(images, prompts, sources, items):
    """Distance from the first source, if there is one; -1 if there is none."""
    pairs = zip(images, sources, strict=True)
    return [float(np.abs(i.astype(int) - some[0]).mean()) if some else -1.0 for i, some in pairs]


def without_sources(images, prompts, items):
    return [float(image.mean()) for image in images]


def test_a_function_gets_the_source_as_the_model_saw_it_and_one_of_three_arguments_none(cluster, folder):
    mine = {name: {"function": f"{__name__}:{name}", "num_cpus": 0.05} for name in NAMES}
    judges = {"python": mine, "deploy_timeout_s": 240.0}
    config = JudgesConfig.model_validate(judges)
    try:
        up = deploy.deploy(config, ServeConfig(port=SERVE_PORT, route_prefix="/sources"), NAMES, "sources")
        shown = pictures(3)
        answers = judge(judges, shown, prompt(folder), NAMES, up.apps)
        (alone,) = judge(judges, shown[:1], prompt(folder.parent / "no"), NAMES, up.apps)
    finally:
        deploy.undeploy("sources", NAMES)
    source = photos.load(folder / "images" / "0.png", 48, 32, "crop").astype(int)
    for answer, picture in zip(answers, shown, strict=True):
        expected = {"unlike_the_source": np.abs(picture - source).mean(), "without_sources": picture.mean()}
        assert answer.whole().rewards == pytest.approx(expected)
    # Where the source is missing, who reads it fails and the other does not.
    assert alone.rewards == {"without_sources": shown[0].mean()}
    assert [failure.judge for failure in alone.failures] == ["unlike_the_source"]


def test_only_the_guilty_pictures_fail_and_say_why(cluster, judge_server, folder):
    url = judge_server(fail=0.3)
    judges = {"hps": {"url": f"{url}/hpsv2"}, "pickscore": {"url": f"{judge_server()}/hpsv2"}, "retries": 0}
    shown = pictures(12)
    given = judge(judges, shown, prompt(folder), ("hps", "pickscore"))
    assert [answer.rewards["pickscore"] for answer in given] == [warmth(picture) for picture in shown]
    answers = [answer.whole() for answer in given]
    failed = [isinstance(answer, Failure) for answer in answers]
    assert 0 < sum(failed) < 12
    for answer, picture in zip(answers, shown, strict=True):
        if isinstance(answer, Failure):
            assert answer.judge == "hps" and "status 500" in answer.reason and "(after 1 tries)" in answer.reason
        else:
            assert answer.rewards == {"hps": warmth(picture), "pickscore": warmth(picture)}


def test_a_silent_service_is_a_failure_and_a_rejected_picture_gets_no_reward(cluster, judge_server, folder):
    url = judge_server(reject=1.0)
    judges = {"hps": {"url": "http://127.0.0.1:9/hpsv2"}, "retries": 1, "timeout_s": 5.0}
    (answer,) = judge(judges, pictures(1), prompt(folder))
    failure = answer.whole()
    assert failure.judge == "hps" and "ConnectError" in failure.reason and answer.rewards == {}
    (answer,) = judge(judges | {"filter": {"url": f"{url}/filter"}}, pictures(1), prompt(folder), ask_filter=True)
    score = answer.whole()
    assert not score.verdict.valid and score.rewards == {}


def test_what_a_prompt_lacks_is_a_failure_of_the_judge_that_reads_it(cluster, judge_server, folder):
    url = judge_server()
    judges = {"hps": {"url": f"{url}/hpsv2"}, "ctr": {"url": f"{url}/ctr"}, "retries": 0}
    (answer,) = judge(judges, pictures(1), prompt(folder, "", {"price": "3"}), ("hps", "ctr"))
    reasons = {failure.judge: failure.reason for failure in answer.failures}
    assert answer.verdict.valid and isinstance(answer, Answer)
    assert "reward.empty_prompt = '{food_name}' names food_name" in reasons["hps"]
    assert "missing: food_name, food_type, city_name, shop_name (there: price)" in reasons["ctr"]


def test_a_picture_that_is_gone_is_lost_and_no_failure_of_a_judge(cluster, judge_server, folder):
    @ray.remote(num_cpus=0.1)
    class Owner:
        def put(self):
            return [ray.put(pictures(1)[0])]

    owner = Owner.remote()
    reference = ray.get(owner.put.remote(), timeout=60)
    ray.kill(owner)
    actor = judging_actor({"hps": {"url": f"{judge_server()}/hpsv2"}}, ("hps",), ask_filter=False)
    assert isinstance(ray.get(actor.judge.remote(reference, prompt(folder)), timeout=120), PixelsLost)
    ray.kill(actor)
