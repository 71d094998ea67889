"""What is told of a trainer rank against what torch allocates for a real one."""

import pytest

from jobs.benchmarks.peak_memory import figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("how", ["full", "lora"])
def test_the_told_peak_is_what_torch_allocates(how):
    """Frozen sides that are counted twice, or an average that is forgotten, would be a tenth of it and more."""
    told, allocated = figures(gib=0.1, batch=1, how=how)
    assert told == pytest.approx(allocated, rel=0.03)
