"""Judges: one async actor that asks the filter, then the rewards of what passed, and gathers one answer per candidate.

A judge is a deployment handle in this cluster or, with a `url`, an HTTP service. Each call is retried with backoff; what
still fails is a `Failure`, never a number and never a PASS. Left out: batching (Serve's) and what a failure means for
the run (`rlhf.algorithms.rollout`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from time import monotonic
from typing import Any

import numpy as np
import ray
from ray import serve

from rlhf.config import OnlineDPOConfig
from rlhf.data.images import load_image
from rlhf.rewards.config import JudgeConfig, ModelJudgeConfig
from rlhf.rewards.remote import RemoteJudge
from rlhf.types import Item, Prompt, Score, Verdict

AskReward = Callable[[ray.ObjectRef, str, Item | None], Awaitable[float]]
AskFilter = Callable[[ray.ObjectRef, np.ndarray | None, str], Awaitable[Verdict]]
"""(picture, source photo or none, instruction) → verdict."""

FIRST_BACKOFF_S = 0.5
FETCH_TIMEOUT_S = 60.0
SILENT = 3.0
"""Times the timeouts and retries of one judge: a candidate asks the filter and then the rewards, with backoffs."""
ACCEPTED = Verdict(valid=True, reason="no filter", raw_response="")
"""The verdict where `judges.filter.enabled = false`."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A judge gave no usable answer after its retries."""

    judge: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PixelsLost:
    """The candidate's picture is gone from the object store: it has to be sampled again."""

    reason: str


def reward_text(prompt: Prompt, template: str) -> str:
    """What rewards read: the instruction or, where it is empty, `reward.hps.empty_prompt` filled in."""
    if prompt.instruction.strip():
        return prompt.instruction
    fields = {field for _, field, _, _ in Formatter().parse(template) if field}
    if prompt.item is None and fields:
        raise ValueError(
            f"image_id {prompt.image_id!r} has an empty instruction and no item metadata, but reward.hps.empty_prompt = "
            f"{template!r} needs {sorted(fields)}; give data.item_metadata or a fixed text"
        )
    return template.format(**vars(prompt.item)) if prompt.item else template


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


class Judges:
    """`judge([image], prompt)` → Score, Failure or PixelsLost. Pictures pass through as references."""

    def __init__(self, config: OnlineDPOConfig, apps: dict[str, str]):
        """apps: judge → Serve application, for those that this cluster runs."""
        self._config, judges = config, config.judges
        self._rewards = {
            name: _reward_handle(apps[name]) if name in apps else _remote_reward(judges[name], judges.timeout_s)
            for name in config.reward.names
        }
        self._filter = None
        if judges.filter.enabled:
            here = apps.get("filter")
            self._filter = _filter_handle(here) if here else _remote_filter(judges.filter, judges.timeout_s)
        # As many calls at once as replicas take, so that waiting here never counts as their time.
        self._places = {name: asyncio.Semaphore(judges[name].calls_at_once) for name in config.judge_names}
        self._source = lru_cache(256)(self._load_source)

    def _load_source(self, prompt: Prompt) -> np.ndarray:
        return load_image(prompt.image, prompt.height, prompt.width, self._config.data.fit)

    async def judge(self, image: list[ray.ObjectRef], prompt: Prompt) -> Score | Failure | PixelsLost:
        """`image` is a list of one reference, so that Ray hands it on instead of fetching it here."""
        reference = image[0]
        try:
            verdict = ACCEPTED
            if self._filter is not None:
                verdict = await self._ask("filter", self._verdict, reference, prompt)
                if isinstance(verdict, Failure) or not verdict.valid:
                    return verdict if isinstance(verdict, Failure) else Score(verdict=verdict)
            names = self._config.reward.names
            answers = await asyncio.gather(*(self._ask(name, self._reward(name), reference, prompt) for name in names))
        except (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError) as error:
            return PixelsLost(reason=str(error))
        for answer in answers:
            if isinstance(answer, Failure):
                return answer
        return Score(verdict=verdict, rewards=dict(zip(names, answers, strict=True)))

    async def _verdict(self, image: ray.ObjectRef, prompt: Prompt) -> Verdict:
        assert self._filter is not None
        source = await asyncio.to_thread(self._source, prompt) if self._config.judges.filter.send_source else None
        return await self._filter(image, source, prompt.instruction)

    def _reward(self, name: str) -> Callable[[ray.ObjectRef, Prompt], Awaitable[float]]:
        async def ask(image: ray.ObjectRef, prompt: Prompt) -> float:
            reads = self._config.judges[name].reads_prompt
            text = reward_text(prompt, self._config.reward.hps.empty_prompt) if reads else prompt.instruction
            return await self._rewards[name](image, text, prompt.item)

        return ask

    async def _ask(
        self, name: str, call: Callable[[ray.ObjectRef, Prompt], Awaitable[Any]], image: ray.ObjectRef, prompt: Prompt
    ) -> Any:
        judges = self._config.judges
        reason = ""
        for attempt in range(judges.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with self._places[name]:
                    return await asyncio.wait_for(call(image, prompt), judges.timeout_s)
            except (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError):
                raise
            except TimeoutError:
                reason = f"no answer in judges.timeout_s = {judges.timeout_s:g} s"
            except Exception as error:  # whatever a judge does wrong is a failure with a reason, never a score
                cause = getattr(error, "cause", None) or error
                reason = (
                    f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else cause!r}"
                )
        return Failure(judge=name, reason=f"{reason} (after {judges.retries + 1} tries)")


class JudgesLost(RuntimeError):
    """The judging actor failed more often than samplers.max_restarts allows."""


class JudgeCalls:
    """The driver's side: asks a judging actor about pictures, and replaces it when it dies or falls silent.

    `waiting` is the driver's table of references and their handlers; `pending` counts the pictures being judged.
    """

    def __init__(
        self,
        config: OnlineDPOConfig,
        new_actor: Callable[[], ray.actor.ActorHandle],
        waiting: dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]],
    ):
        self._config, self._new_actor, self._waiting = config, new_actor, waiting
        self._actor = new_actor()
        self._answered = monotonic()
        self._restarts = self.pending = 0

    def ask(self, image: ray.ObjectRef, prompt: Prompt, done: Callable[[Any], None]) -> None:
        """Judge one picture; `done` gets the answer or, when the actor died, the exception."""
        actor = self._actor
        if not self.pending:
            self._answered = monotonic()
        self.pending += 1

        def answered(reference: ray.ObjectRef) -> None:
            self.pending -= 1
            self._answered = monotonic()
            try:
                answer = ray.get(reference, timeout=FETCH_TIMEOUT_S)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                if actor is self._actor:
                    self._replace(str(error))
                answer = error
            done(answer)

        self._waiting[actor.judge.remote([image], prompt)] = answered

    def watch(self) -> None:
        """Condemn an actor that has answered nothing for longer than its slowest candidate can take."""
        judges, silent = self._config.judges, monotonic() - self._answered
        if self.pending and silent > SILENT * judges.timeout_s * (judges.retries + 1):
            self._answered = monotonic()
            self._replace(f"no answer to any of {self.pending} candidates for {silent:.0f} s")

    def _replace(self, reason: str) -> None:
        self._restarts += 1
        if self._restarts > self._config.samplers.max_restarts:
            raise JudgesLost(f"the judging actor failed {self._restarts} times; the last: {reason}")
        ray.kill(self._actor)
        self._actor = self._new_actor()

    def close(self) -> None:
        ray.kill(self._actor)
