"""Learning, not only running: against the null of shuffled rewards, over seeds, with the sign of β flipped too."""

import pytest

from jobs.benchmarks.learning import all_curves

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_true_rewards_gain_what_flipped_ones_lose_far_beyond_the_null():
    curves = all_curves(steps=80, seeds=3)
    moved = {mode: [curve[-1][1] - curve[0][1] for curve in runs] for mode, runs in curves.items()}
    null = max(abs(change) for change in moved["shuffled"])
    assert len(moved["true"]) == len(moved["flipped"]) == len(moved["shuffled"]) == 3
    assert min(moved["true"]) > 5 * null, moved
    assert max(moved["flipped"]) < -5 * null, moved
