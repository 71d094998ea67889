"""What an operator sees of a judge: its metrics on the node's Prometheus endpoint, and /health when its model breaks."""

import re
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from ray import serve

from rlhf.data.media import encode_base64
from rlhf.rewards.config import JudgesConfig, ServeConfig
from rlhf.rewards.protocols import JudgeError
from serve_apps import deploy
from tests.conftest import SERVE_PORT
from tests.serve_apps.conftest import TOKEN

NAME = "moody"
BREAKER = None


def brightness(images, prompts, items):
    """A judge that breaks while the file exists whose path a prompt told it."""
    global BREAKER
    for prompt in prompts:
        BREAKER = Path(prompt) if prompt.startswith("/") else BREAKER
    if BREAKER and BREAKER.exists():
        raise OSError("the card has fallen off the bus")
    return [image.mean() for image in images]


@pytest.fixture(scope="module")
def moody(cluster):
    judge = {"function": f"{__name__}:brightness", "num_cpus": 0.1, "max_batch_size": 4, "batch_wait_s": 0.0}
    judges = JudgesConfig.model_validate({"python": {NAME: judge}, "deploy_timeout_s": 240})
    section = ServeConfig(port=SERVE_PORT, token=TOKEN, route_prefix="/metrics")
    yield deploy.deploy(judges, section, [NAME], "metrics")
    deploy.undeploy("metrics", [NAME])


@pytest.fixture
def client(moody):
    with httpx.Client(base_url=moody.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        yield client


def question(brightness, prompt=""):
    return {"image_base64": encode_base64(np.full((8, 8, 3), brightness, np.uint8)), "prompt": prompt}


def exported():
    """Every sample of the judge: (metric, upper bound of the bucket or "") → value."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    samples = re.findall(rf'^ray_rlhf_judge_(\w+)\{{(.*judge="{NAME}".*)\}} (\S+)$', text, re.MULTILINE)
    bounds = [re.search(r'le="([^"]+)"', labels) for _, labels, _ in samples]
    return {
        (name, bound[1] if bound else ""): float(value) for (name, _, value), bound in zip(samples, bounds, strict=True)
    }


def test_metrics_count_the_requests_the_forwards_and_the_failures(moody, client, tmp_path):
    breaker = tmp_path / "breaker"
    for number in range(5):
        answer = client.post(f"/{NAME}/score", json=question(number, str(breaker)))
        assert answer.json() == {"score": number}
    breaker.touch()
    assert client.post(f"/{NAME}/score", json=question(1)).status_code == 502
    with pytest.raises(JudgeError, match="fallen off the bus"):
        serve.get_app_handle(moody.apps[NAME]).score.remote(np.ones((8, 8, 3), np.uint8), "").result(timeout_s=60)
    breaker.unlink()

    expected = {
        ("latency_seconds_count", ""): 5,
        ("batch_size_count", ""): 7,
        ("batch_size_bucket", "1.0"): 7,
        ("failures_total", ""): 2,
    }
    deadline = time.monotonic() + 90
    while not expected.items() <= exported().items():
        assert time.monotonic() < deadline, exported()
        time.sleep(0.5)
    seconds = [value for (name, _), value in exported().items() if name == "latency_seconds_bucket"]
    assert seconds == sorted(seconds) and seconds[-1] == 5


def test_health_turns_with_the_model(client, tmp_path):
    breaker = tmp_path / "breaker"
    assert client.post(f"/{NAME}/score", json=question(7, str(breaker))).status_code == 200
    assert client.get(f"/{NAME}/health").json()["model"] == NAME
    breaker.touch()
    assert client.post(f"/{NAME}/score", json=question(7)).status_code == 502
    sick = client.get(f"/{NAME}/health")
    assert sick.status_code == 503 and "fallen off the bus" in sick.json()["detail"]
    breaker.unlink()
    assert client.get(f"/{NAME}/health").status_code == 200
    assert client.post(f"/{NAME}/score", json=question(7)).json() == {"score": 7}
