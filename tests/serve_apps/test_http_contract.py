"""The HTTP contract (serve_apps/README.md) against the running apps, with the payloads of FEAST's clients."""

import asyncio
import base64
import io
import re
import threading

import httpx
import numpy as np
import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from PIL import Image

from rlhf.data.media import encode_base64, encode_png
from rlhf.errors import Refused
from rlhf.rewards import load_reward
from rlhf.rewards.config import CTRJudgeConfig, FilterJudgeConfig, HPSJudgeConfig, HTTPJudgeConfig, PythonJudgeConfig
from rlhf.rewards.protocols import JudgeError
from rlhf.rewards.remote import RemoteJudge
from serve_apps import http
from serve_apps.http import Secrets, create_api, decode_field
from serve_apps.rewards import RewardApp
from tests.rlhf.rewards.asking import ctr_reward, hps_reward, score
from tests.serve_apps.conftest import ITEM, ROUNDING, TOKEN


@pytest.fixture(scope="module")
def hps(models):
    return hps_reward(models / "hps.pt", batch_rows=16)


APPS = ("/filter", "/hpsv2", "/ctr")


def predicted(rate):
    """What /ctr/predict may answer: rounded to 6 places."""
    return pytest.approx(rate, rel=0, abs=ROUNDING + 0.5e-6)


def form(**changes):
    return {name: value for name, value in (ITEM | changes).items() if value is not None}


def test_score_is_the_models(client, hps, picture):
    response = client.post("/hpsv2/score", json={"image_base64": encode_base64(picture), "prompt": "一个苹果"})
    assert response.status_code == 200
    expected = score(hps, [picture], ["一个苹果"])[0]
    assert response.json() == {"score": pytest.approx(expected, rel=0, abs=ROUNDING)}


def test_score_batch_keeps_order(client, hps):
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8) for i in range(20)]
    prompts = [f"prompt {i}" for i in range(20)]
    items = [{"image_base64": encode_base64(a), "prompt": b} for a, b in zip(pictures, prompts, strict=True)]
    response = client.post("/hpsv2/score_batch", json={"items": items})
    expected = score(hps, pictures, prompts)
    assert np.diff(sorted(expected)).min() > 2 * ROUNDING, "another order would not show"
    assert response.json() == {"scores": pytest.approx(expected, rel=0, abs=ROUNDING)}


def test_predict_is_the_models(client, models, picture):
    rate = score(ctr_reward(models / "ctr", batch_rows=4), [picture], [""], [ITEM])[0]
    response = client.post("/ctr/predict", data=form(), files={"image": ("a.png", encode_png(picture), "image/png")})
    assert response.status_code == 200
    answer = response.json()
    assert answer == {"success": True, "data": {"ctr": predicted(rate), "ctr_percent": answer["data"]["ctr_percent"]}}
    assert re.fullmatch(r"\d+\.\d\d%", answer["data"]["ctr_percent"])
    percent = float(answer["data"]["ctr_percent"][:-1])
    assert percent == pytest.approx(100 * rate, rel=0, abs=100 * ROUNDING + 0.5e-2)


def test_validate_with_and_without_source(client, picture):
    body = {"image_base64": encode_base64(picture), "prompt": "warmer"}
    before = encode_base64(255 - picture)
    for extra in ({}, {"source_base64": before}, {"source_base64": None}, {"source_base64": [before, before]}):
        answer = client.post("/filter/validate", json=body | extra).json()
        assert answer.pop("pass_probability") == pytest.approx(np.exp(-3) / (np.exp(-3) + np.exp(-0.05)))
        assert answer == {"valid": False, "reason": "Too dark.", "raw_response": "FAIL"}


def test_a_broken_filter_is_an_error_and_not_a_verdict(client, picture):
    response = client.post("/filter/validate", json={"image_base64": encode_base64(picture), "prompt": "break"})
    assert response.status_code == 502 and "valid" not in response.json() and "500" in response.json()["detail"]


@pytest.mark.parametrize("app", APPS)
def test_health_and_docs(client, app):
    health = client.get(f"{app}/health")
    assert health.status_code == 200 and set(health.json()) == {"model", "version", "device"}
    assert "@" in health.json()["version"]
    assert client.get(f"{app}/docs").status_code == 200
    assert "/health" in client.get(f"{app}/openapi.json").json()["paths"]


ROUTE_LIST = [
    ("POST", "/hpsv2/score"),
    ("POST", "/hpsv2/score_batch"),
    ("POST", "/ctr/score"),
    ("POST", "/ctr/score_batch"),
    ("POST", "/ctr/predict"),
    ("POST", "/filter/validate"),
    *[("GET", f"{app}/{route}") for app in APPS for route in ("health", "docs", "openapi.json")],
]


@pytest.mark.parametrize(("method", "route"), ROUTE_LIST)
@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
def test_every_route_asks_for_the_token(judges, method, route, header):
    response = httpx.request(method, judges.url + route, headers=header, timeout=30)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "GIF")
    return buffer.getvalue()


BAD_FILES = [
    (b"", 400),
    (b"no picture at all", 400),
    (encode_png(np.zeros((64, 64, 3), np.uint8))[:-30], 400),
    (gif(), 415),
    (b"\x89PNG\r\n\x1a\n" + bytes(32 * 2**20), 413),
]


@pytest.mark.parametrize(("data", "status"), BAD_FILES, ids=["empty", "text", "truncated", "gif", "too long"])
def test_bad_pictures_name_the_field(client, picture, data, status):
    text = base64.b64encode(data).decode()
    good = {"image_base64": encode_base64(picture), "prompt": ""}
    bad = good | {"image_base64": text}
    cases = {
        "image_base64": client.post("/hpsv2/score", json=bad),
        "items.1.image_base64": client.post("/hpsv2/score_batch", json={"items": [good, bad]}),
        "image": client.post("/ctr/predict", data=form(), files={"image": ("x.png", data)}),
        "source_base64": client.post("/filter/validate", json=good | {"source_base64": text}),
        "source_base64.1": client.post("/filter/validate", json=good | {"source_base64": [good["image_base64"], text]}),
    }
    for field, response in cases.items():
        assert response.status_code == status and response.json()["detail"].startswith(f"{field}: "), field


def test_more_than_forty_megapixels(client):
    buffer = io.BytesIO()
    Image.new("1", (8000, 5001)).save(buffer, "PNG")
    response = client.post(
        "/hpsv2/score", json={"image_base64": base64.b64encode(buffer.getvalue()).decode(), "prompt": ""}
    )
    assert response.status_code == 413 and "8000×5001" in response.json()["detail"]


def test_missing_and_wrong_fields(client, picture):
    text, file = encode_base64(picture), {"image": ("x.png", encode_png(picture))}
    good = {"image_base64": text, "prompt": "x"}
    bad_items = ({"price": 3}, {"x": "y" * 10_001}, {"x" * 101: "y"}, {str(i): "" for i in range(65)}, ["price"])
    cases = [
        (client.post("/hpsv2/score", json={"prompt": "x"}), "image_base64"),
        (client.post("/hpsv2/score", json={"image_base64": text}), "prompt"),
        (client.post("/hpsv2/score", json={"image_base64": 7, "prompt": "x"}), "image_base64"),
        (client.post("/hpsv2/score", content=b"{", headers={"content-type": "application/json"}), ""),
        (client.post("/hpsv2/score_batch", json={"items": [{"prompt": "x"}]}), "items.0.image_base64"),
        (client.post("/hpsv2/score_batch", json={"items": []}), "items"),
        (client.post("/hpsv2/score_batch", json={"items": [{"image_base64": "", "prompt": ""}] * 65}), "items"),
        (client.post("/ctr/predict", data=form()), "image"),
        *[(client.post("/ctr/predict", data=form(**{name: None}), files=file), name) for name in ITEM],
        (client.post("/filter/validate", json={"prompt": "x"}), "image_base64"),
        (client.post("/filter/validate", json={"image_base64": text, "source_base64": [text] * 5}), "source_base64"),
        *[(client.post("/hpsv2/score", json=good | {"item": item}), "item") for item in bad_items],
    ]
    for response, field in cases:
        named = {part for p in response.json()["detail"] for part in (p["field"], p["field"].split(".")[0])}
        assert response.status_code == 422 and field in named | {""}
        assert "score" not in response.json() and len(response.text) < 500  # the request is not echoed back


def test_overload_is_503_with_retry_after(judges, models):
    picture = np.random.default_rng(2).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    expected = score(ctr_reward(models / "ctr", batch_rows=4), [picture], [""], [ITEM])[0]
    file = encode_png(picture)

    async def flood():
        limits = httpx.Limits(max_connections=48)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(headers=headers, timeout=60, limits=limits) as client:
            url = f"{judges.url}/ctr/predict"
            return await asyncio.gather(
                *[client.post(url, data=form(), files={"image": ("x.png", file)}) for _ in range(48)]
            )

    responses = asyncio.run(flood())
    assert {response.status_code for response in responses} == {200, 503}
    for response in responses:
        if response.status_code == 200:
            assert response.json()["data"]["ctr"] == predicted(expected)
        else:
            assert int(response.headers["retry-after"]) >= 1


def test_the_remote_client_speaks_the_contract(judges, hps, models, picture):
    async def ask():
        known = {
            "hps": HPSJudgeConfig(url=f"{judges.url}/hpsv2", token=TOKEN),
            "ctr": CTRJudgeConfig(url=f"{judges.url}/ctr", token=TOKEN),
            "filter": FilterJudgeConfig(url=f"{judges.url}/filter", token=TOKEN),
            "stranger": HPSJudgeConfig(url=f"{judges.url}/hpsv2"),
        }
        remote = {name: RemoteJudge(judge) for name, judge in known.items()}
        try:
            with pytest.raises(JudgeError, match="401"):
                await remote["stranger"].score(picture, "x")
            with pytest.raises(JudgeError, match="502"):
                await remote["filter"].judge(picture, (), "break")
            with pytest.raises(Refused, match="missing: food_name"):
                await remote["ctr"].score(picture, "")
            return (
                await remote["hps"].score(picture, "x"),
                await remote["ctr"].score(picture, "", (), ITEM | {"price": "3"}),
                await remote["filter"].judge(picture, (255 - picture,), "warmer"),
            )
        finally:
            for client in remote.values():
                await client.close()

    found, rate, verdict = asyncio.run(ask())
    assert found == pytest.approx(score(hps, [picture], ["x"])[0], rel=0, abs=ROUNDING)
    assert rate == predicted(score(ctr_reward(models / "ctr", batch_rows=4), [picture], [""], [ITEM])[0])
    assert not verdict.valid and verdict.reason == "Too dark." and 0 < verdict.pass_probability < 0.1


def test_score_batch_is_a_judge_by_http(judges, models, picture):
    """`judges.http` speaks what /score_batch of every reward here answers."""
    asked = [picture, 255 - picture], ["", ""], [ITEM] * 2
    expected = score(ctr_reward(models / "ctr", batch_rows=4), *asked)
    reward = load_reward("clicks", HTTPJudgeConfig(url=f"{judges.url}/ctr/score_batch", token=TOKEN), "cpu")
    assert abs(expected[0] - expected[1]) > 2 * ROUNDING, "a mixed-up answer would not show"
    assert score(reward, *asked) == pytest.approx(expected, rel=0, abs=ROUNDING)
    with pytest.raises(JudgeError, match=r"score_batch: status 422.*missing: food_name"):
        score(reward, [picture], [""])
    stranger = load_reward("clicks", HTTPJudgeConfig(url=f"{judges.url}/ctr/score_batch"), "cpu")
    with pytest.raises(JudgeError, match="status 401"):
        score(stranger, [picture], [""], [ITEM])


def test_a_defect_is_a_500_that_tells_no_secrets():
    api = create_api("a judge", None, None, token=None, max_body=100)

    @api.get("/broken")
    async def broken():
        raise KeyError("the password is 1234")

    response = TestClient(api, raise_server_exceptions=False).get("/broken")
    assert response.status_code == 500 and response.json() == {"detail": "KeyError; details are in the replica's log"}


def test_a_long_body_is_refused_by_its_header_and_as_it_streams_in():
    api = create_api("a judge", None, None, token=None, max_body=100)

    @api.post("/")
    async def length(request: Request) -> int:
        return len(await request.body())

    client = TestClient(api)
    assert client.post("/", content=bytes(100)).json() == 100
    for body in (bytes(101), iter([bytes(60), bytes(60)])):
        assert client.post("/", content=body).status_code == 413


GATE = threading.Event()


def wait_for_the_gate(images, prompts, items):
    assert GATE.wait(timeout=30)
    return [0.0] * len(images)


def test_a_large_batch_is_decoded_two_forwards_at_a_time(monkeypatch, picture):
    """64 small files may be 64 pictures of 40 megapixels: most of them wait as the bytes they came in."""
    GATE.set()  # for the warm-up
    judge = PythonJudgeConfig(function=f"{__name__}:wait_for_the_gate", max_batch_size=2, batch_wait_s=0.0)
    app = RewardApp("slow", judge, secrets=Secrets(), settings="")
    GATE.clear()
    decoded = []

    async def counting(field, text):
        decoded.append(field)
        if len(decoded) == 4:  # two in the forward, two that wait for it
            opening.start()
        return await decode_field(field, text)

    def then_open():
        early.extend(decoded)
        GATE.set()

    early, opening = [], threading.Timer(0.5, then_open)
    monkeypatch.setattr(http, "decode_field", counting)
    items = [{"image_base64": encode_base64(picture), "prompt": ""}] * 64
    response = TestClient(app.__serve_build_asgi_app__()).post("/score_batch", json={"items": items})
    assert response.json() == {"scores": [0.0] * 64}
    assert len(early) == 4 and len(decoded) == 64


def sources_seen(images, prompts, sources, items):
    return [float(sum(source.mean() for source in some)) for some in sources]


def test_sources_reach_a_judge_that_reads_them_and_are_not_decoded_for_another(picture):
    def client(function):
        judge = PythonJudgeConfig(function=f"{__name__}:{function}", batch_wait_s=0.0)
        app = RewardApp("mine", judge, secrets=Secrets(), settings="")
        return TestClient(app.__serve_build_asgi_app__())

    one, two = (encode_base64(np.full((4, 4, 3), value, np.uint8)) for value in (1, 20))
    asked = [{"image_base64": encode_base64(picture), "prompt": ""} for _ in range(3)]
    given = [asked[0], asked[1] | {"source_base64": one}, asked[2] | {"source_base64": [one, two]}]
    reader = client("sources_seen")
    assert reader.post("/score_batch", json={"items": given}).json() == {"scores": [0.0, 1.0, 21.0]}
    assert reader.post("/score", json=given[2]).json() == {"score": 21.0}
    bad = asked[0] | {"source_base64": ["no picture"]}
    refused = reader.post("/score_batch", json={"items": [asked[0], bad]})
    assert refused.status_code == 400 and refused.json()["detail"].startswith("items.1.source_base64.0: ")
    GATE.set()
    assert client("wait_for_the_gate").post("/score", json=bad).json() == {"score": 0.0}
