"""The filter on real vLLM: a tiny Qwen3-VL behind the real app."""

import asyncio

import httpx
import numpy as np
import pytest

from rlhf.rewards.images import encode_base64
from serve_apps.deploy import deploy, undeploy
from tests.serve_apps.conftest import TOKEN, config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vllm(cluster, models):
    filter = {"path": str(models / "qwen"), "max_model_len": 1024, "max_reason_tokens": 8, "dtype": "float32"}
    elsewhere = {"url": "http://127.0.0.1:9"}
    yield deploy(config(models, reward="hps", hps=elsewhere, filter=filter, route_prefix="/vllm"), "vllm")
    undeploy("vllm")


def pictures(count):
    rng = np.random.default_rng(0)
    return [(rng.random((64 + 8 * (i % 5), 96, 3)) * 255 * (i + 1) / count).astype(np.uint8) for i in range(count)]


def test_verdicts_come_from_the_pixels_and_keep_to_the_two_words(vllm):
    async def ask():
        handle = vllm.handle("filter")
        return await asyncio.gather(*[handle.judge.remote(picture, None, "warmer") for picture in pictures(24)])

    verdicts = asyncio.run(ask())
    assert {verdict.raw_response for verdict in verdicts} <= {"PASS", "FAIL"}
    assert len({round(verdict.pass_probability, 4) for verdict in verdicts}) > 12
    for verdict in verdicts:
        assert 0 < verdict.pass_probability < 1
        assert verdict.valid == (verdict.pass_probability >= 0.5) == (verdict.raw_response == "PASS")
        assert verdict.valid or verdict.reason
        assert not (verdict.valid and verdict.reason)


def test_the_source_and_the_instruction_matter(vllm):
    image, source = pictures(2)
    handle = vllm.handle("filter")
    cases = [(image, None, ""), (image, source, ""), (image, None, "红烧肉"), (source, None, "")]
    found = [handle.judge.remote(*case).result(timeout_s=120).pass_probability for case in cases]
    assert len(set(found)) == 4
    again = handle.judge.remote(*cases[1]).result(timeout_s=120).pass_probability
    assert again == pytest.approx(found[1], abs=1e-3)


def test_http_and_health(vllm):
    body = {"image_base64": encode_base64(pictures(1)[0]), "prompt": "warmer"}
    with httpx.Client(base_url=vllm.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        answer = client.post("/filter/validate", json=body).json()
        assert set(answer) == {"valid", "reason", "raw_response", "pass_probability"}
        health = client.get("/filter/health")
        assert health.status_code == 200 and health.json()["model"] == "filter"
        long = client.post("/filter/validate", json=body | {"prompt": "很长的指令" * 500})
        assert long.status_code == 422 and "valid" not in long.json()
