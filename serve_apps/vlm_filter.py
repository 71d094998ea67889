"""The filter app: POST /filter/validate outside, `judge` by deployment handle inside.

Handle: `await handle.judge.remote(image, source, prompt)` → `Verdict`; `source` may be None. How object references
arrive: see `serve_apps.hpsv2`. The verdict comes from a vLLM engine in the replica (`judges.filter.path`) or from an
OpenAI-compatible server (`judges.filter.api_base`); either way a judge that fails raises: nothing passes by default.
"""

import time
from typing import Annotated

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve

from rlhf.rewards.api_filter import APIFilter
from rlhf.rewards.config import FilterJudgeConfig
from rlhf.rewards.images import MAX_BYTES
from rlhf.rewards.reward import Filter
from rlhf.types import Verdict
from serve_apps.batcher import PROBE_AGE_S, options
from serve_apps.http import Health, create_api, decode_field
from serve_apps.vllm_engine import VLLMFilter

MAX_BODY = 3 * MAX_BYTES
_PROBE_IMAGE = np.full((64, 64, 3), 128, dtype=np.uint8)


class ValidateRequest(BaseModel):
    image_base64: Annotated[str, Field(description="the edited picture: PNG, JPEG or WEBP file, base64")]
    source_base64: Annotated[str | None, Field(description="the picture before the edit")] = None
    prompt: Annotated[str, Field(description="the edit instruction")] = ""


class ValidateResponse(BaseModel):
    valid: bool
    reason: Annotated[str, Field(description="asked for only where the picture fails")]
    raw_response: Annotated[str, Field(description="the model's word: PASS or FAIL")]
    pass_probability: Annotated[float | None, Field(description="null where the server gives no log-probabilities")]


class FilterApp:
    """One replica: a filter and its HTTP route."""

    # Serve awaits an asynchronous __init__; the engine ties itself to the event loop it starts in, the replica's.
    async def __init__(  # type: ignore[misc]
        self, judge: FilterJudgeConfig, *, api_key: str | None, token: str | None, settings: str
    ) -> None:
        self.filter: Filter = APIFilter(judge, api_key=api_key) if judge.api_base else await VLLMFilter.start(judge)
        self.token = token
        self._settings = settings
        self._worked_at = float("-inf")

    async def judge(self, image: np.ndarray, source: np.ndarray | None, prompt: str) -> Verdict:
        """Handle method. image, source: uint8 (H, W, 3). Raises: ValueError, JudgeError."""
        verdict = await self.filter.judge(image, source, prompt)
        self._worked_at = time.monotonic()
        return verdict

    async def settings(self) -> str:
        """Digest of the config that this app was deployed with."""
        return self._settings

    async def check_health(self) -> None:
        """Raise unless a verdict came within `PROBE_AGE_S` or comes now; Serve calls a replica ready only after one."""
        if time.monotonic() - self._worked_at > PROBE_AGE_S:
            await self.judge(_PROBE_IMAGE, None, "")

    def describe(self) -> Health:
        return Health(model="filter", version=self.filter.version, device=self.filter.device)

    async def __del__(self) -> None:
        if "filter" in self.__dict__:
            await self.filter.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api("Filter: does an edit pass the quality checks", self, token=self.token, max_body=MAX_BODY)

        @api.post("/validate")
        async def validate(request: ValidateRequest) -> ValidateResponse:
            image = await decode_field("image_base64", request.image_base64)
            source = None
            if request.source_base64 is not None:
                source = await decode_field("source_base64", request.source_base64)
            verdict = await self.judge(image, source, request.prompt)
            return ValidateResponse(
                valid=verdict.valid,
                reason=verdict.reason,
                raw_response=verdict.raw_response,
                pass_probability=verdict.pass_probability,
            )

        return api


def build_filter(
    judge: FilterJudgeConfig, *, api_key: str | None = None, token: str | None = None, settings: str = ""
) -> serve.Application:
    """The Serve application of `judges.filter`."""
    deployment = serve.deployment(**options("Filter", judge))(serve.ingress()(FilterApp))
    return deployment.bind(judge, api_key=api_key, token=token, settings=settings)
