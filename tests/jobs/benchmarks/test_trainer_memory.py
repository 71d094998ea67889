"""No rank ever holds much more than its shard: measured on two real ranks with a model of more than 1 GB."""

import pytest

from jobs.benchmarks.trainer_memory import figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_no_operation_takes_more_than_its_shard_and_a_block():
    grown = figures(gib=1.05, ranks=2)
    assert set(grown) == {"load", "make reference", "refresh", "publish", "save", "export"}
    assert all(peak <= 0.7 for peak, _ in grown.values()), grown
    assert grown["load"][0] >= 0.45, "the master shard itself was not seen: the measurement is broken"
    assert all(grown[name][0] <= 0.15 for name in ("refresh", "publish", "save", "export")), grown
