"""Batches fill, keep their order, and one unusable score fails its own request and no other."""

import asyncio
import math

import numpy as np
import pytest
from ray import serve

from rlhf.rewards.config import JudgeConfig
from rlhf.rewards.reward import JudgeError, checked_scores
from serve_apps.batcher import Batcher, options


class Redness:
    """A real reward of the pixels that has no number for blue pictures and breaks on green ones."""

    name, version, device = "redness", "1", "cpu"

    def __init__(self):
        self.batches = []

    def score(self, images, prompts, items):
        self.batches.append(len(images))
        means = [image.mean((0, 1)) for image in images]
        if any(mean[1] > 200 for mean in means):
            raise OSError("the device is gone")
        return checked_scores(self.name, [math.nan if m[2] > 200 else float(m[0]) for m in means], len(images))


class RednessApp:
    """The shape of the real apps around a reward that tells its batches."""

    def __init__(self):
        self.batcher = Batcher(Redness(), max_batch_size=8, batch_wait_s=0.5)
        self.probed = []

    async def score(self, image):
        return await self.batcher.score(image, "", None)

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
    judge = JudgeConfig(num_cpus=0.1, max_batch_size=8, max_ongoing_requests=64)
    deployment = serve.deployment(**options("Redness", judge))(RednessApp)
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
