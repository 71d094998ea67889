"""Ray of a job's own on loopback, or a running one: what keeps either from starting is said with its remedy.

Ray's own answers are a traceback for a folder that it cannot use, and minutes of retries for an address where nothing
answers. So folder and address are looked at first, which a dry run does too. Left out: waiting for a cluster that is not up.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants, worker
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from rlhf.errors import Refused

LOCAL = "local"
ANSWER_S = 5.0
"""Seconds that a cluster has to answer."""
SOCKET_PATH = 107
"""Bytes of the longest path of a Unix socket on Linux."""
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""What Ray puts below its folder of temporary files."""
LOOPBACK = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
MANY_WORKERS = "worker processes have been started on node"


def check(target: str) -> None:
    """Raise Refused where Ray could not start ("local"), or where no cluster answers at the address `target` in time."""
    if target == LOCAL and not is_token_auth_enabled():
        mode = os.environ.get("RAY_AUTH_MODE")
        raise Refused(
            f"RAY_AUTH_MODE = {mode!r}: a Ray of the job's own asks for its token; unset it, or set it to token"
        )
    try:
        ensure_token_if_auth_enabled(None, create_token_if_missing=target == LOCAL)
    except (ray.exceptions.AuthenticationError, OSError) as error:
        raise Refused(f"Ray's token (~/.ray/auth_token, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH): {error}") from error
    if target == LOCAL:
        _check_folder(Path(get_default_ray_temp_dir()))
    else:
        _check_address(target)


def check_store(nbytes: int | None) -> None:
    """Raise Refused where an object store of `nbytes` cannot be on this machine."""
    there = psutil.virtual_memory().total
    if nbytes is not None and nbytes > there:
        raise Refused(
            f"cluster.object_store_memory = {nbytes} is more than this machine's memory, {there} bytes; lower it"
        )


def start(target: str, own: Mapping[str, Any], **settings: Any) -> None:
    """Connect to `target`, or start a Ray that listens on loopback. own: settings of one that is started.

    Raises: Refused.
    """
    check(target)
    if target == LOCAL:
        check_store(own.get("object_store_memory"))
        # Ray's switch for systems with a firewall that asks: this node's address is then loopback's, and whatever Ray starts
        # binds to it. `_node_ip_address="127.0.0.1"` does not do it: Ray replaces that by the machine's own address.
        ray_constants.ENABLE_RAY_CLUSTER = False
        settings = {**settings, **own, **LOOPBACK}
    worker.print_to_stdstream = _print_others
    try:
        # Workers' own output stays in their log files, which the dashboard shows; a failure comes as an exception.
        ray.init(address=target, log_to_driver=False, **settings)
    except Exception as error:  # whatever its type, nothing of ours has run yet
        what = "Ray cannot start" if target == LOCAL else f"Ray cannot connect to {_named(target)}"
        logs = Path(get_default_ray_temp_dir()) / "session_latest" / "logs"
        raise Refused(
            f"{what}: {type(error).__name__}: {str(error).strip()}; mend what it names (memory and /dev/shm, [cluster], RAY_… "
            f"variables, the same Ray and Python on every node); Ray's own logs are in {logs}"
        ) from error


def _check_folder(folder: Path) -> None:
    key = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    named = f"Ray keeps its files in {str(folder)!r} ({key})"
    remedy = f"set {key} to a folder with a short path that you may write, e.g. /tmp"
    if (length := len(os.fsencode(folder / LONGEST_SOCKET))) > SOCKET_PATH:
        over = f"its sockets there would have paths of {length} bytes, and {SOCKET_PATH} is the system's limit"
        raise Refused(f"{named}, but {over}; {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(f"{named}, which cannot be written: {error.strerror}; {remedy}") from error


def _check_address(target: str) -> None:
    remedy = (
        "give the HOST:PORT that `ray start --head` printed (port 6379), start a cluster, or unset cluster.address and "
        "RAY_ADDRESS for one of the job's own"
    )
    if "://" in target:
        raise Refused(f"{_named(target)} is no address of a cluster: jobs connect without ray:// or http://; {remedy}")
    try:
        address = canonicalize_bootstrap_address(target)
        host, _, port = str(address).rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{address} has no port from 1 to 65535")
        with create_gcs_channel(address) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_S)
    except (ValueError, ConnectionError, OSError) as error:
        raise Refused(f"no Ray cluster at {_named(target)}: {error}; {remedy}") from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            token = "copy the cluster's ~/.ray/auth_token to this machine (RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH go before it)"
            raise Refused(
                f"the Ray cluster at {_named(target)} refuses the token: {error.details()}; {token}"
            ) from error
        raise Refused(
            f"no Ray cluster answers at {_named(target)} within {ANSWER_S:g} s: {error.details()}; {remedy}"
        ) from error


def _named(target: str) -> str:
    return f"{target!r} (cluster.address, RAY_ADDRESS)"


def _print_others(data: dict[str, Any], **how: Any) -> None:
    """Ray prints a raylet's warnings without a logger. This one is of no use here: a recipe's roles ask for shares of a CPU, so
    there are more workers than CPUs, as many as the recipe says."""
    if not any(MANY_WORKERS in line for line in data["lines"]):
        _print(data, **how)


_print = worker.print_to_stdstream
