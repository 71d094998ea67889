"""The app of every reward: POST /score and /score_batch outside, `score` by deployment handle inside.

Handle: `await handle.score.remote(image, prompt, item)` → float. `image` is a uint8 (H, W, 3) array or an ObjectRef of
one as a top-level argument: Ray resolves it in the replica as a read-only zero-copy array. A reference inside a list or
object would arrive as a reference and be refused.
"""

import asyncio
from typing import Annotated

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field

from rlhf.errors import Refused
from rlhf.rewards import load_reward
from rlhf.rewards.config import JudgeConfig
from rlhf.types import Item
from serve_apps.batcher import Batcher
from serve_apps.http import EXAMPLE_IMAGE, MAX_TEXT, PICTURE_ERRORS, Health, Secrets, create_api, decode_field

MAX_ITEMS = 64
MAX_BODY = 256 * 2**20


class ItemFields(BaseModel):
    """What is known of the product on the picture."""

    food_name: Annotated[str, Field(max_length=MAX_TEXT, examples=["红烧肉"])]
    food_type: Annotated[str, Field(max_length=MAX_TEXT, examples=["中式快餐"])]
    city_name: Annotated[str, Field(max_length=MAX_TEXT, examples=["上海"])]
    shop_name: Annotated[str, Field(max_length=MAX_TEXT, examples=["老王饭店"])]


class ScoreRequest(BaseModel):
    image_base64: Annotated[str, Field(description="PNG, JPEG or WEBP file, base64", examples=[EXAMPLE_IMAGE])]
    prompt: Annotated[str, Field(max_length=MAX_TEXT, examples=["a red apple"])]
    item: Annotated[ItemFields | None, Field(description="the product; the CTR model needs it")] = None


class ScoreResponse(BaseModel):
    score: Annotated[float, Field(description="higher is better", examples=[0.271])]


class BatchRequest(BaseModel):
    items: Annotated[list[ScoreRequest], Field(min_length=1, max_length=MAX_ITEMS)]


class BatchResponse(BaseModel):
    scores: Annotated[list[float], Field(description="one per item, in order", examples=[[0.271, 0.254]])]


class RewardApp:
    """One replica: a reward on one device, its batcher and its HTTP routes."""

    title = "Reward: a score of a picture, higher is better"

    def __init__(self, name: str, judge: JudgeConfig, *, secrets: Secrets, settings: str) -> None:
        """settings: digest of the config that this app is deployed with."""
        self.name = name
        self.judge = judge
        self.secrets = secrets
        self._settings = settings
        reward = load_reward(name, judge, "cuda" if judge.num_gpus else "cpu")
        self.batcher = Batcher(reward, max_batch_size=judge.max_batch_size, batch_wait_s=judge.batch_wait_s)
        self.batcher.warm_up()
        # Requests beyond two batches wait as the bytes they came in: 64 times 64 decoded pictures would be 12 GB.
        self.room = asyncio.Semaphore(2 * judge.max_batch_size)

    async def score(self, image: np.ndarray, prompt: str, item: Item | None = None) -> float:
        """Handle method. image: uint8 (H, W, 3). Raises: Refused (also where `item` is missing), JudgeError."""
        if item is None and self.judge.needs_item:
            raise Refused(
                f"the reward {self.name!r} needs the item of the picture (food_name, food_type, city_name, shop_name)"
            )
        return await self.batcher.score(image, prompt, item)

    async def settings(self) -> str:
        """Digest of the config that this app was deployed with."""
        return self._settings

    async def check_health(self) -> None:
        """Raise unless the model answers; Serve calls a replica ready only after one success."""
        await self.batcher.probe()

    def describe(self) -> Health:
        reward = self.batcher.reward
        return Health(model=self.name, version=reward.version, device=reward.device)

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self.title, self, token=self.secrets.token, max_body=MAX_BODY)
        self.add_routes(api)
        return api

    def add_routes(self, api: FastAPI) -> None:
        @api.post("/score", responses=PICTURE_ERRORS)
        async def score(request: ScoreRequest) -> ScoreResponse:
            return ScoreResponse(score=await self._score_request("image_base64", request))

        @api.post("/score_batch", responses=PICTURE_ERRORS)
        async def score_batch(request: BatchRequest) -> BatchResponse:
            asked = [self._score_request(f"items.{i}.image_base64", item) for i, item in enumerate(request.items)]
            scores = await asyncio.gather(*asked, return_exceptions=True)
            for score in scores:
                if isinstance(score, BaseException):
                    raise score  # the first in order, whichever was first in time
            return BatchResponse(scores=scores)

    async def _score_request(self, field: str, request: ScoreRequest) -> float:
        async with self.room:
            image = await decode_field(field, request.image_base64)
            item = Item(**request.item.model_dump()) if request.item else None
            return await self.score(image, request.prompt, item)
