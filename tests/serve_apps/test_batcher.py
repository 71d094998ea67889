"""Batches fill, keep their order, and one unusable score fails its own request and no other."""

import asyncio
import math
import threading

import numpy as np
import pytest
from ray import serve

from rlhf.errors import Refused
from rlhf.rewards.config import PythonJudgeConfig
from rlhf.rewards.protocols import JudgeError, Reward
from serve_apps.batcher import Batcher, options


class Redness(Reward):
    """A real reward of the pixels that has no number for blue pictures and breaks on green ones."""

    name, version, device = "redness", "1", "cpu"

    def __init__(self):
        self.batches = []

    def _scores(self, media, prompts, sources, items):
        self.batches.append(len(media))
        means = [medium.mean((0, 1, 2)) for medium in media]
        if any(mean[1] > 200 for mean in means):
            raise OSError("the device is gone")
        return [math.nan if m[2] > 200 else float(m[0]) for m in means]


class RednessApp:
    """The shape of the real apps around a reward that tells its batches."""

    def __init__(self):
        self.batcher = Batcher(Redness(), max_batch_size=8, batch_wait_s=0.5)
        self.probed = []

    async def score(self, image):
        return await self.batcher.score(image[None], "", (), {})

    async def probe_twice(self):
        """Batches that two probes in a row ran."""
        self.batcher.reward.batches.clear()
        self.batcher._worked_at = float("-inf")
        await self.batcher.probe()
        await self.batcher.probe()
        return list(self.batcher.reward.batches)

    async def batches(self):
        return list(self.batcher.reward.batches)


@pytest.fixture(scope="module")
def app(cluster):
    sizes = judge(num_cpus=0.1, max_batch_size=8, max_ongoing_requests=64)
    deployment = serve.deployment(**options("Redness", sizes))(RednessApp)
    handle = serve.run(deployment.bind(), name="redness", route_prefix=None)
    yield handle
    serve.delete("redness", _blocking=False)


def flat(red, green=0, blue=0):
    return np.full((4, 4, 3), (red, green, blue), np.uint8)


def gather(app, pictures):
    async def ask():
        return await asyncio.gather(*[app.score.remote(picture) for picture in pictures], return_exceptions=True)

    return asyncio.run(ask())


def test_batches_fill_and_keep_order(app):
    assert gather(app, [flat(red) for red in range(40)]) == list(map(float, range(40)))
    batches = app.batches.remote().result(timeout_s=30)
    assert max(batches) == 8 and sum(batches) == 40 and len(batches) <= 7


def test_only_the_guilty_request_fails(app):
    a, b, c, d = gather(app, [flat(1), flat(2, blue=255), flat(3), flat(4)])
    assert (a, c, d) == (1.0, 3.0, 4.0) and isinstance(b, JudgeError) and "nan" in str(b)


def test_a_crash_is_an_error_for_everyone_and_no_score(app):
    found = gather(app, [flat(1), flat(2, green=255)])
    assert isinstance(found[1], OSError) and (found[0] == 1.0 or isinstance(found[0], OSError))


def test_the_probe_does_one_real_forward(app):
    assert app.probe_twice.remote().result(timeout_s=30) == [1]


class Gated:
    """A reward whose forwards wait for a ticket each, so that a test decides what comes while the model is busy."""

    name, version, device = "gated", "1", "cpu"

    def __init__(self):
        self.tickets, self.entered, self.batches = threading.Semaphore(0), threading.Semaphore(0), []

    def score(self, media, prompts, sources, items):
        self.entered.release()
        assert self.tickets.acquire(timeout=30)
        self.batches.append(list(prompts))
        if "bad" in prompts:
            raise Refused("this prompt cannot be read")
        return [float(prompt) for prompt in prompts]


@pytest.fixture
def gated():
    reward = Gated()
    return reward, Batcher(reward, max_batch_size=4, batch_wait_s=0.0)


def ask(batcher, *prompts):
    return [asyncio.create_task(batcher.score(flat(0)[None], str(prompt), (), {})) for prompt in prompts]


def test_what_comes_while_the_model_is_busy_fills_the_next_batches(gated):
    """However slowly it comes: the wait for a batch to fill is 0 s here."""
    reward, batcher = gated

    async def run():
        first = ask(batcher, 0)
        await asyncio.to_thread(reward.entered.acquire)
        later = []
        for number in range(1, 7):
            later += ask(batcher, number)
            await asyncio.sleep(0)
        reward.tickets.release(3)
        return await asyncio.gather(*first, *later)

    assert asyncio.run(run()) == list(range(7))
    assert reward.batches == [["0"], ["1", "2", "3", "4"], ["5", "6"]]


def test_a_caller_that_went_away_costs_no_forward(gated):
    reward, batcher = gated

    async def run():
        first = ask(batcher, 0)
        await asyncio.to_thread(reward.entered.acquire)
        gone, *stayed = ask(batcher, 1, 2, 3)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        await asyncio.sleep(0)  # the news reaches the queue
        reward.tickets.release(2)
        return await asyncio.gather(*first, *stayed)

    assert asyncio.run(run()) == [0, 2, 3]
    assert reward.batches == [["0"], ["2", "3"]]


def test_a_request_that_cannot_be_read_spoils_no_other(gated):
    reward, batcher = gated

    async def run():
        first = ask(batcher, 0)
        await asyncio.to_thread(reward.entered.acquire)
        rest = ask(batcher, 1, "bad", 2)
        await asyncio.sleep(0)
        reward.tickets.release(5)
        return await asyncio.gather(*first, *rest, return_exceptions=True)

    zero, one, bad, two = asyncio.run(run())
    assert (zero, one, two) == (0, 1, 2) and isinstance(bad, Refused)


def judge(**settings):
    return PythonJudgeConfig(function="m:f", **settings)


def test_replicas_scale_only_where_a_range_is_given():
    fixed = options("x", judge(replicas=3))
    assert fixed["num_replicas"] == 3 and "autoscaling_config" not in fixed
    scaled = options("x", judge(replicas=2, max_replicas=5, max_batch_size=8))
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 16.0}
    target = options("x", judge(max_replicas=2, target_ongoing_requests=3.5))["autoscaling_config"]
    assert target == {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3.5}


def test_the_recipe_sizes_the_deployment():
    given = options("x", judge(num_cpus=0.5, num_gpus=0.25, max_ongoing_requests=40, max_queued_requests=7))
    made = serve.deployment(**given)(RednessApp)
    assert made.ray_actor_options["num_cpus"] == 0.5 and made.ray_actor_options["num_gpus"] == 0.25
    assert made.max_ongoing_requests == 40 and made.max_queued_requests == 7
    refusal = made._deployment_config.backpressure_config
    assert refusal.status_code == 503 and refusal.retry_after_s == 1
