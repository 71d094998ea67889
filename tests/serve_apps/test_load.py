"""More load than a judge can take, and a replica that dies under it: every caller gets a right score or a typed error."""

import asyncio
import time
from collections import Counter
from functools import partial

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError

from rlhf.data.media import encode_base64
from tests.processes import ray_processes
from tests.rlhf.rewards.asking import hps_reward, score
from tests.serve_apps.conftest import ROUNDING, TOKEN, config, down, up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REQUESTS, SIDE = 2000, 640
LIMITS = {"max_batch_size": 8, "max_ongoing_requests": 16, "max_queued_requests": 16}
MIB = 2**20
SCORE, REFUSED, DIED = "a score", "refused: try again later", "the replica died"


class World:
    """A judge under load, the pictures it is asked about, and what it must say of each."""

    def __init__(self, deployed, models):
        self.app = deployed.apps["hps"]
        self.handle = serve.get_app_handle(deployed.apps["hps"])
        self.url = f"{deployed.url}/hpsv2/score"
        # Blocks of colour: small files whose decoding and resizing cost the replica far more than the proxy and us.
        blocks = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
        pictures = list(blocks.repeat(SIDE // 8, axis=1).repeat(SIDE // 8, axis=2))
        prompts = [f"dish {index}" for index in range(len(pictures))]
        reward = hps_reward(models / "hps.pt", batch_rows=LIMITS["max_batch_size"])
        self.scores = score(reward, pictures, prompts)
        assert np.diff(sorted(self.scores)).min() > 2 * ROUNDING, "a mixed-up answer would not show"
        self.questions = [(ray.put(picture), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        self.bodies = [
            {"image_base64": encode_base64(picture), "prompt": prompt}
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]

    async def http(self, client, number):
        """How the request ended; what is neither a right score nor documented fails the test."""
        which = number % len(self.scores)
        response = await client.post(self.url, json=self.bodies[which])
        if response.status_code == 200:
            assert response.json() == {"score": pytest.approx(self.scores[which], rel=0, abs=ROUNDING)}
            return SCORE
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            return REFUSED
        assert response.status_code == 500, response.text
        return DIED

    async def handles(self, client, number):
        which = number % len(self.scores)
        try:
            found = await self.handle.score.remote(*self.questions[which])
        except BackPressureError:
            return REFUSED
        except RayActorError:
            return DIED
        assert found == pytest.approx(self.scores[which], rel=0, abs=ROUNDING)
        return SCORE

    def pid(self):
        """Of the replica that runs, as far as Serve knows."""
        deployments = _get_global_client().get_serve_details()["applications"][self.app]["deployments"]
        return next((r["pid"] for r in deployments["hps"]["replicas"] if r["state"] == "RUNNING"), None)


@pytest.fixture(scope="module")
def world(cluster, models):
    run = config(models, reward="hps", hps=LIMITS, route_prefix="/load")
    yield World(up(run, "load"), models)
    down("load")


def http_client():
    """As many connections as there are requests: none waits in the client."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=LIMITS["max_ongoing_requests"])
    return httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, limits=limits, timeout=120)


async def in_turn(ask, callers, over):
    """Counts of how the requests of `callers` ended, each asking again when answered, until `over()`."""
    ended = Counter()

    async def call(number):
        while not over():
            ended[await ask(number)] += 1
            number += callers

    await asyncio.gather(*[call(number) for number in range(callers)])
    return ended


def mib(sizes):
    return [size // MIB for size in sizes]


def passed(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.mark.parametrize("way", ["http", "handles"])
def test_twice_the_capacity(world, way):
    (proxy,) = ray_processes("Proxy")
    watched = [psutil.Process(world.pid()), proxy]

    async def flood():
        async with http_client() as client:

            def ask(number):
                return getattr(world, way)(client, number)

            callers = LIMITS["max_ongoing_requests"]
            await in_turn(ask, callers, passed(1))
            capacity = (await in_turn(ask, callers, passed(3)))[SCORE] / 3
            started = time.monotonic()

            async def at_its_time(number):
                await asyncio.sleep(started + number / (2 * capacity) - time.monotonic())
                return await ask(number)

            requests = [asyncio.create_task(at_its_time(number)) for number in range(REQUESTS)]
            await asyncio.gather(*requests[: REQUESTS // 2])
            halfway = [process.memory_info().rss for process in watched]
            ended = Counter(await asyncio.gather(*requests))
            end = [process.memory_info().rss for process in watched]
            left = (await in_turn(ask, callers, passed(3)))[SCORE] / 3 / capacity
            print(f"{way}: {capacity:.0f} a second alone, {left:.2f} of that after; twice that: {dict(ended)}")
            print(f"MiB {mib(halfway)} → {mib(end)}")
            return ended, halfway, end, left

    ended, halfway, end, left = asyncio.run(flood())
    assert set(ended) == {SCORE, REFUSED} and ended.total() == REQUESTS
    # What other work leaves of the machine may have changed since the capacity was measured, so it is measured again after.
    assert ended[SCORE] > REQUESTS / 5 * min(1, left), "half could be answered: an overloaded judge goes on"
    for before, after in zip(halfway, end, strict=True):
        assert after < before + 32 * MIB, "memory grew while a thousand requests came and went"


def test_a_replica_that_dies_under_load_is_replaced_and_no_caller_left_in_the_dark(world):
    old = world.pid()

    async def until_replaced():
        deadline = time.monotonic() + 120
        answered, replaced = 0, asyncio.Event()

        async def kill_and_wait():
            while answered < 50:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            psutil.Process(old).kill()
            while (await asyncio.to_thread(world.pid)) in (old, None):
                assert time.monotonic() < deadline, "Serve did not bring the replica back"
                await asyncio.sleep(0.2)
            replaced.set()

        async def ask(way, number):
            nonlocal answered
            end = await way(client, number)
            answered += end == SCORE
            if replaced.is_set():
                after[end] += 1
            return end

        def over():
            return after[SCORE] >= 50 or time.monotonic() > deadline

        after = Counter()
        async with http_client() as client:
            callers = LIMITS["max_ongoing_requests"]
            ways = [in_turn(partial(ask, way), callers, over) for way in (world.http, world.handles)]
            *ended, _ = await asyncio.gather(*ways, kill_and_wait())
        return ended, after

    (by_http, by_handle), after = asyncio.run(until_replaced())
    print(f"http: {dict(by_http)}; handles: {dict(by_handle)}; once it was replaced: {dict(after)}")
    assert by_http[DIED] + by_handle[DIED] >= 1, "nothing was in flight: the test saw no death"
    assert after[SCORE] >= 50 and set(after) <= {SCORE, REFUSED, DIED}
