"""Judges: one async actor that asks the filter, then the rewards of what passed, and gathers one answer per candidate.

A judge is a deployment handle in this cluster or, with `judges.NAME.url`, an HTTP service that speaks the contract of the
seed's servers. Each call is retried with backoff; what still fails is a `Failure`, never a number and never a PASS.
Left out: batching (Serve's) and what a failure means for the run (`rlhf.algorithms.rollout`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from string import Formatter
from time import monotonic
from typing import Any

import ray
from ray import serve

from rlhf.config import OnlineDPOConfig
from rlhf.rewards.config import JudgeConfig
from rlhf.rewards.remote import RemoteJudge
from rlhf.types import Item, Prompt, Score, Verdict

Call = Callable[[ray.ObjectRef, str, Item | None], Awaitable[Verdict | float]]
"""(picture, text, item) → the filter's verdict or a reward."""

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
    """What the aesthetic reward reads: the instruction or, where it is empty, `reward.hps.empty_prompt` filled in."""
    if prompt.instruction.strip():
        return prompt.instruction
    fields = {field for _, field, _, _ in Formatter().parse(template) if field}
    if prompt.item is None and fields:
        raise ValueError(
            f"image_id {prompt.image_id!r} has an empty instruction and no item metadata, but reward.hps.empty_prompt = "
            f"{template!r} needs {sorted(fields)}; give data.item_metadata or a fixed text"
        )
    return template.format(**vars(prompt.item)) if prompt.item else template


def _over_http(name: str, config: JudgeConfig, timeout_s: float) -> Call:
    assert config.url is not None
    judge = RemoteJudge(name, config.url, token=config.token, timeout_s=timeout_s)

    async def call(reference: ray.ObjectRef, text: str, item: Item | None) -> Verdict | float:
        image = await reference
        return await (judge.judge(image, None, text) if name == "filter" else judge.score(image, text, item))

    return call


def _by_handle(name: str, app: str) -> Call:
    handle = serve.get_app_handle(app)

    async def call(reference: ray.ObjectRef, text: str, item: Item | None) -> Verdict | float:
        if name == "filter":
            return await handle.judge.remote(reference, None, text)
        return await handle.score.remote(reference, text, item)

    return call


class Judges:
    """`judge([image], prompt)` → Score, Failure or PixelsLost. Pictures pass through as references."""

    def __init__(self, config: OnlineDPOConfig, apps: dict[str, str]):
        self._config = config
        names = [*(["filter"] if config.judges.filter.enabled else []), *config.reward.names]
        self._calls: dict[str, Call] = {
            name: _by_handle(name, apps[name])
            if name in apps
            else _over_http(name, getattr(config.judges, name), config.judges.timeout_s)
            for name in names
        }
        self._places = {name: asyncio.Semaphore(self._limit(name)) for name in names}

    def _limit(self, name: str) -> int:
        """Calls to a judge at once: what its replicas take, so that waiting here never counts as their time."""
        judge = getattr(self._config.judges, name)
        return judge.replicas * judge.max_ongoing_requests

    async def judge(self, image: list[ray.ObjectRef], prompt: Prompt) -> Score | Failure | PixelsLost:
        """`image` is a list of one reference, so that Ray hands it on instead of fetching it here."""
        reference = image[0]
        try:
            verdict = ACCEPTED
            if self._config.judges.filter.enabled:
                verdict = await self._ask("filter", reference, prompt)
                if isinstance(verdict, Failure) or not verdict.valid:
                    return verdict if isinstance(verdict, Failure) else Score(verdict=verdict)
            names = self._config.reward.names
            answers = await asyncio.gather(*(self._ask(name, reference, prompt) for name in names))
        except (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError) as error:
            return PixelsLost(reason=str(error))
        for answer in answers:
            if isinstance(answer, Failure):
                return answer
        return Score(verdict=verdict, rewards=dict(zip(names, answers, strict=True)))

    async def _ask(self, name: str, image: ray.ObjectRef, prompt: Prompt) -> Any:
        judges = self._config.judges
        reason = ""
        for attempt in range(judges.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                text = prompt.instruction
                if name == "hps":
                    text = reward_text(prompt, self._config.reward.hps.empty_prompt)
                async with self._places[name]:
                    call = self._calls[name](image, text, prompt.item)
                    return await asyncio.wait_for(call, judges.timeout_s)
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
