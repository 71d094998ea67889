"""The Ray cluster of a job: one of its own, on loopback, or a running one; and a stop that leaves nothing behind."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import ray
import torch

from rlhf.errors import Refused
from rlhf.section import ClusterConfig


class Stopped(KeyboardInterrupt):
    """SIGTERM came (`ray job stop`, a scheduler): unwind as for Ctrl-C, the only thing that Ray's waits let through."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(signum).name)


def address(config: ClusterConfig) -> str:
    """`cluster.address`, else RAY_ADDRESS, else "local": a cluster of the job's own."""
    return config.address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def cluster(config: ClusterConfig, namespace: str) -> Iterator[None]:
    """Connect to the configured cluster, or start one; disconnect or end it on the way out, whatever happened.

    Within the block SIGTERM raises `Stopped`, so that `finally` clauses run within the seconds before SIGKILL.
    """
    if ray.is_initialized():  # a job inside another, as in the demo: the outer one's cluster
        yield
        return
    target = address(config)
    # Workers import the project by its installed (editable) name; PYTHONPATH also serves a plain checkout, and modules of
    # the user's that a recipe names (judges.python).
    places = [str(Path(__file__).resolve().parents[1]), os.getcwd(), *os.environ.get("PYTHONPATH", "").split(":")]
    environment = {"env_vars": {"PYTHONPATH": ":".join(filter(None, places)), "HF_HUB_OFFLINE": "1"}}
    own = {}
    if target == "local":
        own = {
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_memory,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "_node_ip_address": "127.0.0.1",
        }
    before = signal.getsignal(signal.SIGTERM)
    try:
        # Workers' own output stays in their log files, which the dashboard shows; a failure comes as an exception.
        try:
            ray.init(address=target, namespace=namespace, runtime_env=environment, log_to_driver=False, **own)
        except (ConnectionError, ray.exceptions.RaySystemError) as error:
            raise Refused(
                f"no Ray cluster at {target!r} (cluster.address, RAY_ADDRESS): {error}; start one with `ray start`, or unset "
                "both for a cluster of the job's own"
            ) from error
        signal.signal(signal.SIGTERM, _stop)  # after init, which installs a handler that ends the process at once
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def dashboard() -> str | None:
    """The address of the running cluster's dashboard, if it has one."""
    url = ray._private.worker.global_worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None


def free_resources(config: ClusterConfig) -> dict[str, float]:
    """What a job could reserve now: of the connected cluster, or of this machine where the job would start its own."""
    if ray.is_initialized():
        return ray.available_resources()
    if address(config) != "local":
        with cluster(config, "dry-run"):
            return ray.available_resources()
    return {
        "CPU": float(config.num_cpus or os.cpu_count() or 1),
        "GPU": float(torch.cuda.device_count()),
        "memory": float(psutil.virtual_memory().available),
    }
