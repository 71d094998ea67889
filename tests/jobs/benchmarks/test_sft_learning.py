"""Fine-tuning learns what captions say: LoRA and full, on the trained worlds of both families, against shuffled captions."""

import pytest

from jobs.benchmarks.sft_learning import WAYS, all_runs
from jobs.world.edits import EDIT_MODELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("family", EDIT_MODELS)
def test_following_two_new_instructions_rises_by_more_than_three_times_what_shuffled_captions_do(tmp_path, family):
    """One seed; what was seen over three is in README."""
    shown = all_runs(family, tmp_path, steps=60, seeds=1)
    for way in WAYS:
        assert shown.gain(way) > max(0.05, 3 * shown.null(way)), shown
