"""Light judges that are real HTTP services and pure functions of pixels: exact reruns need such.

    python -m tests.judge_server PORT [--reject SHARE] [--fail SHARE] [--failures FOLDER]

They speak the HTTP contract of the judges under /hpsv2, /ctr and /filter. The reward is warmth; the filter rejects a share of
all pictures, picked by a hash of their pixels; with --fail that share of the pictures answers 500, picked likewise, and
is written to FOLDER. A verdict tells in its reason whether the source photo came along.
"""

import argparse
import base64
import io
from pathlib import Path

import numpy as np
import uvicorn
import xxhash
from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image
from pydantic import BaseModel


class Request(BaseModel):
    image_base64: str
    prompt: str
    source_base64: str | None = None


class Batch(BaseModel):
    items: list[Request]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def chance(image: np.ndarray, salt: int) -> float:
    """0 … 1, uniform over pictures, the same for the same pixels."""
    return xxhash.xxh3_64_intdigest(image.tobytes(), seed=salt) / 2**64


def warmth(image: np.ndarray) -> float:
    means = image.reshape(-1, 3).mean(axis=0) / 255
    return float(means[0] - means[2])


def create(reject: float, fail: float, failures: Path | None) -> FastAPI:
    api = FastAPI()

    @api.post("/hpsv2/score")
    def score(request: Request) -> dict[str, float]:
        image = pixels(base64.b64decode(request.image_base64))
        if chance(image, 1) < fail:
            if failures:
                Image.fromarray(image).save(failures / f"{xxhash.xxh3_64_hexdigest(image.tobytes())}.png")
            raise HTTPException(500, "this judge fails on purpose")
        return {"score": warmth(image)}

    @api.post("/score_batch")
    def score_batch(batch: Batch) -> dict[str, list[float]]:
        return {"scores": [warmth(pixels(base64.b64decode(request.image_base64))) for request in batch.items]}

    @api.post("/ctr/predict")
    def predict(image: UploadFile) -> dict[str, object]:
        value = 0.05 + 0.01 * warmth(pixels(image.file.read()))
        return {"success": True, "data": {"ctr": value, "ctr_percent": f"{100 * value:.2f}%"}}

    @api.post("/filter/validate")
    def validate(request: Request) -> dict[str, object]:
        probability = chance(pixels(base64.b64decode(request.image_base64)), 2)
        valid = probability >= reject
        source = "the source photo too" if request.source_base64 else "the edit alone"
        return {"valid": valid, "reason": f"saw {source}", "pass_probability": probability}

    return api


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--reject", type=float, default=0.0)
    parser.add_argument("--fail", type=float, default=0.0)
    parser.add_argument("--failures", type=Path)
    arguments = parser.parse_args()
    uvicorn.run(
        create(arguments.reject, arguments.fail, arguments.failures),
        host="127.0.0.1",
        port=arguments.port,
        log_level="warning",
    )
