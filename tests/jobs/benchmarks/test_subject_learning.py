"""New layers on a frozen Wan show what a picture holds, against layers that were trained on the pictures of other clips."""

import pytest

from jobs.benchmarks.subject_learning import all_runs, seen
from jobs.world.clips import draw


def test_what_a_clip_shows_is_told_from_its_pixels():
    """Of clips as they were drawn: every colour, and nine in ten shapes (a small disc fills as much as a diamond does)."""
    size = {"frames": 5, "height": 48, "width": 64}
    clips = [*draw(48, **size, seed=1)]
    told = [seen(clip.frames(**size)) for clip in clips]
    assert all(colour == clip.colour for (colour, _), clip in zip(told, clips, strict=True))
    assert sum(shape == clip.shape for (_, shape), clip in zip(told, clips, strict=True)) >= 0.9 * len(clips)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_videos_agree_with_their_own_picture_by_more_than_three_times_what_shuffled_ones_do(tmp_path):
    """One seed, and a base and runs of half the length; what was seen over three is in README."""
    shown = all_runs(tmp_path, steps=500, seeds=1, base_steps=1500)
    assert shown.gain > max(0.15, 3 * shown.null), shown
