"""Judges behind an external HTTP service (`judges.NAME.url`), with the methods of the in-cluster handles.

They speak contracts.md section 3, so they also reach another cluster's apps: `url` is the app's address, for example
http://host:8000/hpsv2. An answer that is not the promised JSON, or a number that is not finite, is a JudgeError.

Left out: retries, which belong to whoever calls.
"""

import math
from typing import Any

import httpx
import numpy as np

from rlhf.rewards.images import encode_base64, encode_png
from rlhf.rewards.reward import JudgeError
from rlhf.types import Item, Verdict


class RemoteJudge:
    """One service. `score` and `judge` take and give what the deployment handles of the same judge do."""

    def __init__(self, name: str, url: str, *, token: str | None = None, timeout_s: float = 120.0) -> None:
        """name: "hps", "ctr" or "filter"; url: the app's address without the last path segment."""
        if name not in ("hps", "ctr", "filter"):
            raise ValueError(f"no HTTP judge is called {name!r}; there are hps, ctr, filter")
        self.name = name
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s)

    async def score(self, image: np.ndarray, prompt: str, item: Item | None = None) -> float:
        """The reward of one uint8 (H, W, 3) picture. Raises: JudgeError; ValueError where a CTR judge gets no item."""
        if self.name == "hps":
            body = {"image_base64": encode_base64(image), "prompt": prompt}
            return self._number(await self._post("score", json=body), "score")
        if item is None:
            raise ValueError("the CTR reward needs the item of the picture")
        form = {name: getattr(item, name) for name in ("food_name", "food_type", "city_name", "shop_name")}
        answer = await self._post("predict", data=form, files={"image": ("image.png", encode_png(image), "image/png")})
        if answer.get("success") is not True or not isinstance(answer.get("data"), dict):
            raise JudgeError(f"{self.url}: no success: {str(answer)[:200]}")
        return self._number(answer["data"], "ctr")

    async def judge(self, image: np.ndarray, source: np.ndarray | None, prompt: str) -> Verdict:
        """The verdict on one edit. Raises: JudgeError."""
        body = {"image_base64": encode_base64(image), "prompt": prompt}
        if source is not None:
            body["source_base64"] = encode_base64(source)
        answer = await self._post("validate", json=body)
        if not isinstance(answer.get("valid"), bool):
            raise JudgeError(f"{self.url}: `valid` is neither true nor false: {str(answer)[:200]}")
        known = answer.get("pass_probability") is not None
        return Verdict(
            valid=answer["valid"],
            reason=str(answer.get("reason") or ""),
            raw_response=str(answer.get("raw_response") or ""),
            pass_probability=self._number(answer, "pass_probability") if known else None,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _post(self, route: str, **request: Any) -> dict[str, Any]:
        try:
            response = await self._client.post(f"{self.url}/{route}", **request)
        except httpx.HTTPError as error:
            raise JudgeError(f"{self.url}/{route}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise JudgeError(f"{self.url}/{route}: status {response.status_code}: {response.text[:200]}")
        try:
            answer = response.json()
        except ValueError as error:
            raise JudgeError(f"{self.url}/{route}: not JSON: {response.text[:200]!r}") from error
        if not isinstance(answer, dict):
            raise JudgeError(f"{self.url}/{route}: not a JSON object: {response.text[:200]!r}")
        return answer

    def _number(self, answer: dict[str, Any], key: str) -> float:
        value = answer.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise JudgeError(f"{self.url}: `{key}` is {value!r}, not a finite number")
        return float(value)
