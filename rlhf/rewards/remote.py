"""Judges behind an external HTTP service (`judges.NAME.url`), with the methods of the in-cluster handles.

They speak the HTTP contract of `serve_apps`, so they also reach another cluster's apps: `url` is the app's address, for example
http://host:8000/hpsv2. An answer that is not the promised JSON, or a number that is not finite, is a JudgeError.

Left out: retries, which belong to whoever calls, and batches, which the service makes of concurrent requests (one that
wants batches is a judge of `judges.http`).
"""

import asyncio
from dataclasses import asdict
from typing import Any

import httpx
import numpy as np

from rlhf.data.media import encode_base64, encode_png
from rlhf.errors import Refused
from rlhf.rewards.answers import number, read_json
from rlhf.rewards.config import CTRJudgeConfig, ModelJudgeConfig
from rlhf.rewards.protocols import JudgeError
from rlhf.types import Item, Verdict


class RemoteJudge:
    """One service. `score` and `judge` take and give what the deployment handles of the same judge do."""

    def __init__(self, judge: ModelJudgeConfig, *, timeout_s: float = 120.0) -> None:
        assert judge.url is not None
        self._config = judge
        self.url = judge.url.rstrip("/")
        headers = {"Authorization": f"Bearer {judge.token}"} if judge.token else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s)

    async def score(self, image: np.ndarray, prompt: str, item: Item | None = None) -> float:
        """The reward of one uint8 (H, W, 3) picture. Raises: JudgeError; Refused where a needed item is missing."""
        if isinstance(self._config, CTRJudgeConfig):
            if item is None:
                raise Refused(f"{self.url}: this reward needs the item of the picture")
            file = await asyncio.to_thread(encode_png, image)
            answer = await self._post("predict", data=asdict(item), files={"image": ("image.png", file, "image/png")})
            if answer.get("success") is not True or not isinstance(answer.get("data"), dict):
                raise JudgeError(f"{self.url}: no success: {str(answer)[:200]}")
            return number(self.url, "ctr", answer["data"].get("ctr"))
        body = {"image_base64": await _base64(image), "prompt": prompt} | ({"item": asdict(item)} if item else {})
        return number(self.url, "score", (await self._post("score", json=body)).get("score"))

    async def judge(self, image: np.ndarray, source: np.ndarray | None, prompt: str) -> Verdict:
        """The verdict on one edit. Raises: JudgeError."""
        body = {"image_base64": await _base64(image), "prompt": prompt}
        if source is not None:
            body["source_base64"] = await _base64(source)
        answer = await self._post("validate", json=body)
        if not isinstance(answer.get("valid"), bool):
            raise JudgeError(f"{self.url}: `valid` is neither true nor false: {str(answer)[:200]}")
        probability = answer.get("pass_probability")
        return Verdict(
            valid=answer["valid"],
            reason=str(answer.get("reason") or ""),
            raw_response=str(answer.get("raw_response") or ""),
            pass_probability=None if probability is None else number(self.url, "pass_probability", probability),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _post(self, route: str, **request: Any) -> dict[str, Any]:
        url = f"{self.url}/{route}"
        try:
            response = await self._client.post(url, **request)
        except httpx.HTTPError as error:
            raise JudgeError(f"{url}: {type(error).__name__}: {error}") from error
        return read_json(url, response)


async def _base64(image: np.ndarray) -> str:
    return await asyncio.to_thread(encode_base64, image)
