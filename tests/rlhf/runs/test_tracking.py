import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.runs.tracking import FileTracker


@pytest.fixture
def tracker(tmp_path):
    tracker = FileTracker(tmp_path)
    yield tracker
    tracker.close()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_when_log_returns(tracker, tmp_path):
    tracker.log(1, {"train/loss": np.float32(0.5), "filter/pass_rate": 1})
    assert rows(tmp_path) == [{"step": 1, "train/loss": 0.5, "filter/pass_rate": 1.0}]


def test_a_second_tracker_appends(tracker, tmp_path):
    tracker.log(1, {"train/loss": 0.5})
    again = FileTracker(tmp_path, resumed_at=1)
    again.log(2, {"train/loss": 0.25})
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_written(tracker, tmp_path, value):
    with pytest.raises(ValueError, match="train/loss"):
        tracker.log(1, {"train/lr": 1e-5, "train/loss": value})
    assert rows(tmp_path) == []


@pytest.mark.parametrize("name", ["loss", "train/", "Train/loss", "a/b/c", "train/my loss"])
def test_names_are_area_and_name(tracker, name):
    with pytest.raises(ValueError, match="area/name"):
        tracker.log(1, {name: 1.0})


def test_tensorboard_shows_scalars(tracker, tmp_path):
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(3, 0.5)]
