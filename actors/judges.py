"""Judges: one async actor that asks the filter, then the rewards of what passed, and gathers one answer per candidate.

`actors.asking` does the asking. Left out: what a failure means for the run (`rlhf.rollouts.rollout`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from time import monotonic
from typing import Any

import numpy as np
import ray

from actors.asking import Asking, Failure
from rlhf.data.media import load_image
from rlhf.errors import Refused
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Prompt, Score, Verdict

FETCH_TIMEOUT_S = 60.0
SILENT = 3.0
"""Times the timeouts and retries of one judge: a candidate asks the filter and then the rewards, with backoffs."""
ACCEPTED = Verdict(valid=True, reason="no filter", raw_response="")
"""The verdict where `judges.filter.enabled = false`."""


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
        raise Refused(
            f"image_id {prompt.image_id!r} has an empty instruction and no item metadata, but reward.hps.empty_prompt = "
            f"{template!r} needs {sorted(fields)}; give data.item_metadata or a fixed text"
        )
    try:
        return template.format(**vars(prompt.item)) if prompt.item else template
    except KeyError as error:
        raise Refused(
            f"reward.hps.empty_prompt = {template!r} names {error}; an item has {', '.join(vars(prompt.item))}"
        ) from error


class Judges:
    """`judge([image], prompt)` → Score, Failure or PixelsLost. Pictures pass through as references."""

    def __init__(self, config: OnlineDPOConfig, apps: dict[str, str]):
        """apps: judge → Serve application, for those that this cluster runs."""
        self._config = config
        self._asking = Asking(config.judges, config.judge_names, apps)
        self._source = lru_cache(256)(self._load_source)

    def _load_source(self, prompt: Prompt) -> np.ndarray:
        return load_image(prompt.image, prompt.height, prompt.width, self._config.data.fit)

    async def judge(self, image: list[ray.ObjectRef], prompt: Prompt) -> Score | Failure | PixelsLost:
        """`image` is a list of one reference, so that Ray hands it on instead of fetching it here."""
        reference, names = image[0], self._config.reward.names
        try:
            verdict = await self._verdict(reference, prompt)
            if isinstance(verdict, Failure):
                return verdict
            if not verdict.valid:
                return Score(verdict=verdict)
            answers = await asyncio.gather(*(self._reward(name, reference, prompt) for name in names))
        except (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError) as error:
            return PixelsLost(reason=str(error))
        rewards: dict[str, float] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, Failure):
                return answer
            rewards[name] = answer
        return Score(verdict=verdict, rewards=rewards)

    async def _verdict(self, image: ray.ObjectRef, prompt: Prompt) -> Verdict | Failure:
        if not self._config.judges.filter.enabled:
            return ACCEPTED
        source = None
        if self._config.judges.filter.send_source:
            try:
                source = await asyncio.to_thread(self._source, prompt)
            except (OSError, Refused) as error:
                return Failure(judge="filter", reason=f"the source photo {prompt.image} is gone: {error}")
        return await self._asking.verdict(image, source, prompt.instruction)

    async def _reward(self, name: str, image: ray.ObjectRef, prompt: Prompt) -> float | Failure:
        reads = self._config.judges[name].reads_prompt
        text = reward_text(prompt, self._config.reward.hps.empty_prompt) if reads else prompt.instruction
        return await self._asking.reward(name, image, text, prompt.item)


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
