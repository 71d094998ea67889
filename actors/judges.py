"""The judging actor: it asks the filter, then the rewards of what passed, and gathers one answer per medium.

Each call is retried with backoff; what still fails is a `Failure` with its reason, never a number and never a PASS. Media pass
through as references; sources are loaded here, where a judge reads them. Left out: batching (Serve's), what a failure means for
whoever asked, and the driver's side (`actors.judging`).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve

from rlhf.errors import last_line
from rlhf.rewards.config import JudgeConfig, JudgesConfig, ModelJudgeConfig
from rlhf.rewards.questions import reward_text, sources_of
from rlhf.rewards.remote import RemoteJudge
from rlhf.types import Prompt, Score, Verdict

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
        """rewards: the reward judges to ask. apps: judge → Serve application; who has none is asked at its `url`.

        empty_prompt: what rewards read where an instruction is empty (see `reward_text`).
        """
        self._judges, self._rewards, self._empty_prompt = judges, tuple(rewards), empty_prompt
        names = [*rewards, *(["filter"] if ask_filter else [])]
        self._services = {name: _Service(judges[name], apps.get(name), judges.timeout_s) for name in names}
        # As many calls at once as replicas take, so that waiting here never counts as their time.
        most = {name: (judges[name].max_replicas or judges[name].replicas) for name in names}
        self._places = {name: asyncio.Semaphore(most[name] * judges[name].max_ongoing_requests) for name in names}

    async def judge(self, medium: list[ray.ObjectRef], prompt: Prompt) -> Answer | PixelsLost:
        """`medium` is a list of one reference, so that Ray hands it on instead of fetching it here."""
        try:
            verdict = await self._ask("filter", medium[0], prompt) if "filter" in self._services else ACCEPTED
            if isinstance(verdict, Failure):
                return Answer(verdict=None, failures=(verdict,))
            if not verdict.valid:
                return Answer(verdict=verdict)
            given = await asyncio.gather(*(self._ask(name, medium[0], prompt) for name in self._rewards))
        except _PIXELS_LOST as error:
            return PixelsLost(reason=str(error))
        rewards = {n: one for n, one in zip(self._rewards, given, strict=True) if not isinstance(one, Failure)}
        failures = tuple(one for one in given if isinstance(one, Failure))
        return Answer(verdict=verdict, rewards=rewards, failures=failures)

    async def _ask(self, name: str, medium: ray.ObjectRef, prompt: Prompt) -> Any:
        """The filter's Verdict, a reward's float, or a Failure."""
        judges, reason = self._judges, ""
        for attempt in range(judges.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with self._places[name]:
                    return await asyncio.wait_for(self._call(name, medium, prompt), judges.timeout_s)
            except _PIXELS_LOST:
                raise
            except TimeoutError:
                reason = f"no answer in judges.timeout_s = {judges.timeout_s:g} s"
            except Exception as error:  # whatever a judge does wrong is a failure with a reason, never a score
                reason = last_line(error)
        return Failure(judge=name, reason=f"{reason} (after {judges.retries + 1} tries)")

    async def _call(self, name: str, medium: ray.ObjectRef, prompt: Prompt) -> Any:
        service = self._services[name]
        if name == "filter":
            sources = await asyncio.to_thread(sources_of, prompt) if self._judges.filter.send_source else ()
            return await service.call("judge", medium, sources, prompt.instruction)
        text = reward_text(prompt, self._empty_prompt) if self._judges[name].reads_prompt else prompt.instruction
        sources = await asyncio.to_thread(sources_of, prompt) if await service.reads_sources() else ()
        return await service.call("score", medium, text, sources, prompt.item)


class _Service:
    """One judge: a Serve application of this cluster or, without one, what is at `judges.NAME.url`."""

    def __init__(self, judge: JudgeConfig, app: str | None, timeout_s: float):
        self._handle = serve.get_app_handle(app) if app is not None else None
        self._reads_sources: bool | None = None
        if self._handle is None:
            assert isinstance(judge, ModelJudgeConfig)  # the only kind that is asked elsewhere
            self._remote, self._reads_sources = RemoteJudge(judge, timeout_s=timeout_s), judge.reads_sources

    async def reads_sources(self) -> bool:
        """Of an application it follows from its code, so its replica is asked, once."""
        if self._handle is not None and self._reads_sources is None:
            self._reads_sources = await self._handle.reads_sources.remote()
        return bool(self._reads_sources)

    async def call(self, method: str, medium: ray.ObjectRef, *about: Any) -> Any:
        """`score` (text, sources, item) or `judge` (sources, text) of a medium. Raises whatever goes wrong."""
        if self._handle is not None:
            return await getattr(self._handle, method).remote(medium, *about)
        return await getattr(self._remote, method)(await medium, *about)
