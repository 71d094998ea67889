"""Processes of this test session; any of them may end between two looks at it."""

import contextlib
import ipaddress
import time
from collections.abc import Iterable

import psutil


def ray_processes(name: str) -> list[psutil.Process]:
    """Ray workers of this session, and its proxies, whose class is called so."""
    return [child for child in psutil.Process().children(recursive=True) if _name(child).startswith(f"ray::{name}")]


def assert_gone(pids: Iterable[int], within_s: float) -> None:
    """Every one of them has ended, or does so in time."""
    pids = list(pids)
    deadline = time.monotonic() + within_s
    while alive := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(root: psutil.Process) -> set[tuple[str, str]]:
    """(process, address) of every TCP socket that `root` and what it started listen on beyond loopback.

    Of a process's name, the 15 characters that Linux keeps: the rest is read from its command line, which an ending one has lost.
    """
    found = set()
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                address = ipaddress.ip_address(connection.laddr.ip if connection.laddr else "127.0.0.1")
                address = getattr(address, "ipv4_mapped", None) or address
                if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                    found.add((process.name()[:15], connection.laddr.ip))
    return found
