"""A job's cluster: SIGTERM unwinds out of any of Ray's waits, as Ctrl-C does."""

import subprocess
import sys
from pathlib import Path

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
