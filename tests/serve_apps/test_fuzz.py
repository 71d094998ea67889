"""Requests that no client of ours would send: whatever comes in, the answer is a documented one, and a 5xx never.

Schemathesis reads each app's OpenAPI document and sends what it allows and what it forbids; hypothesis damages pictures.
All is derandomised: a failure comes back in the next run.
"""

import base64
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_apps.http import EXAMPLE_IMAGE
from tests.rlhf.rewards.pictures import damaged_files
from tests.serve_apps.conftest import ITEM, TOKEN

APPS = ("/hpsv2", "/ctr", "/filter")
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


@pytest.mark.parametrize("app", APPS)
def test_every_schema(judges, app, tmp_path):
    command = [SCHEMATHESIS, "run", f"{judges.url}{app}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}"]
    # Left out is the check that what the schema allows is accepted: it allows any text as a picture.
    command += ["--phases", "examples,coverage,fuzzing", "--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", "30", "--generation-deterministic", "--continue-on-failure", "--no-color"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Coverage" in run.stdout and "0 generated" not in run.stdout


def example(schema, definitions):
    """The request that a reader of the documentation would send: each property's first example, down to the leaves."""
    if "$ref" in schema:
        return example(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "examples" in schema:
        return schema["examples"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0], definitions)
    if schema["type"] == "array":
        return [example(schema["items"], definitions)]
    if schema["type"] == "object":
        return {name: example(value, definitions) for name, value in schema["properties"].items()}
    assert schema.get("contentMediaType") == "application/octet-stream", f"no example of {schema}"
    return base64.b64decode(EXAMPLE_IMAGE)


@pytest.mark.parametrize("app", APPS)
def test_documented_examples_can_be_sent_as_they_stand(client, app):
    document = client.get(f"{app}/openapi.json").json()
    definitions, sent = document["components"]["schemas"], 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            for kind, body in content.items():
                values = example(body["schema"], definitions)
                if kind == "application/json":
                    request = {"json": values}
                else:
                    request = {"files": {"image": values.pop("image")}, "data": values}
                response = client.request(method, app + path, **request)
                assert response.status_code == 200, (path, response.text)
                sent += 1
    assert sent == {"/hpsv2": 2, "/ctr": 3, "/filter": 1}[app]


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=damaged_files(), prompt=st.text(max_size=20).filter(lambda text: "break" not in text))
def test_damaged_pictures_are_scored_or_refused_by_field(client, data, prompt):
    body = {"image_base64": base64.b64encode(data).decode(), "prompt": prompt}
    answers = {
        "image_base64": client.post("/hpsv2/score", json=body),
        "items.0.image_base64": client.post("/ctr/score_batch", json={"items": [body | {"item": ITEM}]}),
        "image": client.post("/ctr/predict", files={"image": data}, data=ITEM),
        "source_base64": client.post(
            "/filter/validate", json={"image_base64": EXAMPLE_IMAGE, "source_base64": body["image_base64"]}
        ),
    }
    assert len({response.status_code for response in answers.values()}) == 1
    for field, response in answers.items():
        assert response.status_code in (200, 400, 413, 415), (field, response.text)
        assert response.status_code == 200 or response.json()["detail"].startswith(f"{field}: ")


BODIES = {
    "not UTF-8": b'{"image_base64": "\xff", "prompt": ""}',
    "cut off": b'{"image_base64": "',
    "too deep": b"[" * 100_000,
    "half a character": b'{"image_base64": "\\ud800", "prompt": "\\ud800"}',
    "half a character in a key": b'{"\\ud800": 1}',
    "a number of a million digits": b'{"image_base64": ' + b"9" * 1_000_000 + b"}",
    "not a number": b'{"image_base64": NaN, "prompt": Infinity}',
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "too long a text": b'{"image_base64": "%s", "prompt": "%s"}' % (EXAMPLE_IMAGE.encode(), b"a" * 10_001),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("route", ["/hpsv2/score", "/ctr/score_batch", "/filter/validate"])
def test_bodies_that_are_no_request(client, route, name):
    body = BODIES[name]
    if route.endswith("score_batch") and body.startswith(b'{"image'):
        body = b'{"items": [' + body + b"]}"
    response = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422) and "detail" in response.json(), response.text
    assert len(response.text) < 1000  # the request is not echoed back


@pytest.mark.parametrize(
    "content_type", ["application/json", "multipart/form-data", "multipart/form-data; boundary=x", "text/plain", ""]
)
def test_a_form_that_is_none(client, content_type):
    for body in (b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data; name=image\r\n\r\n", b"{}"):
        response = client.post("/ctr/predict", content=body, headers={"Content-Type": content_type})
        assert response.status_code in (400, 422) and "detail" in response.json(), response.text
