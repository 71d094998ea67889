"""A job's cluster: SIGTERM unwinds out of any of Ray's waits, as Ctrl-C does."""

import subprocess
import sys
import time
from pathlib import Path

import ray

from actors.placement import Role
from jobs import launch
from rlhf.section import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
import os, signal, time
import jobs, ray
from jobs.launch import cluster
from jobs.cli import GOES_ON, run_main
from rlhf.section import ClusterConfig

@ray.remote(num_cpus=0.1)
def stops(driver):
    os.kill(driver, signal.SIGTERM)  # by now the driver waits: a worker takes longer to start than a call
    time.sleep(600)

def job():
    with cluster(ClusterConfig(num_cpus=1, object_store_memory=100_000_000), namespace="waits"):
        try:
            ray.get(stops.remote(os.getpid()), timeout=500)
        finally:
            print("cleaned up", flush=True)

run_main(job, GOES_ON)
"""


def test_sigterm_ends_a_wait_in_order():
    done = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "cleaned up\n" and done.returncode == 130, done.stderr
    assert (
        "stopped; the same command goes on from the last checkpoint" in done.stderr and "Traceback" not in done.stderr
    )


def test_what_an_ended_task_took_is_waited_for_and_what_is_too_much_is_still_refused(cluster, monkeypatch):
    """All that is free is taken for a second; what other tests left may hold some CPUs all the while."""
    free = ray.available_resources()["CPU"]
    config = ClusterConfig(num_cpus=2, object_store_memory=100_000_000)

    @ray.remote(num_cpus=free)
    def hold():
        time.sleep(1)

    def role(num_cpus):
        return Role(kind="trainer", name="trainer rank", count=1, num_cpus=num_cpus, num_gpus=0.0, nbytes=0)

    held = hold.remote()
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) >= free and time.monotonic() < until:
        time.sleep(0.02)
    assert launch.settled([role(free)], config)["CPU"] >= free
    ray.get(held, timeout=60)
    monkeypatch.setattr(launch, "SETTLES_S", 0.2)
    too_much = ray.cluster_resources()["CPU"] + 1
    assert launch.settled([role(too_much)], config)["CPU"] < too_much
