"""The CTR app: POST /ctr/predict (multipart) outside, `score` by deployment handle inside.

Handle: `await handle.score.remote(image, prompt, item)` → predicted click rate, `prompt` unused, `item` required. How
object references arrive: see `serve_apps.hpsv2`.
"""

from typing import Annotated

import numpy as np
import torch
from fastapi import FastAPI, File, Form, UploadFile
from pydantic import BaseModel, Field
from ray import serve

from rlhf.rewards.config import JudgeConfig
from rlhf.rewards.ctr import CTRReward
from rlhf.rewards.images import MAX_BYTES
from rlhf.types import Item
from serve_apps.batcher import Batcher, options
from serve_apps.http import Health, create_api, decode_upload

MAX_BODY = MAX_BYTES + 2**20


class Prediction(BaseModel):
    ctr: Annotated[float, Field(description="predicted click rate, 0 to 1, six decimals")]
    ctr_percent: Annotated[str, Field(description='the same as text, "5.23%"')]


class PredictResponse(BaseModel):
    success: bool
    data: Prediction


class CTRApp:
    """One replica: a reward on one device, its batcher and its HTTP route."""

    def __init__(self, judge: JudgeConfig, *, token: str | None, settings: str) -> None:
        assert judge.path is not None
        reward = CTRReward(
            judge.path,
            device="cuda" if judge.num_gpus else "cpu",
            dtype=getattr(torch, judge.dtype),
            batch_rows=judge.max_batch_size if judge.pad_batches else None,
        )
        self.batcher = Batcher(reward, max_batch_size=judge.max_batch_size, batch_wait_s=judge.batch_wait_s)
        self.token = token
        self._settings = settings

    async def score(self, image: np.ndarray, prompt: str, item: Item | None = None) -> float:
        """Handle method. image: uint8 (H, W, 3). Raises: ValueError (also where `item` is None), JudgeError."""
        if item is None:
            raise ValueError(
                "the CTR reward needs the item of the picture (food_name, food_type, city_name, shop_name)"
            )
        return await self.batcher.score(image, prompt, item)

    async def settings(self) -> str:
        """Digest of the config that this app was deployed with."""
        return self._settings

    async def check_health(self) -> None:
        await self.batcher.probe()

    def describe(self) -> Health:
        reward = self.batcher.reward
        return Health(model="ctr", version=reward.version, device=reward.device)

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api("CTR: predicted click rate of a product photo", self, token=self.token, max_body=MAX_BODY)

        @api.post("/predict")
        async def predict(
            image: Annotated[UploadFile, File(description="PNG, JPEG or WEBP file")],
            food_name: Annotated[str, Form()],
            food_type: Annotated[str, Form()],
            city_name: Annotated[str, Form()],
            shop_name: Annotated[str, Form()],
        ) -> PredictResponse:
            pixels = await decode_upload("image", await image.read())
            item = Item(food_name=food_name, food_type=food_type, city_name=city_name, shop_name=shop_name)
            rate = await self.score(pixels, "", item)
            return PredictResponse(success=True, data=Prediction(ctr=round(rate, 6), ctr_percent=f"{rate:.2%}"))

        return api


def build_ctr(judge: JudgeConfig, *, token: str | None = None, settings: str = "") -> serve.Application:
    """The Serve application of `judges.ctr`."""
    deployment = serve.deployment(**options("CTR", judge))(serve.ingress()(CTRApp))
    return deployment.bind(judge, token=token, settings=settings)
