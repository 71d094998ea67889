"""serve_apps/README.md: its curl commands run as they are written, and its table of pictures is what happens."""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rlhf.data.media import encode_png
from serve_apps import http
from tests.rlhf.rewards.pictures import KINDS
from tests.serve_apps.conftest import ITEM, TOKEN

README = Path(http.__file__).with_name("README.md").read_text()
COMMANDS = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "curl" in block]


def keys(answer):
    """The answer with the type of every value in its place."""
    return {key: keys(value) for key, value in answer.items()} if isinstance(answer, dict) else type(answer)


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="bash or curl is not installed")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.search(r"localhost:8000(\S+)", command)[1])
def test_curl_commands_work_as_written(judges, command, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("dish.jpg", "before.jpg"):  # noise: a file of 3 MB, 30 times what an argument of a command may hold
        (tmp_path / name).write_bytes(encode_png(rng.integers(0, 256, (1200, 900, 3), dtype=np.uint8)))
    promised = json.loads(re.search(r"^# (\{.*\})$", command, re.MULTILINE)[1])
    script = command.replace("http://localhost:8000", judges.url)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"RLHF_SERVE_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert keys(json.loads(run.stdout)) == keys(promised)


def test_the_three_clients_are_there():
    assert len(COMMANDS) == 3
    for route in ("/hpsv2/score", "/ctr/predict", "/filter/validate"):
        assert sum(f"localhost:8000{route} " in command for command in COMMANDS) == 1


ROWS = dict(re.findall(r"^\| ([^|]+?) \| (\d{3})\b[^|]*\|$", README.partition("| Picture | Answer |")[2], re.MULTILINE))


def test_every_kind_of_picture_is_in_the_table():
    assert set(ROWS) == set(KINDS)


@pytest.mark.parametrize("kind", ROWS)
def test_the_answer_to_every_kind_of_picture(client, kind):
    for data in KINDS[kind]():
        text = base64.b64encode(data).decode()
        answers = {
            "image_base64": client.post("/hpsv2/score", json={"image_base64": text, "prompt": ""}),
            "image": client.post("/ctr/predict", data=ITEM, files={"image": ("x.png", data, "image/png")}),
        }
        if len(data) < 2**20:  # the same decoder: one more long upload would tell nothing
            body = {"image_base64": text, "source_base64": text}
            answers["image_base64: "] = client.post("/filter/validate", json=body)
        for field, response in answers.items():
            assert response.status_code == int(ROWS[kind]), (field, response.text)
            assert response.status_code == 200 or response.json()["detail"].startswith(field)
