"""Asking judges: a deployment handle in this cluster or, with a `url`, an HTTP service; retried, bounded, and honest.

Each call is retried with backoff; what still fails is a `Failure`, never a number and never a PASS. Left out: batching
(Serve's) and what a failure means for whoever asked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray import serve

from rlhf.rewards.config import JudgeConfig, JudgesConfig, ModelJudgeConfig
from rlhf.rewards.remote import RemoteJudge
from rlhf.types import Item, Verdict

AskReward = Callable[[ray.ObjectRef, str, Item | None], Awaitable[float]]
AskFilter = Callable[[ray.ObjectRef, np.ndarray | None, str], Awaitable[Verdict]]
"""(picture, source photo or none, instruction) → verdict."""

FIRST_BACKOFF_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A judge gave no usable answer after its retries."""

    judge: str
    reason: str


def _remote_reward(judge: JudgeConfig, timeout_s: float) -> AskReward:
    assert isinstance(judge, ModelJudgeConfig)  # the only kind that is asked elsewhere
    remote = RemoteJudge(judge, timeout_s=timeout_s)

    async def call(reference: ray.ObjectRef, text: str, item: Item | None) -> float:
        return await remote.score(await reference, text, item)

    return call


def _remote_filter(judge: ModelJudgeConfig, timeout_s: float) -> AskFilter:
    remote = RemoteJudge(judge, timeout_s=timeout_s)

    async def call(reference: ray.ObjectRef, source: np.ndarray | None, text: str) -> Verdict:
        return await remote.judge(await reference, source, text)

    return call


def _reward_handle(app: str) -> AskReward:
    handle = serve.get_app_handle(app)

    async def call(reference: ray.ObjectRef, text: str, item: Item | None) -> float:
        return await handle.score.remote(reference, text, item)

    return call


def _filter_handle(app: str) -> AskFilter:
    handle = serve.get_app_handle(app)

    async def call(reference: ray.ObjectRef, source: np.ndarray | None, text: str) -> Verdict:
        return await handle.judge.remote(reference, source, text)

    return call


class Asking:
    """Asks the judges of `names`, each with as many calls at once as its replicas take. Lives inside one event loop."""

    def __init__(self, judges: JudgesConfig, names: Sequence[str], apps: Mapping[str, str]):
        """apps: judge → Serve application, for those that this cluster runs; the others are asked at their `url`."""
        self._judges = judges
        self._rewards = {
            name: _reward_handle(apps[name]) if name in apps else _remote_reward(judges[name], judges.timeout_s)
            for name in names
            if name != "filter"
        }
        self._filter: AskFilter | None = None
        if "filter" in names:
            here = apps.get("filter")
            self._filter = _filter_handle(here) if here else _remote_filter(judges.filter, judges.timeout_s)
        # As many calls at once as replicas take, so that waiting here never counts as their time.
        self._places = {name: asyncio.Semaphore(judges[name].calls_at_once) for name in names}

    async def reward(self, name: str, image: ray.ObjectRef, text: str, item: Item | None) -> float | Failure:
        """The judge's score of a picture. Raises what Ray raises when the picture itself is lost."""
        return await self._ask(name, partial(self._rewards[name], image, text, item))

    async def verdict(self, image: ray.ObjectRef, source: np.ndarray | None, text: str) -> Verdict | Failure:
        """The filter's verdict on a picture; `source` is its source photo, where the filter is to see it."""
        assert self._filter is not None, "this run has no filter"
        return await self._ask("filter", partial(self._filter, image, source, text))

    async def _ask(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        judges = self._judges
        reason = ""
        for attempt in range(judges.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with self._places[name]:
                    return await asyncio.wait_for(call(), judges.timeout_s)
            except (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError):
                raise
            except TimeoutError:
                reason = f"no answer in judges.timeout_s = {judges.timeout_s:g} s"
            except Exception as error:  # whatever a judge does wrong is a failure with a reason, never a score
                reason = last_line(error)
        return Failure(judge=name, reason=f"{reason} (after {judges.retries + 1} tries)")


def last_line(error: Exception) -> str:
    """The last line of what went wrong: Ray's messages hold whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip() or repr(cause)).splitlines()[-1]}"


class Scorer:
    """An async actor that scores pictures by every judge of `names` and does not compare them."""

    def __init__(self, judges: JudgesConfig, names: Sequence[str], apps: Mapping[str, str]):
        self._names, self._asking = tuple(names), Asking(judges, names, apps)

    async def score(self, image: list[ray.ObjectRef], text: str, item: Item | None) -> dict[str, float | Failure]:
        """By judge; a judge without a usable answer gives a `Failure`. `image` is a list of one reference."""
        answers = await asyncio.gather(*(self._asking.reward(name, image[0], text, item) for name in self._names))
        return dict(zip(self._names, answers, strict=True))
