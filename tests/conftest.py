"""Fixtures that are dear to start and shared by a whole session."""

import jobs  # noqa: F401, I001  first: it makes the settings that Ray reads when it is imported

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.ranks import Ranks

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
SERVE_PORT = int(os.environ.get("TEST_SERVE_PORT", "8123")) + WORKER
"""Each test process needs its own: Serve's proxies share a port, and requests go to either."""


@pytest.fixture(scope="session")
def kontext(tmp_path_factory):
    """A tiny Kontext folder."""
    from rlhf.models.tiny import write_flux_kontext

    return write_flux_kontext(tmp_path_factory.mktemp("models") / "kontext")


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    ranks = Ranks(1, tmp_path_factory.mktemp("one_rank"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def cluster():
    """The one Ray cluster and the one Serve of a session."""
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300_000_000,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    serve.start(
        proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": SERVE_PORT, "request_timeout_s": 120}
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def judge_server():
    """Start light HTTP judges: `judge_server(reject=0.7)` returns their base URL. See `tests.judge_server`."""
    started = []

    def start(**settings: object) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        started.append(subprocess.Popen([sys.executable, "-m", "tests.judge_server", str(port), *options]))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=5).close()
                return f"http://127.0.0.1:{port}"
            time.sleep(0.1)
        raise TimeoutError("the judge server did not start")

    yield start
    for process in started:
        process.terminate()
        process.wait(10)
