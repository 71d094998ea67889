"""A job's cluster: SIGTERM unwinds out of any of Ray's waits, as Ctrl-C does."""

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
import time
import jobs, ray
from jobs.cluster import cluster
from jobs.running import guarded
from rlhf.section import ClusterConfig

@ray.remote(num_cpus=0.1)
def sleeps():
    time.sleep(60)

def job():
    with cluster(ClusterConfig(num_cpus=1, object_store_memory=100_000_000), namespace="waits"):
        task = sleeps.remote()
        print("waiting", flush=True)
        try:
            ray.get(task, timeout=50)
        finally:
            print("cleaned up", flush=True)

guarded(job)()
"""


def test_sigterm_ends_a_wait_in_order():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert out == "cleaned up\n" and process.returncode == 130, error
    assert "stopped; the same command goes on from the last checkpoint" in error and "Traceback" not in error
