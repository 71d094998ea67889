"""Single requests → full batches of a `Reward`, off the event loop; with the health probe and a deployment's options.

One thread does all torch work of a replica and takes its next batch when it has finished the last, so that requests fill
batches while the model is busy. `serve.batch` cuts them by the clock even then: 64 callers got half-full batches.
"""

import asyncio
import time
from collections import defaultdict
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from rlhf.errors import Refused
from rlhf.rewards.config import CTRJudgeConfig, JudgeConfig
from rlhf.rewards.protocols import JudgeError, JudgeUnreachable, Reward, Sources, check_batch
from rlhf.types import Item
from serve_apps.metrics import JudgeMetrics

PROBE_AGE_S = 20.0
"""A forward that succeeded this recently proves health, unless one has failed since; otherwise the probe does its own."""

Request = tuple[np.ndarray, str, Sources, Item]
"""Medium (F, H, W, 3), prompt, sources, item."""

_GREY = np.full((1, 32, 32, 3), 128, dtype=np.uint8)
_ITEM = defaultdict(lambda: "probe", dict.fromkeys(CTRJudgeConfig.item_columns, "probe"))
_PROBE: Request = (_GREY, "probe", (_GREY,), _ITEM)
"""The request that warms a model up and checks its health; its item has every column that is read."""


class Batcher:
    """Feeds a reward in batches of up to `max_batch_size`; a free model waits at most `batch_wait_s` for one to fill."""

    def __init__(self, reward: Reward, *, max_batch_size: int, batch_wait_s: float) -> None:
        self.reward = reward
        self._max_batch_size, self._batch_wait_s = max_batch_size, batch_wait_s
        self._queue: SimpleQueue[tuple[Request, Future[float]]] = SimpleQueue()
        self._worked_at = float("-inf")
        self._metrics = JudgeMetrics(reward.name)
        Thread(target=self._work, name=reward.name, daemon=True).start()

    async def score(self, medium: np.ndarray, prompt: str, sources: Sources, item: Item) -> float:
        """The reward of one medium. Raises: Refused for a bad request, JudgeError where no usable number came."""
        check_batch([medium], [prompt], [sources], [item])
        with self._metrics.request():
            return await self._enqueue((medium, prompt, sources, item))

    def warm_up(self) -> None:
        """One full batch, so that the first callers do not pay for what a model does once."""
        self.reward.score(*zip(*[_PROBE] * self._max_batch_size, strict=True))

    async def probe(self) -> None:
        """Raise unless the model has answered within `PROBE_AGE_S` or answers now, through the same path."""
        if time.monotonic() - self._worked_at > PROBE_AGE_S:
            await self._enqueue(_PROBE)

    async def _enqueue(self, request: Request) -> float:
        answer: Future[float] = Future()
        self._queue.put((request, answer))
        return await asyncio.wrap_future(answer)

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            deadline = time.monotonic() + self._batch_wait_s
            with suppress(Empty):
                while len(batch) < self._max_batch_size:
                    batch.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            # Without those whose callers have gone away.
            if wanted := [one for one in batch if one[1].set_running_or_notify_cancel()]:
                self._score(wanted)

    def _score(self, batch: list[tuple[Request, Future[float]]]) -> None:
        """Answer every request of a batch, each with its score or with why it has none."""
        if rows := sum(request is not _PROBE for request, _ in batch):
            self._metrics.rows.observe(rows)
        try:
            media, prompts, sources, items = zip(*(request for request, _ in batch), strict=True)
            scores = self.reward.score(media, prompts, sources, items)
        except Exception as error:
            self._worked_at = float("-inf")
            unreachable = isinstance(error, JudgeUnreachable)
            apart = len(batch) > 1 and isinstance(error, JudgeError | Refused) and not unreachable
            for one in batch:
                if apart:
                    self._score([one])  # so that only the bad request fails
                else:
                    one[1].set_exception(error)
        else:
            self._worked_at = time.monotonic()
            for (_, answer), score in zip(batch, scores, strict=True):
                answer.set_result(score)


def options(name: str, judge: JudgeConfig) -> dict[str, Any]:
    """Keyword arguments of `serve.deployment` that every judge shares."""
    replicas: dict[str, Any] = {"num_replicas": judge.replicas}
    if judge.max_replicas is not None:
        target = judge.target_ongoing_requests or 2.0 * judge.max_batch_size
        limits = {"min_replicas": judge.replicas, "max_replicas": judge.max_replicas}
        replicas = {"autoscaling_config": limits | {"target_ongoing_requests": target}}
    # A full replica is looked at again every 20 ms. Serve's own wait grows to half a second, in which a free replica idles
    # while callers are turned away: at twice the capacity a judge then answered a quarter of what it could.
    router = RequestRouterConfig(initial_backoff_s=0.02, max_backoff_s=0.02)
    return replicas | {
        "name": name,
        "ray_actor_options": {"num_cpus": judge.num_cpus, "num_gpus": judge.num_gpus},
        "max_ongoing_requests": judge.max_ongoing_requests,
        "max_queued_requests": judge.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=1),
        "request_router_config": router,
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 10,
        "max_constructor_retry_count": 2,
    }
