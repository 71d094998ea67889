"""The API filter over real HTTP: what it sends, and that no failure becomes a verdict."""

import asyncio
import base64
import math

import numpy as np
import pytest

from rlhf.data.media import decode_image
from rlhf.rewards.api_filter import APIFilter
from rlhf.rewards.config import FilterJudgeConfig
from rlhf.rewards.protocols import Filter, JudgeError
from tests.rlhf.rewards.openai_server import completion, openai_server

IMAGE = np.full((8, 8, 3), 120, np.uint8)
SOURCE = np.full((8, 8, 3), 10, np.uint8)


def ask(base, *, source=None, prompt="", api_key=None, **config):
    async def run():
        filter = APIFilter(FilterJudgeConfig(api_base=base, api_timeout_s=5, **config), api_key=api_key)
        assert isinstance(filter, Filter)
        try:
            return await filter.judge(IMAGE, source, prompt)
        finally:
            await filter.close()

    return asyncio.run(run())


def test_pass_with_probability_and_the_request_it_sent():
    def answer(body, headers):
        assert headers["Authorization"] == "Bearer secret"
        return 200, completion("PASS", {"PASS": math.log(0.6), "FAIL": math.log(0.2), "x": math.log(0.2)})

    with openai_server(answer) as (base, seen):
        verdict = ask(base, source=SOURCE, prompt="warmer", api_key="secret", model_name="qwen")
    assert verdict.valid and verdict.reason == "" and verdict.raw_response == "PASS"
    assert verdict.pass_probability == pytest.approx(0.75)
    assert len(seen) == 1 and seen[0]["model"] == "qwen"
    assert seen[0]["structured_outputs"] == {"choice": ["PASS", "FAIL"]} and seen[0]["temperature"] == 0
    urls = [part["image_url"]["url"] for part in seen[0]["messages"][1]["content"] if part["type"] == "image_url"]
    pictures = [decode_image(base64.b64decode(url.removeprefix("data:image/png;base64,"))) for url in urls]
    np.testing.assert_array_equal(pictures, [SOURCE, IMAGE])


def test_reason_is_asked_for_only_after_fail():
    def answer(body, headers):
        if len(body["messages"]) == 2:
            return 200, completion("FAIL", {"FAIL": 0.0})
        return 200, completion(" The logo is garbled. ")

    with openai_server(answer) as (base, seen):
        verdict = ask(base)
    assert not verdict.valid and verdict.reason == "The logo is garbled." and verdict.pass_probability == 0.0
    assert len(seen) == 2


def test_a_server_without_the_extras_is_asked_plainly():
    def answer(body, headers):
        return (400, {"error": "unknown field"}) if "logprobs" in body else (200, completion("PASS"))

    with openai_server(answer) as (base, seen):
        verdict = ask(base)
    assert verdict.valid and verdict.pass_probability is None
    assert ["logprobs" in body for body in seen] == [True, False]


@pytest.mark.parametrize(
    "reply",
    [
        (200, completion("Looks fine to me")),
        (200, completion("")),
        (200, completion(None)),
        (200, completion("PASS", {"maybe": 0.0})),
        (200, {"choices": []}),
        (200, b"not json"),
        (200, b"[]"),
        (500, {"error": "out of memory"}),
        (400, {"error": "bad request, extras or not"}),
    ],
)
def test_no_failure_becomes_a_verdict(reply):
    with openai_server(lambda body, headers: reply) as (base, _), pytest.raises(JudgeError):
        ask(base)


def test_an_unreachable_server_is_an_error():
    with pytest.raises(JudgeError, match="ConnectError"):
        ask("http://127.0.0.1:9/v1")


def test_environment_is_the_last_resort(monkeypatch):
    monkeypatch.setenv("QWEN_API_BASE", "http://x/v1")
    monkeypatch.setenv("QWEN_MODEL_NAME", "qwen-small")
    found = FilterJudgeConfig().from_environment()
    assert (found.api_base, found.model_name) == ("http://x/v1", "qwen-small")
    assert FilterJudgeConfig(path="/models/q").from_environment().api_base is None
    monkeypatch.delenv("QWEN_API_BASE")
    assert FilterJudgeConfig().from_environment().api_base is None
