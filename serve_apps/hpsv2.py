"""The HPSv2 app: POST /hpsv2/score and /hpsv2/score_batch outside, `score` by deployment handle inside.

Handle: `await handle.score.remote(image, prompt, item)` → float, `item` unused. `image` is a uint8 (H, W, 3) array or
an ObjectRef of one as a top-level argument: Ray resolves it in the replica as a read-only zero-copy array. A reference
inside a list or object would arrive as a reference and be refused.
"""

import asyncio
from typing import Annotated

import numpy as np
import torch
from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve

from rlhf.rewards.config import HPSJudgeConfig
from rlhf.rewards.hpsv2 import HPSv2Reward
from rlhf.types import Item
from serve_apps.batcher import Batcher, options
from serve_apps.http import Health, create_api, decode_field

MAX_ITEMS = 64
MAX_BODY = 256 * 2**20


class ScoreRequest(BaseModel):
    image_base64: Annotated[str, Field(description="PNG, JPEG or WEBP file, base64")]
    prompt: str


class ScoreResponse(BaseModel):
    score: Annotated[float, Field(description="cosine of picture and prompt, higher is better")]


class BatchRequest(BaseModel):
    items: Annotated[list[ScoreRequest], Field(min_length=1, max_length=MAX_ITEMS)]


class BatchResponse(BaseModel):
    scores: Annotated[list[float], Field(description="one per item, in order")]


class HPSv2App:
    """One replica: a reward on one device, its batcher and its HTTP routes."""

    def __init__(self, judge: HPSJudgeConfig, *, token: str | None, settings: str) -> None:
        assert judge.path is not None
        reward = HPSv2Reward(
            judge.path,
            version=judge.version,
            device="cuda" if judge.num_gpus else "cpu",
            dtype=getattr(torch, judge.dtype),
            batch_rows=judge.max_batch_size if judge.pad_batches else None,
        )
        self.batcher = Batcher(reward, max_batch_size=judge.max_batch_size, batch_wait_s=judge.batch_wait_s)
        self.token = token
        self._settings = settings

    async def score(self, image: np.ndarray, prompt: str, item: Item | None = None) -> float:
        """Handle method. image: uint8 (H, W, 3). Raises: ValueError, JudgeError."""
        return await self.batcher.score(image, prompt, item)

    async def settings(self) -> str:
        """Digest of the config that this app was deployed with."""
        return self._settings

    async def check_health(self) -> None:
        await self.batcher.probe()

    def describe(self) -> Health:
        reward = self.batcher.reward
        return Health(model="hpsv2", version=reward.version, device=reward.device)

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api("HPSv2: aesthetic score of a picture for a prompt", self, token=self.token, max_body=MAX_BODY)

        @api.post("/score")
        async def score(request: ScoreRequest) -> ScoreResponse:
            image = await decode_field("image_base64", request.image_base64)
            return ScoreResponse(score=await self.score(image, request.prompt))

        @api.post("/score_batch")
        async def score_batch(request: BatchRequest) -> BatchResponse:
            images = [
                await decode_field(f"items.{index}.image_base64", item.image_base64)
                for index, item in enumerate(request.items)
            ]
            prompts = [item.prompt for item in request.items]
            return BatchResponse(scores=await asyncio.gather(*map(self.score, images, prompts)))

        return api


def build_hpsv2(judge: HPSJudgeConfig, *, token: str | None = None, settings: str = "") -> serve.Application:
    """The Serve application of `judges.hps`."""
    deployment = serve.deployment(**options("HPSv2", judge))(serve.ingress()(HPSv2App))
    return deployment.bind(judge, token=token, settings=settings)
