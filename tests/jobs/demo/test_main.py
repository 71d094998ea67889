"""`make demo`'s command in an empty folder: every part at work, every output there, nothing left running."""

import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest

from rlhf.data.audit import read_pairs
from tests.console import foreign_lines
from tests.processes import listening

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_demo_runs_through_every_part_and_leaves_nothing_running(tmp_path):
    before = {process.pid for process in psutil.process_iter()}
    command = [sys.executable, "-m", "jobs.demo", "--dir", str(tmp_path / "demo")]
    log, open_to_others = tmp_path / "log.txt", set()
    deadline = time.monotonic() + 1500
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT) as demo:
        while demo.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                open_to_others |= listening(psutil.Process(demo.pid))
            time.sleep(0.5)
        demo.kill()
    printed = log.read_text()
    assert demo.returncode == 0, printed[-3000:]
    assert "demo finished" in printed and "100% unknown: " in printed
    assert not foreign_lines(printed)
    # README names these sockets, and tests/jobs/test_ray_start.py shows that they ask for the token.
    assert all(process == "ray::ServeRepli" for process, _ in open_to_others), open_to_others
    run = tmp_path / "demo" / "runs" / "demo" / "v0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/lr" in row]
    assert len(steps) == 40
    assert any(row["filter/pass_rate"] < 1 for row in steps), "the filter passed everything"
    assert all(row["filter/pass_rate"] > 0.5 for row in steps)
    assert {"reward/hps", "reward/ctr", "reward/true_rate", "time/publish", "idle/samplers"} <= steps[-1].keys()
    assert len(read_pairs(run / "pairs")) == 40 * 8
    assert {path.name for path in (run / "final").iterdir()} == {"transformer"}
    assert (run / "samples" / "step_000040.png").stat().st_size > 10_000
    told = json.loads((run / "report.json").read_text())
    assert told["finished"] and told["steps"] == 40 and (run / "report.html").is_file()
    assert {change["name"] for change in told["held_out"]} >= {"policy_hps", "policy_ctr", "policy_true_rate"}
    assert set(told["held_out_sheets"]) == {"policy beside base"}
    # It learnt what nothing told it: beyond what shuffled rewards do, and without losing the subject.
    assert told["true_rate_tuned"] > told["true_rate_base"] * (1 + 3 * told["null_gain"]), told["headline"]
    assert told["kept_tuned"] > 0.9 * told["kept_base"] and "rose" in told["headline"]
    # `cmdline` is None of a process that ends meanwhile, or that waits for its parent to collect it.
    running = psutil.process_iter(["pid", "cmdline"])
    left = [p for p in running if p.pid not in before and str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert not left


def test_dry_run_starts_nothing(tmp_path):
    command = [sys.executable, "-m", "jobs.demo", "--dir", str(tmp_path / "demo"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "to lay out in" in done.stdout and "filter" in done.stdout
    assert not (tmp_path / "demo").exists()
