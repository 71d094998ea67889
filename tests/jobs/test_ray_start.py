"""Ray that cannot start, or that is not there, is refused in words and in time; one of a job's own keeps to loopback."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jobs  # isort: skip  (first: it makes settings that Ray reads when it is imported)  # noqa: F401
import pytest

from jobs import ray_start
from rlhf.errors import Refused

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def port():
    """Where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent():
    """Where somebody takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def refusal(target):
    started = time.monotonic()
    with pytest.raises(Refused) as caught:
        ray_start.check(target)
    assert time.monotonic() - started < ray_start.ANSWER_S + 5  # a name may take its time to be looked up
    return str(caught.value)


NONSENSE = ["nonsense", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:0", "127.0.0.1:port", " ", ":6379"]


@pytest.mark.parametrize("target", [*NONSENSE, "http://127.0.0.1:8265", "ray://127.0.0.1:10001", "name.invalid:6379"])
def test_what_is_no_address_is_refused_with_what_to_give(target):
    said = refusal(target)
    assert f"{target!r} (cluster.address, RAY_ADDRESS)" in said and "give the HOST:PORT that `ray start --head`" in said


@pytest.mark.parametrize("kind", ["port", "silent", "web"])
def test_an_address_where_no_cluster_answers_is_refused_in_time(kind, request):
    said = refusal(f"127.0.0.1:{request.getfixturevalue(kind)}")
    assert said.startswith("no Ray cluster answers at '127.0.0.1:") and "unset cluster.address and RAY_ADDRESS" in said


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_cannot_hold_rays_sockets_is_refused(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    (tmp_path / "file").write_text("")
    remedy = f"set {variable} to a folder with a short path that you may write, e.g. /tmp"
    for folder, fault in (
        (tmp_path / ("x" * 60), "have paths of "),
        (tmp_path / ("子" * 20), "have paths of "),  # bytes count, not characters
        (Path("/proc/nowhere"), "cannot be written: No such file or directory"),
        (Path(os.devnull), "cannot be written: Not a directory"),
    ):
        monkeypatch.setenv(variable, str(folder))
        said = refusal(ray_start.LOCAL)
        assert f"'{folder}/ray' ({variable})" in said and fault in said and said.endswith(remedy)
    monkeypatch.setenv(variable, "/tmp")
    ray_start.check(ray_start.LOCAL)


def test_one_of_the_raylets_warnings_is_kept_back_and_no_other(capsys):
    for line in ("WARNING: 8 PYTHON worker processes have been started on node: x", "a worker died"):
        ray_start._print_others({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    printed = capsys.readouterr().out
    assert "a worker died" in printed and "worker processes" not in printed


CONNECTS = """
import os
import jobs
from jobs.cli import run_main
from jobs.launch import cluster
from rlhf.section import ClusterConfig

def job():
    table = ClusterConfig(num_cpus=1, object_store_memory=int(os.environ.get("OBJECTS", "100000000")))
    with cluster(table, namespace="connects"):
        print("started")

run_main(job)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TMPDIR", "/tmp/" + "x" * 80, "107 is the system's limit"),
        ("RAY_ADDRESS", "127.0.0.1:9", "no Ray cluster answers"),
        ("RAY_AUTH_TOKEN_PATH", "/no/token", "Ray's token ("),
        ("RAY_AUTH_MODE", "nonsense", "RAY_AUTH_MODE"),
        ("OBJECTS", str(10**15), "cluster.object_store_memory = 1000000000000000 is more than this machine's memory"),
    ],
)
def test_a_job_ends_with_status_2_and_the_words(variable, value, words):
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"} | {variable: value}
    command = [sys.executable, "-c", CONNECTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


FAILS = """
import jobs
from jobs import ray_start
from jobs.cli import run_main

run_main(lambda: ray_start.start("local", {"num_cpus": 1, "object_store_memory": 1000}))
"""


def test_what_ray_itself_refuses_ends_with_its_words_and_where_its_logs_are():
    """1,000 bytes of object store: ray.init raises ValueError."""
    done = subprocess.run([sys.executable, "-c", FAILS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "Ray cannot start: ValueError: " in done.stderr and "/session_latest/logs" in done.stderr


OPEN = """
import json, socket
import jobs, grpc, httpx, psutil, ray
from ray import serve
from ray._private.grpc_utils import init_grpc_channel
from actors.ranks import Rank
from jobs import ray_start
from tests.processes import listening

ray_start.start("local", {"num_cpus": 1, "object_store_memory": 100_000_000})
ranks = ray.remote(num_cpus=0.1)(Rank).remote()
host, port = ray.get(ranks.open_store.remote())

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Judge:
    def __call__(self):
        return "yes"

with socket.create_server(("127.0.0.1", 0)) as free:
    serve_port = free.getsockname()[1]
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": serve_port})
serve.run(Judge.bind(), name="judge")

def code(channel, method):
    try:
        channel.unary_unary(method)(b"", timeout=10)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"

def stranger(address):
    return grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])

beyond = listening(psutil.Process())
answers = {}
(replica,) = (p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ServeReplica"))
sockets = [c.laddr.port for c in replica.net_connections("tcp") if c.status == "LISTEN" and c.laddr.ip in ("::", "0.0.0.0")]
gcs = ray.get_runtime_context().gcs_address
for name, address, method in [
    ("gcs", gcs, "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"),
    *[("replica", f"127.0.0.1:{p}", "/ray.serve.ASGIService/HandleRequest") for p in sockets],
]:
    answers[name] = [code(open_channel(address), method) for open_channel in (stranger, init_grpc_channel)]
url = f"http://{ray._private.worker.global_worker.node.webui_url}/api/jobs/"
answers["dashboard"] = [httpx.get(url, trust_env=False, timeout=30).status_code]
print(json.dumps({"host": host, "beyond": sorted(beyond), "answers": answers}))
ray.shutdown()
"""


@pytest.mark.slow
def test_a_ray_of_its_own_listens_on_loopback_and_the_one_other_socket_asks_for_the_token():
    """With proxies in the environment that answer nothing: nothing of this asks them."""
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTPS_PROXY", "grpc_proxy", "ALL_PROXY")}
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"} | proxies
    command = [sys.executable, "-c", OPEN]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["host"] == "127.0.0.1"
    assert all(process == "ray::ServeRepli" for process, _ in found["beyond"]), found
    answers = found["answers"]
    assert answers["gcs"][0] == answers["replica"][0] == "UNAUTHENTICATED" and answers["dashboard"] == [401]
    assert "UNAUTHENTICATED" not in (answers["gcs"][1], answers["replica"][1])
