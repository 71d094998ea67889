"""The app of every reward: POST /score and /score_batch outside, `score` by deployment handle inside.

Handle: `await handle.score.remote(media, prompt, sources, item)` → float. `media` is a picture uint8 (H, W, 3), media uint8
(F, H, W, 3), or an ObjectRef of one as a top-level argument: Ray resolves it in the replica as a read-only zero-copy array.
A reference inside a list or object would arrive as a reference and be refused. Of more frames than the reward reads, some
are chosen here. `sources` is a tuple of such arrays, which not every reward reads: see `reads_sources`.
"""

import asyncio
from typing import Annotated

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field

from rlhf.rewards import load_reward
from rlhf.rewards.config import JudgeConfig
from rlhf.rewards.protocols import Sources, as_media, check_columns, frames_of
from rlhf.types import Item
from serve_apps import http
from serve_apps.batcher import Batcher

MAX_ITEMS = 64
MAX_BODY = 256 * 2**20
MAX_COLUMNS = 64

Column = Annotated[str, Field(max_length=100)]
ItemField = Annotated[dict[Column, Annotated[str, Field(max_length=http.MAX_TEXT)]], Field(max_length=MAX_COLUMNS)]


class ScoreRequest(BaseModel):
    image_base64: str = Field(description="PNG, JPEG or WEBP file, base64", examples=[http.EXAMPLE_IMAGE])
    prompt: str = Field(max_length=http.MAX_TEXT, examples=["a red apple"])
    source_base64: http.SourceField = None
    item: ItemField | None = Field(
        None,
        description="what is known of the product, column by column; the CTR model needs these four",
        examples=[{"food_name": "红烧肉", "food_type": "中式快餐", "city_name": "上海", "shop_name": "老王饭店"}],
    )


class ScoreResponse(BaseModel):
    score: float = Field(description="higher is better", examples=[0.271])


class BatchRequest(BaseModel):
    items: list[ScoreRequest] = Field(min_length=1, max_length=MAX_ITEMS)


class BatchResponse(BaseModel):
    scores: list[float] = Field(description="one per item, in order", examples=[[0.271, 0.254]])


class RewardApp:
    """One replica: a reward on one device, its batcher and its HTTP routes."""

    title = "Reward: a score of a picture, higher is better"

    def __init__(self, name: str, judge: JudgeConfig, *, secrets: http.Secrets, settings: str) -> None:
        self.name, self.judge = name, judge
        self._token, self._settings = secrets.token, settings
        reward = load_reward(name, judge, "cuda" if judge.num_gpus else "cpu")
        self.batcher = Batcher(reward, max_batch_size=judge.max_batch_size, batch_wait_s=judge.batch_wait_s)
        self.batcher.warm_up()
        # Requests beyond two batches wait as the bytes they came in: 64 times 64 decoded pictures would be 12 GB.
        self.room = asyncio.Semaphore(2 * judge.max_batch_size)

    async def score(self, media: np.ndarray, prompt: str, sources: Sources = (), item: Item | None = None) -> float:
        """Handle method. media, sources: uint8 (H, W, 3) or (F, H, W, 3).

        Raises: Refused (also where the item lacks a column that is needed), JudgeError.
        """
        check_columns(self.name, self.judge.item_columns, item or {})
        medium, *befores = (frames_of(as_media(array), self.judge.frames) for array in (media, *sources))
        return await self.batcher.score(medium, prompt, tuple(befores), item or {})

    async def reads_sources(self) -> bool:
        """Whether the reward reads sources; if not, callers need not send them."""
        return getattr(self.batcher.reward, "reads_sources", self.judge.reads_sources)

    async def settings(self) -> str:
        """Handle method: digest of the config that this app was deployed with."""
        return self._settings

    async def check_health(self) -> None:
        """Raise unless the model answers; Serve calls a replica ready only after one success."""
        await self.batcher.probe()

    def __serve_build_asgi_app__(self) -> FastAPI:
        reward = self.batcher.reward
        health = http.Health(model=self.name, version=reward.version, device=reward.device)
        api = http.create_api(self.title, health, self.check_health, token=self._token, max_body=MAX_BODY)
        self.add_routes(api)
        return api

    def add_routes(self, api: FastAPI) -> None:
        @api.post("/score", responses=http.PICTURE_ERRORS)
        async def score(request: ScoreRequest) -> ScoreResponse:
            return ScoreResponse(score=await self._score_request("", request))

        @api.post("/score_batch", responses=http.PICTURE_ERRORS)
        async def score_batch(request: BatchRequest) -> BatchResponse:
            asked = [self._score_request(f"items.{i}.", item) for i, item in enumerate(request.items)]
            scores = await asyncio.gather(*asked, return_exceptions=True)
            for score in scores:
                if isinstance(score, BaseException):
                    raise score  # the first in order, whichever was first in time
            return BatchResponse(scores=scores)

    async def _score_request(self, place: str, request: ScoreRequest) -> float:
        """place: what stands before the names of the request's fields, for messages."""
        async with self.room:
            image = await http.decode_field(f"{place}image_base64", request.image_base64)
            before = request.source_base64 if await self.reads_sources() else None
            sources = await http.decode_sources(f"{place}source_base64", before)
            return await self.score(image, request.prompt, sources, request.item)
