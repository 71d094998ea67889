"""Deployment handles: what arrives in the replica, that batches do not change a score, and what errors look like."""

import asyncio

import numpy as np
import pytest
import ray
from ray import serve

from rlhf.errors import Refused
from rlhf.rewards.protocols import JudgeError
from rlhf.types import Verdict
from tests.rlhf.rewards.asking import ctr_reward, hps_reward, score
from tests.serve_apps.conftest import ITEM, ROUNDING


def test_arrays_and_references_score_as_the_model_does(judges, models, picture):
    expected = score(hps_reward(models / "hps.pt", batch_rows=16), [picture], ["a cat"])[0]
    handle = serve.get_app_handle(judges.apps["hps"])
    same = pytest.approx(expected, rel=0, abs=ROUNDING)
    assert handle.score.remote(picture, "a cat").result(timeout_s=60) == same
    assert handle.score.remote(ray.put(picture), "a cat", (), {}).result(timeout_s=60) == same
    assert handle.score.remote(media=ray.put(picture[None]), prompt="a cat").result(timeout_s=60) == same


def test_of_a_video_the_frame_in_its_middle_is_scored(judges, models, picture):
    expected = score(hps_reward(models / "hps.pt", batch_rows=16), [picture], ["a cat"])[0]
    video = ray.put(np.stack([255 - picture] * 2 + [picture] + [255 - picture] * 2))
    found = serve.get_app_handle(judges.apps["hps"]).score.remote(video, "a cat").result(timeout_s=60)
    assert found == pytest.approx(expected, rel=0, abs=ROUNDING)
    verdict = (
        serve.get_app_handle(judges.apps["filter"]).judge.remote(video, (picture[None],), "warmer").result(timeout_s=60)
    )
    assert verdict.raw_response == "FAIL"


def test_a_judge_tells_whether_it_reads_sources(judges):
    for name in ("hps", "ctr"):
        assert serve.get_app_handle(judges.apps[name]).reads_sources.remote().result(timeout_s=60) is False


def test_forty_at_once_are_each_their_own(judges, models):
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8) for i in range(40)]
    prompts = [f"number {i}" for i in range(40)]
    expected = score(hps_reward(models / "hps.pt", batch_rows=16), pictures, prompts)

    async def ask():
        handle = serve.get_app_handle(judges.apps["hps"])
        calls = [handle.score.remote(ray.put(a), b) for a, b in zip(pictures, prompts, strict=True)]
        return await asyncio.gather(*calls)

    assert np.diff(sorted(expected)).min() > 2 * ROUNDING, "a mixed-up answer would not show"
    assert asyncio.run(ask()) == pytest.approx(expected, rel=0, abs=ROUNDING)


def test_ctr_needs_columns_of_the_item(judges, models, picture):
    handle = serve.get_app_handle(judges.apps["ctr"])
    expected = score(ctr_reward(models / "ctr", batch_rows=4), [picture], [""], [ITEM])[0]
    found = handle.score.remote(ray.put(picture), "", (), ITEM).result(timeout_s=60)
    assert found == pytest.approx(expected, rel=0, abs=ROUNDING)
    for item in (None, {}, {"price": "3"}):
        with pytest.raises(Refused, match="missing: food_name, food_type, city_name, shop_name"):
            handle.score.remote(picture, "", (), item).result(timeout_s=60)


def test_a_verdict_comes_back_whole(judges, picture):
    handle = serve.get_app_handle(judges.apps["filter"])
    verdict = handle.judge.remote(ray.put(picture), (picture, picture), "warmer").result(timeout_s=60)
    assert isinstance(verdict, Verdict) and verdict.raw_response == "FAIL" and verdict.reason == "Too dark."


def test_errors_keep_their_type(judges, picture):
    with pytest.raises(ValueError, match="not list"):
        serve.get_app_handle(judges.apps["hps"]).score.remote([ray.put(picture)], "x").result(timeout_s=60)
    with pytest.raises(ValueError, match="uint8"):
        serve.get_app_handle(judges.apps["hps"]).score.remote(picture / 255.0, "x").result(timeout_s=60)
    with pytest.raises(JudgeError, match="500"):
        serve.get_app_handle(judges.apps["filter"]).judge.remote(picture, (), "break").result(timeout_s=60)
    with pytest.raises(Refused, match="5 sources; the filter looks at 4"):
        serve.get_app_handle(judges.apps["filter"]).judge.remote(picture, (picture,) * 5, "").result(timeout_s=60)
