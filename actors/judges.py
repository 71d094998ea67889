"""The judging actor: it asks the filter, then the rewards of what passed, and gathers one answer per medium.

A judge is a deployment handle in this cluster or, with a `url`, an HTTP service. Each call is retried with backoff; what still
fails is a `Failure` with its reason, never a number and never a PASS. Media pass through as references; sources are loaded
here, where a judge reads them.

Left out: batching (Serve's), what a failure means for whoever asked, and the driver's side (`actors.judging`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray import serve

from rlhf.errors import last_line
from rlhf.rewards.config import JudgeConfig, JudgesConfig, ModelJudgeConfig
from rlhf.rewards.protocols import Sources
from rlhf.rewards.questions import reward_text, sources_of
from rlhf.rewards.remote import RemoteJudge
from rlhf.types import Item, Prompt, Score, Verdict

FIRST_BACKOFF_S = 0.5
ACCEPTED = Verdict(valid=True, reason="no filter", raw_response="")
"""The verdict where no filter is asked."""
_PIXELS_LOST = (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A judge gave no usable answer after its retries."""

    judge: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PixelsLost:
    """The medium is gone from the object store: it has to be made again."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the judges gave for one medium."""

    verdict: Verdict | None
    """None where the filter failed."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """By judge; empty where the filter rejected the medium."""
    failures: tuple[Failure, ...] = ()
    """Of the judges without a usable answer, in the order of their names."""

    def whole(self) -> Score | Failure:
        """The score, if every judge that was asked gave its part of it, or else the first failure."""
        if self.failures:
            return self.failures[0]
        assert self.verdict is not None
        return Score(verdict=self.verdict, rewards=dict(self.rewards))


class Judges:
    """`judge([medium], prompt)` → Answer or PixelsLost. It lives inside one event loop."""

    def __init__(
        self,
        judges: JudgesConfig,
        rewards: Sequence[str],
        apps: Mapping[str, str],
        *,
        ask_filter: bool,
        empty_prompt: str | None,
    ):
        """rewards: the reward judges to ask. apps: judge → Serve application, for those that this cluster runs; the others
        are asked at their `url`.

        empty_prompt: what rewards read where an instruction is empty (see `reward_text`).
        """
        self._judges, self._rewards, self._empty_prompt = judges, tuple(rewards), empty_prompt
        names = [*rewards, *(["filter"] if ask_filter else [])]
        self._services = {name: _service(judges[name], apps.get(name), judges.timeout_s) for name in names}
        # As many calls at once as replicas take, so that waiting here never counts as their time.
        self._places = {name: asyncio.Semaphore(judges[name].calls_at_once) for name in names}

    async def judge(self, medium: list[ray.ObjectRef], prompt: Prompt) -> Answer | PixelsLost:
        """`medium` is a list of one reference, so that Ray hands it on instead of fetching it here."""
        try:
            verdict = await self._verdict(medium[0], prompt) if "filter" in self._services else ACCEPTED
            if isinstance(verdict, Failure):
                return Answer(verdict=None, failures=(verdict,))
            if not verdict.valid:
                return Answer(verdict=verdict)
            given = await asyncio.gather(*(self._reward(name, medium[0], prompt) for name in self._rewards))
        except _PIXELS_LOST as error:
            return PixelsLost(reason=str(error))
        return Answer(
            verdict=verdict,
            rewards={n: one for n, one in zip(self._rewards, given, strict=True) if not isinstance(one, Failure)},
            failures=tuple(one for one in given if isinstance(one, Failure)),
        )

    async def _verdict(self, medium: ray.ObjectRef, prompt: Prompt) -> Verdict | Failure:
        async def call() -> Verdict:
            sources = await self._sources(prompt) if self._judges.filter.send_source else ()
            return await self._services["filter"].judge(medium, sources, prompt.instruction)

        return await self._ask("filter", call)

    async def _reward(self, name: str, medium: ray.ObjectRef, prompt: Prompt) -> float | Failure:
        async def call() -> float:
            service, reads_prompt = self._services[name], self._judges[name].reads_prompt
            text = reward_text(prompt, self._empty_prompt) if reads_prompt else prompt.instruction
            sources = await self._sources(prompt) if await service.reads_sources() else ()
            return await service.score(medium, text, sources, prompt.item)

        return await self._ask(name, call)

    async def _sources(self, prompt: Prompt) -> Sources:
        """Decoded off the event loop; the last used are kept."""
        return await asyncio.to_thread(sources_of, prompt)

    async def _ask(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        judges = self._judges
        reason = ""
        for attempt in range(judges.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with self._places[name]:
                    return await asyncio.wait_for(call(), judges.timeout_s)
            except _PIXELS_LOST:
                raise
            except TimeoutError:
                reason = f"no answer in judges.timeout_s = {judges.timeout_s:g} s"
            except Exception as error:  # whatever a judge does wrong is a failure with a reason, never a score
                reason = last_line(error)
        return Failure(judge=name, reason=f"{reason} (after {judges.retries + 1} tries)")


# --- where a judge is --------------------------------------------------------------------------------------------------


class _Service(Protocol):
    """One judge, wherever it is. Raises whatever goes wrong."""

    async def reads_sources(self) -> bool: ...

    async def score(self, medium: ray.ObjectRef, text: str, sources: Sources, item: Item) -> float: ...

    async def judge(self, medium: ray.ObjectRef, sources: Sources, text: str) -> Verdict: ...


class _Deployment:
    """A Serve application of this cluster. Whether it reads sources follows from its code, so its replica is asked, once."""

    def __init__(self, app: str):
        self._handle = serve.get_app_handle(app)
        self._reads_sources: bool | None = None

    async def reads_sources(self) -> bool:
        if self._reads_sources is None:
            self._reads_sources = await self._handle.reads_sources.remote()
        return self._reads_sources

    async def score(self, medium: ray.ObjectRef, text: str, sources: Sources, item: Item) -> float:
        return await self._handle.score.remote(medium, text, sources, item)

    async def judge(self, medium: ray.ObjectRef, sources: Sources, text: str) -> Verdict:
        return await self._handle.judge.remote(medium, sources, text)


class _Elsewhere:
    """A service at `judges.NAME.url`."""

    def __init__(self, judge: ModelJudgeConfig, timeout_s: float):
        self._reads_sources, self._remote = judge.reads_sources, RemoteJudge(judge, timeout_s=timeout_s)

    async def reads_sources(self) -> bool:
        return self._reads_sources

    async def score(self, medium: ray.ObjectRef, text: str, sources: Sources, item: Item) -> float:
        return await self._remote.score(await medium, text, sources, item)

    async def judge(self, medium: ray.ObjectRef, sources: Sources, text: str) -> Verdict:
        return await self._remote.judge(await medium, sources, text)


def _service(judge: JudgeConfig, app: str | None, timeout_s: float) -> _Service:
    if app is not None:
        return _Deployment(app)
    assert isinstance(judge, ModelJudgeConfig)  # the only kind that is asked elsewhere
    return _Elsewhere(judge, timeout_s)
