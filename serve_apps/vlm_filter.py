"""The filter app: POST /filter/validate outside, `judge` by deployment handle inside.

Handle: `await handle.judge.remote(media, sources, prompt)` → `Verdict`; `sources` may be empty. Of media of several frames
the filter sees the one in the middle. How object references arrive: see `serve_apps.rewards`. The verdict comes from a
vLLM engine in the replica (`judges.filter.path`) or from an OpenAI-compatible server (`judges.filter.api_base`).
"""

import asyncio
import time
from dataclasses import asdict

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field

from rlhf.data.media import MAX_BYTES
from rlhf.errors import Refused
from rlhf.rewards.config import FilterJudgeConfig
from rlhf.rewards.filters import MAX_SOURCES, APIFilter, shrink
from rlhf.rewards.protocols import Filter, Sources, as_media, frames_of, picture_of
from rlhf.types import Verdict
from serve_apps import http
from serve_apps.batcher import PROBE_AGE_S
from serve_apps.metrics import JudgeMetrics
from serve_apps.vllm_engine import VLLMFilter

MAX_BODY = 3 * MAX_BYTES
_PROBE_IMAGE = np.full((64, 64, 3), 128, dtype=np.uint8)


class ValidateRequest(BaseModel):
    image_base64: str = Field(
        description="the edited picture: PNG, JPEG or WEBP file, base64", examples=[http.EXAMPLE_IMAGE]
    )
    source_base64: http.SourceField = None
    prompt: str = Field(
        "", max_length=http.MAX_TEXT, description="the edit instruction", examples=["Make the light warm."]
    )


class ValidateResponse(BaseModel):
    valid: bool
    reason: str = Field(description="asked for only where the picture fails")
    raw_response: str = Field(description="the model's word: PASS or FAIL")
    pass_probability: float | None = Field(description="null where the server gives no log-probabilities")


class FilterApp:
    """One replica: a filter and its HTTP route."""

    # Serve awaits an asynchronous __init__; the engine ties itself to the event loop it starts in, the replica's.
    async def __init__(  # type: ignore[misc]
        self, name: str, judge: FilterJudgeConfig, *, secrets: http.Secrets, settings: str
    ) -> None:
        by_api = judge.api_base is not None
        self.filter: Filter = APIFilter(judge, api_key=secrets.api_key) if by_api else VLLMFilter(judge)
        self._token, self._settings, self._frames = secrets.token, settings, judge.frames
        self._worked_at = float("-inf")
        self._metrics = JudgeMetrics(name)

    async def judge(self, media: np.ndarray, sources: Sources, prompt: str) -> Verdict:
        """Handle method. media, sources: uint8 (H, W, 3) or (F, H, W, 3). Raises: Refused, JudgeError."""
        if len(sources) > MAX_SOURCES:
            raise Refused(f"{len(sources)} sources; the filter looks at {MAX_SOURCES} at most")
        image, *befores = (picture_of(frames_of(as_media(array), self._frames)) for array in (media, *sources))
        with self._metrics.request():
            return await self._judge(image, tuple(befores), prompt)

    async def settings(self) -> str:
        """Digest of the config that this app was deployed with."""
        return self._settings

    async def check_health(self) -> None:
        """Raise unless a verdict came within `PROBE_AGE_S` or comes now; Serve calls a replica ready only after one."""
        if time.monotonic() - self._worked_at > PROBE_AGE_S:
            await self._judge(_PROBE_IMAGE, (), "")

    async def _judge(self, image: np.ndarray, sources: Sources, prompt: str) -> Verdict:
        try:
            verdict = await self.filter.judge(image, sources, prompt)
        except Exception:
            self._worked_at = float("-inf")  # the next probe asks anew
            raise
        self._worked_at = time.monotonic()
        return verdict

    async def __del__(self) -> None:
        if "filter" in self.__dict__:
            await self.filter.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        title = "Filter: does an edit pass the quality checks"
        health = http.Health(model="filter", version=self.filter.version, device=self.filter.device)
        api = http.create_api(title, health, self.check_health, token=self._token, max_body=MAX_BODY)

        @api.post("/validate", responses=http.PICTURE_ERRORS)
        async def validate(request: ValidateRequest) -> ValidateResponse:
            image = await _decode_small("image_base64", request.image_base64)
            sources = await http.decode_sources("source_base64", request.source_base64, _decode_small)
            return ValidateResponse(**asdict(await self.judge(image, sources, request.prompt)))

        return api


async def _decode_small(field: str, text: str) -> np.ndarray:
    """What the filter will see of the picture: waiting requests hold a megapixel each and not forty."""
    return await asyncio.to_thread(shrink, await http.decode_field(field, text))
