"""Services elsewhere: what they are sent, and that no proxy is asked about this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest

from rlhf.rewards.config import HTTPJudgeConfig
from rlhf.rewards.remote import HTTPReward


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
