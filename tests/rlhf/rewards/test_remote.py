"""Services elsewhere: what they are sent, and that no proxy is asked about this machine."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest

from rlhf.rewards.config import CTRJudgeConfig, FilterJudgeConfig, HTTPJudgeConfig
from rlhf.rewards.protocols import JudgeError
from rlhf.rewards.remote import HTTPReward, RemoteJudge

MEDIUM = np.zeros((1, 2, 2, 3), np.uint8)


@contextmanager
def answering(body: bytes):
    """The address of a server that answers 200 with `body`, whatever it is asked."""

    class Handler(Service):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Service(BaseHTTPRequestHandler):
    """Answers with a score of 1 for each item and remembers what it was sent."""

    seen: ClassVar[list] = []

    def do_POST(self):
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        self.seen.append((self.headers["Authorization"], rows))
        body = json.dumps({"scores": [1.0] * len(rows)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ODD_SCORES = {
    b'{"scores": [1.0]}': "`scores` is no list of 2",
    b'{"scores": [1.0, 2.0, 3.0]}': "`scores` is no list of 2",
    b'{"scores": {"0": 1.0, "1": 2.0}}': "`scores` is no list of 2",
    b'{"score": 1.0}': "`scores` is no list of 2",
    b'{"scores": [1.0, NaN]}': r"`scores\[1\]` is 'nan', not a finite number",
    b'{"scores": [1.0, Infinity]}': r"`scores\[1\]` is 'inf'",
    b'{"scores": [1.0, "0.5"]}': r"`scores\[1\]` is '0.5', not a finite number",
    b'{"scores": [true, 1.0]}': r"`scores\[0\]` is 'True'",
    b'{"scores": [null, 1.0]}': r"`scores\[0\]` is 'None'",
    b'{"scores": [1.0, 1' + b"0" * 400 + b"]}": r"`scores\[1\]` is '1000",
    b"[1.0, 2.0]": "not a JSON object",
    b"<html>gateway</html>": "not JSON: '<html>gateway",
    b"": "not JSON",
    b"[" * 100_000: "not JSON",
}
ODD_VERDICTS = {
    b'{"valid": "yes"}': "`valid` is neither true nor false: .*yes",
    b'{"valid": true, "pass_probability": "0.9"}': "`pass_probability` is '0.9', not a number from 0 to 1",
    b'{"valid": true, "pass_probability": 7}': "`pass_probability` is '7', not a number from 0 to 1",
    b'{"valid": true, "pass_probability": NaN}': "`pass_probability` is 'nan'",
}
ODD_RATES = {
    b'{"success": true, "data": {"ctr": "0.05"}}': "`ctr` is '0.05'",
    b'{"success": true, "data": {"ctr": 5.3}}': "`ctr` is '5.3', not a number from 0 to 1",
    b'{"success": true, "data": [0.05]}': "no success",
    b'{"success": "true", "data": {"ctr": 0.05}}': "no success",
}


@pytest.mark.parametrize(("body", "message"), ODD_SCORES.items())
def test_an_odd_answer_of_a_service_is_a_judge_that_failed(body, message):
    with answering(body) as url, pytest.raises(JudgeError, match=rf"{url}/x: {message}"):
        HTTPReward("theirs", HTTPJudgeConfig(url=f"{url}/x"), "cpu").score([MEDIUM] * 2, ["", ""], [(), ()], [{}, {}])


@pytest.mark.parametrize(("body", "message"), (ODD_VERDICTS | ODD_RATES).items())
def test_an_odd_answer_of_a_judge_elsewhere_is_a_judge_that_failed(body, message):
    async def ask(url):
        if body in ODD_VERDICTS:
            return await RemoteJudge(FilterJudgeConfig(url=url)).judge(MEDIUM, (), "")
        return await RemoteJudge(CTRJudgeConfig(url=url)).score(
            MEDIUM, "", (), dict.fromkeys(CTRJudgeConfig.item_columns, "x")
        )

    with answering(body) as url, pytest.raises(JudgeError, match=rf"{url}.*: {message}"):
        asyncio.run(ask(url))


@pytest.mark.parametrize("send_source", [False, True])
def test_the_source_is_sent_only_where_the_recipe_says_so(monkeypatch, send_source):
    """With a proxy in the environment that answers nothing: the service is on this machine."""
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    Service.seen.clear()
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/score_batch"
        judge = HTTPJudgeConfig(url=url, token="secret", send_source=send_source)
        reward = HTTPReward("theirs", judge, "cpu")
        medium = np.zeros((1, 2, 2, 3), np.uint8)
        sources = [(), (medium,), (medium, medium)]
        assert reward.score([medium] * 3, [""] * 3, sources, [{}, {"price": "3"}, {}]) == [1.0] * 3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    ((authorization, rows),) = Service.seen
    assert authorization == "Bearer secret" and reward.reads_sources == send_source
    assert ["item" in row for row in rows] == [False, True, False] and rows[1]["item"] == {"price": "3"}
    kinds = [type(row.get("source_base64")) for row in rows]
    assert kinds == ([type(None), str, list] if send_source else [type(None)] * 3)
