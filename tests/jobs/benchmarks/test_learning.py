"""Learning, not only running: on trained judges, against the null of shuffled rewards, with the sign of β flipped too."""

import pytest

from jobs.benchmarks.learning import all_runs, gain, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_true_click_rate_rises_by_more_than_three_times_what_shuffled_rewards_do(tmp_path):
    """No reward is given that rate. What was seen is in README."""
    runs = all_runs(tmp_path, steps=40, seeds={"true": 2, "true, LoRA": 1, "shuffled": 3, "β flipped": 1})
    told = "\n".join(table(runs))
    null = max(abs(gain(run)[0]) for run in runs["shuffled"])
    for name in ("true", "true, LoRA"):
        for run in runs[name]:
            value, low, _ = gain(run)
            assert value > max(0.1, 3 * null) and low > 0, told
            (_, first), (_, last) = run[0], run[-1]
            assert (last.reward.mean(0) > first.reward.mean(0)).all(), told
            assert last.kept.mean() > 0.9 * first.kept.mean(), told
    (flipped,) = runs["β flipped"]
    assert gain(flipped)[2] < 0, told
