"""Judges that are HTTP services elsewhere: one judge at its `url`, and any service that answers batches.

`RemoteJudge` (`judges.NAME.url`) has the methods of the in-cluster handles and speaks the HTTP contract of `serve_apps`, so it
also reaches another cluster's apps: `url` is the app's address, for example http://host:8000/hpsv2.

`HTTPReward` ([judges.http.NAME]) posts {"items": [{"image_base64", "prompt", "item", "source_base64"}]} and
reads {"scores": [one number each]}; /score_batch of every reward app here is such a service. Pictures go as PNG in base64.
It sends small grey pictures with the text "probe" at the start and when idle.

An answer that is not the promised JSON, or a number that is not finite, is a JudgeError. Left out: retries, which belong to
whoever calls, and media of more than one frame.
"""

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import xxhash

from rlhf.data.media import encode_base64, encode_png
from rlhf.rewards import protocols
from rlhf.rewards.config import CTRJudgeConfig, HTTPJudgeConfig, ModelJudgeConfig
from rlhf.rewards.connections import asked, connection
from rlhf.rewards.protocols import Items, JudgeError, JudgeUnreachable, Media, Reward, Sources, picture_of
from rlhf.types import Item, Verdict


def answer_of(url: str, response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a 200 answer. Raises: JudgeError for anything else, with the status and what was said."""
    said = response.text[:200]
    if response.status_code != 200:
        raise JudgeError(f"{asked(url)}: status {response.status_code}: {said}")
    try:
        answer = response.json()
    except (ValueError, RecursionError) as error:
        raise JudgeError(f"{url}: not JSON: {said!r}") from error
    if not isinstance(answer, dict):
        raise JudgeError(f"{url}: not a JSON object: {said!r}")
    return answer


def number(
    url: str, key: str, value: Any, least: float = -sys.float_info.max, most: float = sys.float_info.max
) -> float:
    """`value`, from `least` to `most`, as a float. Raises: JudgeError where it is no such number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        wanted = "a finite number" if most == sys.float_info.max else f"a number from {least:g} to {most:g}"
        raise JudgeError(f"{url}: `{key}` is {str(value)[:200]!r}, not {wanted}")
    return float(value)


def question(image: np.ndarray, prompt: str, sources: Sequence[np.ndarray], item: Item) -> dict[str, Any]:
    """The JSON of one picture, as /score takes it. image, sources: uint8 (H, W, 3)."""
    body: dict[str, Any] = {"image_base64": encode_base64(image), "prompt": prompt}
    if sources:
        encoded = [encode_base64(source) for source in sources]
        body["source_base64"] = encoded[0] if len(encoded) == 1 else encoded
    if item:
        body["item"] = dict(item)
    return body


class RemoteJudge:
    """One service. `score` and `judge` take and give what the deployment handles of the same judge do."""

    def __init__(self, judge: ModelJudgeConfig, *, timeout_s: float = 120.0) -> None:
        assert judge.url is not None
        self._config = judge
        self.url = judge.url.rstrip("/")
        self._client = httpx.AsyncClient(**connection(self.url, judge.token, timeout_s))

    async def score(self, media: np.ndarray, prompt: str, sources: Sources = (), item: Item | None = None) -> float:
        """The reward of one picture or medium. Raises: JudgeError; Refused where a needed column of the item is missing."""
        item = item or {}
        image, *befores = self._pictures(media, sources)
        if isinstance(self._config, CTRJudgeConfig):
            columns = self._config.item_columns
            protocols.check_columns(self.url, columns, item)
            file = await asyncio.to_thread(encode_png, image)
            form = {column: item[column] for column in columns}
            answer = await self._post("predict", data=form, files={"image": ("image.png", file, "image/png")})
            if answer.get("success") is not True or not isinstance(answer.get("data"), dict):
                raise JudgeError(f"{self.url}: no success: {str(answer)[:200]}")
            return number(self.url, "ctr", answer["data"].get("ctr"), 0, 1)
        body = await asyncio.to_thread(question, image, prompt, befores, item)
        return number(self.url, "score", (await self._post("score", json=body)).get("score"))

    async def judge(self, media: np.ndarray, sources: Sources, prompt: str) -> Verdict:
        """The verdict on one edit. Raises: JudgeError."""
        image, *befores = self._pictures(media, sources)
        answer = await self._post("validate", json=await asyncio.to_thread(question, image, prompt, befores, {}))
        if not isinstance(answer.get("valid"), bool):
            raise JudgeError(f"{self.url}: `valid` is neither true nor false: {str(answer)[:200]}")
        probability = answer.get("pass_probability")
        return Verdict(
            valid=answer["valid"],
            reason=str(answer.get("reason") or ""),
            raw_response=str(answer.get("raw_response") or ""),
            pass_probability=None if probability is None else number(self.url, "pass_probability", probability, 0, 1),
        )

    async def close(self) -> None:
        await self._client.aclose()

    def _pictures(self, media: np.ndarray, sources: Sources) -> list[np.ndarray]:
        arrays = map(protocols.as_media, (media, *sources))
        return [picture_of(protocols.frames_of(array, self._config.frames)) for array in arrays]

    async def _post(self, route: str, **request: Any) -> dict[str, Any]:
        url = f"{self.url}/{route}"
        try:
            response = await self._client.post(url, **request)
        except httpx.HTTPError as error:
            raise JudgeError(f"{asked(url)}: {type(error).__name__}: {error}") from error
        return answer_of(url, response)


class HTTPReward(Reward):
    """The `Reward` of [judges.http.NAME]; the device is the service's own affair."""

    device = "remote"

    def __init__(self, name: str, judge: HTTPJudgeConfig, device: str) -> None:
        self.name, self.url = name, str(judge.url)
        self.version = f"{self.url}@{xxhash.xxh3_64_hexdigest(self.url.encode())}"
        self.reads_sources = judge.send_source
        self._client = httpx.Client(**connection(self.url, judge.token, judge.timeout_s))
        self._encoders = ThreadPoolExecutor(4)

    def _scores(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """The service's scores. Raises: JudgeError where it gives none, or one that is no finite number."""
        images = [picture_of(medium) for medium in media]
        befores = [[picture_of(source) for source in some] if self.reads_sources else [] for some in sources]
        rows = list(self._encoders.map(question, images, prompts, befores, items))
        try:
            response = self._client.post(self.url, json={"items": rows})
        except httpx.HTTPError as error:
            raise JudgeUnreachable(f"{asked(self.url)}: {type(error).__name__}: {error}") from error
        answer = answer_of(self.url, response)
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(rows):
            raise JudgeError(f"{self.url}: `scores` is no list of {len(rows)}: {str(answer)[:200]}")
        return [number(self.url, f"scores[{place}]", score) for place, score in enumerate(scores)]
