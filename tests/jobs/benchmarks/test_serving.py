"""The serving benchmark runs and tells what it measured; how fast that was is for its own table to say."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.benchmarks.serving import Clock, measure, percentiles, table
from rlhf.rewards.config import ServeConfig
from tests.conftest import SERVE_PORT


@pytest.mark.slow
def test_every_way_is_measured(cluster):
    section = ServeConfig(port=SERVE_PORT, route_prefix="/benchmark", token="a-token")
    figures = measure(section, seconds=0.5, repeats=1, callers=(1, 64), num_cpus=0.1)
    assert figures["torch_threads"] == 1
    (run,) = figures["runs"]
    assert set(run) == {"handle", "http"}
    for way in run.values():
        assert way["direct"] > 0 and way["ratio"] == pytest.approx(way["64 callers"]["rate"] / way["direct"])
        assert way["ratio_undisturbed"] > 0
        for callers in ("1 callers", "64 callers"):
            p50, p95, p99 = (way[callers][key] for key in ("p50", "p95", "p99"))
            assert 0 < p50 <= p95 <= p99 and way[callers]["rate"] > 0
    assert json.loads(json.dumps(figures)) == figures
    text = table(figures)
    assert "handle with 64 callers" in text and "http with 64 callers" in text and len(text.splitlines()) == 12


def test_percentiles_are_answers_that_someone_got():
    assert percentiles([number / 1000 for number in range(1, 101)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([0.002]) == {"p50": 2, "p95": 2, "p99": 2}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell who waits for a core")
def test_a_clock_stops_while_the_busiest_thread_waits_for_a_core():
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    processes = [subprocess.Popen(command) for _ in range(3)]
    try:
        clock = Clock(processes[0].pid)
        time.sleep(1.0)
        seconds, undisturbed = clock.read()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert 0 < undisturbed < 0.7 * seconds  # a third, where the scheduler is fair and nobody else is there
