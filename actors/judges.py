"""Judges: one async actor that asks the filter, then the rewards of what passed, and gathers one answer per candidate.

A judge is a deployment handle in this cluster or, with `judges.NAME.url`, an HTTP service that speaks the contract of the
seed's servers. Each call is retried with backoff; what still fails is a `Failure`, never a number and never a PASS.
Left out: batching (Serve's) and what a failure means for the run (`rlhf.algorithms.rollout`).
"""

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from string import Formatter
from typing import Any

import httpx
import numpy as np
import ray
from PIL import Image
from ray import serve

from rlhf.config import OnlineDPOConfig
from rlhf.types import Item, Prompt, Score, Verdict

FIRST_BACKOFF_S = 0.5
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


class HTTPJudge:
    """A judge behind a URL. `judges.NAME.url` is the base that the seed's clients use, e.g. http://host:8163."""

    def __init__(self, name: str, url: str, token: str | None):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._name, self._url, self._client = name, url.rstrip("/"), httpx.AsyncClient(headers=headers, timeout=None)

    async def __call__(self, image: Any, source: Any, text: str, item: Item | None) -> Any:
        png = await asyncio.to_thread(_png, await image if isinstance(image, ray.ObjectRef) else image)
        if self._name == "ctr":
            if item is None:
                raise ValueError("the CTR judge needs item metadata")
            answer = await self._post("predict", files={"image": ("edit.png", png, "image/png")}, data=vars(item))
            return answer["data"]["ctr"]
        encoded = base64.b64encode(png).decode()
        if self._name == "hps":
            return (await self._post("score", json={"image_base64": encoded, "prompt": text}))["score"]
        answer = await self._post("validate", json={"image_base64": encoded, "prompt": text})
        if not isinstance(answer["valid"], bool):
            raise ValueError(f"the filter answered valid = {answer['valid']!r}, not true or false")
        return Verdict(
            valid=answer["valid"],
            reason=answer.get("reason") or "",
            raw_response=answer.get("raw_response") or "",
            pass_probability=answer.get("pass_probability"),
        )

    async def _post(self, route: str, **body: Any) -> dict[str, Any]:
        response = await self._client.post(f"{self._url}/{route}", **body)
        if response.status_code != 200:
            raise RuntimeError(f"{self._url}/{route} answered {response.status_code}: {response.text[:200]}")
        return response.json()


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", compress_level=1)
    return out.getvalue()


def _from_handle(name: str, app: str) -> Callable[..., Awaitable[Any]]:
    handle = serve.get_app_handle(app)

    async def call(image: Any, source: Any, text: str, item: Item | None) -> Any:
        if name == "filter":
            return await handle.judge.remote(image, source, text)
        return await handle.score.remote(image, text, item)

    return call


class Judges:
    """`judge([image], prompt)` → Score, Failure or PixelsLost. Pictures pass through as references."""

    def __init__(self, config: OnlineDPOConfig, apps: dict[str, str], token: str | None):
        self._config = config
        names = [*(["filter"] if config.judges.filter.enabled else []), *config.reward.names]
        self._calls: dict[str, Callable[..., Awaitable[Any]]] = {
            name: _from_handle(name, apps[name])
            if name in apps
            else HTTPJudge(name, getattr(config.judges, name).url, token)
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
                    call = self._calls[name](image, None, text, prompt.item)
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
