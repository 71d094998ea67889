"""What is told of a trainer rank against what a real one takes, for a model of more than 1 GB."""

import pytest

from jobs.benchmarks.peak_memory import figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_told_peak_is_what_the_process_takes():
    told, taken = figures(gib=1.05, batch=1, how="full")
    assert told == pytest.approx(taken, rel=0.15)
