"""Proxies of the environment: used for outside addresses, never for this machine, and named where they cannot be used."""

import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec

import httpx
import pytest

from rlhf.errors import Refused
from rlhf.rewards.connections import asked, connection, proxy_of

LOCAL = ["http://localhost:8000/x", "http://127.0.0.1", "https://127.1.2.3:8/hpsv2", "http://[::1]:8000"]
OTHER = ["http://host:8000", "https://judges.example.com/score", "http://10.0.0.7:8000", "http://[2001:db8::1]/"]
NAMES = [name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in (*NAMES, "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy():
    """`proxy(status)` starts a proxy that answers every request so; returns host:port."""
    started = []

    def start(status: int) -> str:
        class Answers(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_CONNECT = do_GET

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Answers)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        started.append((server, thread))
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


def refusal(url):
    with pytest.raises(Refused) as caught:
        proxy_of(url).check(url)
    return str(caught.value)


@pytest.mark.parametrize("url", LOCAL + OTHER)
@pytest.mark.parametrize("value", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://"])
def test_a_proxy_is_for_other_machines_only(monkeypatch, url, value):
    for name in ("HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, value)
    assert (proxy_of(url) is not None) == (url in OTHER)
    if url in LOCAL:
        with httpx.Client(**connection(url, None, 1.0)) as client:
            assert not client._mounts


@pytest.mark.parametrize(
    ("environment", "url", "variable"),
    [
        ({"HTTP_PROXY": "http://p:1"}, "http://host", "HTTP_PROXY"),
        ({"HTTP_PROXY": "http://p:1", "http_proxy": "http://q:1"}, "http://host", "http_proxy"),
        ({"HTTP_PROXY": "http://p:1", "http_proxy": ""}, "http://host", None),
        ({"HTTP_PROXY": "http://p:1"}, "https://host", None),
        ({"HTTP_PROXY": "http://p:1", "all_proxy": "http://q:1"}, "https://host", "all_proxy"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "other,host"}, "http://host:8000/x", None),
        ({"ALL_PROXY": "http://p:1", "no_proxy": "host:8000"}, "http://host:8000/x", None),
        ({"ALL_PROXY": "http://p:1", "no_proxy": "host:8001"}, "http://host:8000/x", "ALL_PROXY"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": ".corp"}, "https://judges.corp", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "*.CORP"}, "https://judges.corp", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "corp"}, "https://judgescorp", "ALL_PROXY"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8, 192.168.1.1"}, "http://10.1.2.3:8000", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3:8000", "ALL_PROXY"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, "https://host", None),
        ({}, "https://host", None),
    ],
)
def test_the_variable_that_counts(monkeypatch, environment, url, variable):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = proxy_of(url)
    assert (found.variable if found else None) == variable


def test_an_outside_request_goes_through_the_proxy_and_what_the_service_answers_is_no_fault(monkeypatch, proxy):
    """503 is what `http://judge.invalid` cannot have said: its name has no address."""
    monkeypatch.setenv("http_proxy", proxy(503))  # without http://, as curl takes it
    url = "http://judge.invalid/score"
    with httpx.Client(**connection(url, None, 10.0)) as client:
        assert client.get(url).status_code == 503
    proxy_of(url).check(url)
    assert asked(url) == f"{url} (through {proxy_of(url)})" and asked(LOCAL[0]) == LOCAL[0]


@pytest.mark.skipif(find_spec("socksio") is not None, reason="httpx speaks SOCKS here")
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_without_its_package_is_named(monkeypatch, scheme):
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://user:secret@127.0.0.1:9")
    said = refusal("https://judges.example.com/score")
    assert f"ALL_PROXY = {scheme}://127.0.0.1:9" in said and "secret" not in said
    assert "httpx[socks]" in said and "put judges.example.com into NO_PROXY" in said


@pytest.mark.parametrize("value", ["ftp://127.0.0.1:9", "http://host:port", "socks4://127.0.0.1:9"])
def test_what_is_no_proxy_is_named(monkeypatch, value):
    monkeypatch.setenv("HTTPS_PROXY", value)
    assert f"HTTPS_PROXY = {value}" in refusal("https://judges.example.com/score")


@pytest.mark.parametrize("url", ["http://judge.invalid/score", "https://judge.invalid/score"])
def test_a_proxy_that_refuses_or_asks_for_a_password_is_named(monkeypatch, proxy, url):
    closed = socketserver.TCPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    for address, fault in ((f"127.0.0.1:{closed.server_address[1]}", "ConnectError"), (proxy(407), "407")):
        monkeypatch.setenv("ALL_PROXY", f"http://{address}")
        said = refusal(url)
        assert f"{url} cannot be asked through the proxy ALL_PROXY = http://{address}: " in said and fault in said
        assert "set ALL_PROXY to a proxy that works (http://HOST:PORT), or put judge.invalid into NO_PROXY" in said


def test_certificates_that_cannot_be_read_are_named(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    with pytest.raises(Refused, match=r"SSL_CERT_FILE.*no/such\.pem"):
        connection("https://judges.example.com", None, 1.0)
    connection("http://judges.example.com", None, 1.0)  # needs none
