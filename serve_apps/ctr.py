"""The CTR app: what every reward's app has, and POST /ctr/predict (multipart), as FEAST's clients send it."""

from typing import Annotated

from fastapi import FastAPI, File, Form, UploadFile
from pydantic import BaseModel, Field

from serve_apps.http import MAX_TEXT, PICTURE_ERRORS, decode_field
from serve_apps.rewards import RewardApp


class Prediction(BaseModel):
    ctr: Annotated[float, Field(description="predicted click rate, 0 to 1, six decimals", examples=[0.052341])]
    ctr_percent: Annotated[str, Field(description="the same as text", examples=["5.23%"])]


class PredictResponse(BaseModel):
    success: bool
    data: Prediction


class CTRApp(RewardApp):
    title = "CTR: predicted click rate of a product photo"

    def add_routes(self, api: FastAPI) -> None:
        super().add_routes(api)

        @api.post("/predict", responses=PICTURE_ERRORS)
        async def predict(
            image: Annotated[UploadFile, File(description="PNG, JPEG or WEBP file")],
            food_name: Annotated[str, Form(max_length=MAX_TEXT, examples=["红烧肉"])],
            food_type: Annotated[str, Form(max_length=MAX_TEXT, examples=["中式快餐"])],
            city_name: Annotated[str, Form(max_length=MAX_TEXT, examples=["上海"])],
            shop_name: Annotated[str, Form(max_length=MAX_TEXT, examples=["老王饭店"])],
        ) -> PredictResponse:
            item = {"food_name": food_name, "food_type": food_type, "city_name": city_name, "shop_name": shop_name}
            async with self.room:
                rate = await self.score(await decode_field("image", await image.read()), "", item=item)
            return PredictResponse(success=True, data=Prediction(ctr=round(rate, 6), ctr_percent=f"{rate:.2%}"))
