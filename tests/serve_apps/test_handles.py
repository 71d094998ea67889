"""Deployment handles: what arrives in the replica, that batches do not change a score, and what errors look like."""

import asyncio

import numpy as np
import pytest
import ray

from rlhf.errors import Refused
from rlhf.rewards.ctr.model import CTRReward
from rlhf.rewards.hpsv2 import HPSv2Reward
from rlhf.rewards.protocols import JudgeError
from rlhf.types import Verdict
from tests.serve_apps.conftest import ITEM


def test_arrays_and_references_score_as_the_model_does(judges, models, picture):
    expected = HPSv2Reward(models / "hps.pt", batch_rows=16).score([picture], ["a cat"], [None])[0]
    handle = judges.handle("hps")
    assert handle.score.remote(picture, "a cat", None).result(timeout_s=60) == expected
    assert handle.score.remote(ray.put(picture), "a cat", None).result(timeout_s=60) == expected
    assert handle.score.remote(image=ray.put(picture), prompt="a cat").result(timeout_s=60) == expected


def test_forty_at_once_are_each_their_own(judges, models):
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8) for i in range(40)]
    prompts = [f"number {i}" for i in range(40)]
    expected = HPSv2Reward(models / "hps.pt", batch_rows=16).score(pictures, prompts, [None] * 40)

    async def ask():
        handle = judges.handle("hps")
        calls = [handle.score.remote(ray.put(a), b, None) for a, b in zip(pictures, prompts, strict=True)]
        return await asyncio.gather(*calls)

    assert asyncio.run(ask()) == expected


def test_ctr_needs_an_item(judges, models, picture):
    handle = judges.handle("ctr")
    expected = CTRReward(models / "ctr", batch_rows=4).score([picture], [""], [ITEM])[0]
    assert handle.score.remote(ray.put(picture), "", ITEM).result(timeout_s=60) == expected
    with pytest.raises(Refused, match="needs the item"):
        handle.score.remote(picture, "", None).result(timeout_s=60)


def test_a_verdict_comes_back_whole(judges, picture):
    verdict = judges.handle("filter").judge.remote(ray.put(picture), ray.put(picture), "warmer").result(timeout_s=60)
    assert isinstance(verdict, Verdict) and verdict.raw_response == "FAIL" and verdict.reason == "Too dark."


def test_errors_keep_their_type(judges, picture):
    with pytest.raises(ValueError, match="not list"):
        judges.handle("hps").score.remote([ray.put(picture)], "x", None).result(timeout_s=60)
    with pytest.raises(ValueError, match="uint8"):
        judges.handle("hps").score.remote(picture / 255.0, "x", None).result(timeout_s=60)
    with pytest.raises(JudgeError, match="500"):
        judges.handle("filter").judge.remote(picture, None, "break").result(timeout_s=60)
