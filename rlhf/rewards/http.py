"""A reward from any service that answers batches: POST {"items": [{"image_base64", "prompt", "item"}]} → {"scores": […]}.

    [judges.http.freshness]
    url = "https://host/score_batch"

Pictures go as PNG in base64, one score per item comes back in order. /score_batch of every reward app here is such a
service. It gets small grey pictures with the text "probe" at the start and when idle. Left out: retries (the judges' actor
has them).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Self

import httpx
import numpy as np
import xxhash

from rlhf.data.media import encode_base64
from rlhf.rewards.answers import number, read_json
from rlhf.rewards.config import HTTPJudgeConfig
from rlhf.rewards.protocols import JudgeError, JudgeUnreachable, check_batch, checked_scores
from rlhf.types import Item


class HTTPReward:
    """The `Reward` of [judges.http.NAME]."""

    device = "remote"

    def __init__(self, name: str, url: str, *, token: str | None = None, timeout_s: float = 60.0) -> None:
        self.name = name
        self.url = url
        self.version = f"{url}@{xxhash.xxh3_64_hexdigest(url.encode())}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s)
        self._encoders = ThreadPoolExecutor(4)

    @classmethod
    def from_config(cls, name: str, judge: HTTPJudgeConfig, device: str) -> Self:
        """`judges.http.NAME`; the device is the service's own affair."""
        return cls(name, str(judge.url), token=judge.token, timeout_s=judge.timeout_s)

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str], items: Sequence[Item | None]) -> list[float]:
        """The service's scores. Raises: JudgeError where it gives none, too few, or one that is no finite number."""
        check_batch(images, prompts, items)
        if not images:
            return []
        pictures = self._encoders.map(encode_base64, images)
        rows = [
            {"image_base64": picture, "prompt": prompt} | ({"item": asdict(item)} if item else {})
            for picture, prompt, item in zip(pictures, prompts, items, strict=True)
        ]
        try:
            response = self._client.post(self.url, json={"items": rows})
        except httpx.HTTPError as error:
            raise JudgeUnreachable(f"{self.url}: {type(error).__name__}: {error}") from error
        answer = read_json(self.url, response)
        scores = answer.get("scores")
        if not isinstance(scores, list):
            raise JudgeError(f"{self.url}: `scores` is no list: {str(answer)[:200]}")
        return checked_scores(self.name, [number(self.url, "scores", score) for score in scores], len(images))
