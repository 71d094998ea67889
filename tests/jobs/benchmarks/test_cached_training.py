"""The benchmark of caching measures both ways; how much is saved is the machine's and is not tested."""

import pytest

from jobs.benchmarks.cached_training import measured
from jobs.demo.__main__ import lay_out

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_training_on_the_fly_needs_the_memory_of_the_encoders_beside_that_of_the_rank(cluster, tmp_path):
    lay_out(tmp_path / "world")
    cached, fly = (
        measured("flux_kontext", way, tmp_path / "world", tmp_path / way, steps=20) for way in ("cached", "on_the_fly")
    )
    assert min(cached.update_s, fly.update_s) > 0
    assert fly.memory_mib > cached.memory_mib + 100, "an encoder's process holds Python, torch and a VAE"
