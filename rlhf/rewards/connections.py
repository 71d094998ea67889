"""How services elsewhere are asked: bearer token, certificates, and the proxies of the environment.

Proxies serve outside addresses only. What keeps one from being used is said before anything dear starts, by variable, value
and remedy: in an actor, later, it would look as if the judge failed. Left out: PAC files and proxies of the system's settings.
"""

import contextlib
import ipaddress
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlhf.errors import Refused

PROXY_S = 10.0
"""Seconds that a proxy has to let a request through."""


def connection(url: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    """Keyword arguments of every httpx client that asks the service at `url`: bearer token, timeout, `proxy_of(url)`.

    httpx itself reads no proxy from the environment: it would ask them about this machine too. Raises: Refused.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    keys = {"headers": headers, "timeout": timeout_s, "trust_env": False}
    if proxy := proxy_of(url):
        keys["proxy"] = proxy.usable(url)
    if url.startswith("https"):
        try:
            keys["verify"] = httpx.create_ssl_context()
        except OSError as error:
            shown = {name: os.environ[name] for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ}
            raise Refused(f"the certificates for {url} cannot be read: {error}; mend or unset {shown}") from error
    return keys


@dataclass(frozen=True)
class Proxy:
    """A proxy that the environment names."""

    variable: str
    value: str

    def __str__(self) -> str:
        """Variable and value, without user and password."""
        scheme, mark, rest = self.value.rpartition("://")
        return f"the proxy {self.variable} = {scheme}{mark}{rest.rpartition('@')[2]}"

    def usable(self, url: str) -> str:
        """Its address as httpx takes it. Raises: Refused where `url` cannot be asked through it."""
        value = self.value if "://" in self.value else f"http://{self.value}"
        try:
            scheme = httpx.Proxy(value).url.scheme
        except (ValueError, httpx.InvalidURL) as error:
            raise Refused(f"{url} would be asked through {self}: {error}; {self._remedy(url)}") from error
        if scheme.startswith("socks") and not find_spec("socksio"):
            what = f"SOCKS needs httpx[socks] in the environment of every node; install it, or {self._remedy(url)}"
            raise Refused(f"{url} would be asked through {self}: {what}")
        return value

    def _remedy(self, url: str) -> str:
        return (
            f"set {self.variable} to a proxy that works (http://HOST:PORT), or put {httpx.URL(url).host} into NO_PROXY"
        )

    def check(self, url: str) -> None:
        """Raise Refused where it does not let a request to `url` through. What the service itself answers is its own affair."""
        try:
            with httpx.Client(**connection(url, None, PROXY_S)) as client:
                answer = client.get(url)
            fault = "status 407: it asks for a user and a password" if answer.status_code == 407 else ""
        except (httpx.ReadTimeout, httpx.RemoteProtocolError):
            return
        except httpx.HTTPError as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            raise Refused(f"{url} cannot be asked through {self}: {fault}; {self._remedy(url)}")


def proxy_of(url: str) -> Proxy | None:
    """The proxy that the environment names for `url`: http_proxy or https_proxy, else all_proxy, in lower or upper case.

    None for this machine (loopback), and for what no_proxy names: hosts, domains with all below them, networks (10.0.0.0/8), `*`.
    """
    parts = urlsplit(url)
    if _is_direct(parts.hostname or "", parts.port):
        return None
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if value := os.environ.get(variable, "").strip():
                return Proxy(variable, value)
            if variable in os.environ:  # set to nothing: none, whatever the upper case says
                break
    return None


def _is_direct(host: str, port: int | None) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        address = None
    if host == "localhost" or (address and address.is_loopback):
        return True
    for entry in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").lower().split(","):
        name = entry.strip().removeprefix("*.").lstrip(".").strip("[]")
        if name and (name == "*" or host == name or f"{host}:{port}" == name or host.endswith(f".{name}")):
            return True
        with contextlib.suppress(ValueError):
            if address and address in ipaddress.ip_network(name, strict=False):
                return True
    return False


def asked(url: str) -> str:
    """`url` as a message names it, with the proxy that it is asked through."""
    proxy = proxy_of(url)
    return f"{url} (through {proxy})" if proxy else url
