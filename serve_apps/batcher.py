"""Single requests → batches of a `Reward`, off the event loop; with the health probe and the options of a deployment.

One thread does all torch work of a replica, so the event loop stays free to collect the next batch, and a batch that
contains one bad picture fails for that picture only.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.serve.config import BackpressureConfig

from rlhf.rewards.config import JudgeConfig
from rlhf.rewards.images import check_array
from rlhf.rewards.reward import JudgeError, Reward
from rlhf.types import Item

PROBE_AGE_S = 20.0
"""A forward that succeeded this recently proves health; otherwise the probe does one of its own."""

_PROBE_IMAGE = np.full((32, 32, 3), 128, dtype=np.uint8)
_PROBE_ITEM = Item(food_name="probe", food_type="probe", city_name="probe", shop_name="probe")


class Batcher:
    """Feeds a reward in batches of up to `max_batch_size`, waiting at most `batch_wait_s` for a batch to fill."""

    def __init__(self, reward: Reward, *, max_batch_size: int, batch_wait_s: float) -> None:
        self.reward = reward
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=reward.name)
        self._worked_at = float("-inf")

        @serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=batch_wait_s)
        async def score_batch(requests: list[tuple[np.ndarray, str, Item | None]]) -> list[float | JudgeError]:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, requests)

        self._score_batch = score_batch

    async def score(self, image: np.ndarray, prompt: str, item: Item | None) -> float:
        """The reward of one picture. Raises: ValueError for a bad array, JudgeError where no usable number came."""
        check_array(image)
        score = await self._score_batch((image, prompt, item))
        if isinstance(score, JudgeError):
            raise score
        return score

    async def probe(self) -> None:
        """Raise unless the model has answered within `PROBE_AGE_S` or answers now, through the same path."""
        if time.monotonic() - self._worked_at > PROBE_AGE_S:
            await self.score(_PROBE_IMAGE, "probe", _PROBE_ITEM)

    def _score(self, requests: list[tuple[np.ndarray, str, Item | None]]) -> list[float | JudgeError]:
        images, prompts, items = zip(*requests, strict=True)
        try:
            scores: list[float | JudgeError] = list(self.reward.score(images, prompts, items))
        except JudgeError as error:
            if len(requests) == 1:
                return [error]
            return [self._score([request])[0] for request in requests]  # only the guilty one fails
        self._worked_at = time.monotonic()
        return scores


def options(name: str, judge: JudgeConfig) -> dict[str, Any]:
    """Keyword arguments of `serve.deployment` that every judge shares."""
    return {
        "name": name,
        "num_replicas": judge.replicas,
        "ray_actor_options": {"num_cpus": judge.num_cpus, "num_gpus": judge.num_gpus},
        "max_ongoing_requests": judge.max_ongoing_requests,
        "max_queued_requests": judge.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=1),
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 10,
        "max_constructor_retry_count": 2,
    }
