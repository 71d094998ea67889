"""How often each kind of example comes: known shares, and what is said of weights that nothing answers."""

import numpy as np
import pytest

from rlhf.data.mixture import shares, task_folders
from rlhf.errors import Refused

KINDS = np.array([0, 0, 0, 1, 2, 2, 3], np.int32)
TASKS = ["a"] * 4 + ["b"] * 3
COUNTS = [1, 1, 1, 2, 1, 1, 0]
"""Of a three with one source and one with two; of b two with one and one without."""


def of(task_weights, count_weights):
    return shares(KINDS, TASKS, COUNTS, task_weights, count_weights)


def test_without_weights_shares_are_those_of_the_examples():
    assert of({}, {}) == pytest.approx([3 / 7, 1 / 7, 2 / 7, 1 / 7])


def test_tasks_share_by_their_weights_and_their_examples_alike():
    assert of({"a": 1.0, "b": 3.0}, {}) == pytest.approx([3 / 16, 1 / 16, 2 / 4, 1 / 4])
    assert of({"a": 2.0}, {}) == pytest.approx([3 / 4, 1 / 4, 0, 0]), "b is not named"


def test_numbers_of_sources_share_within_their_task():
    assert of({"a": 1.0, "b": 1.0}, {0: 1.0, 1: 2.0, 2: 6.0}) == pytest.approx([1 / 8, 3 / 8, 1 / 3, 1 / 6])
    assert of({}, {1: 1.0}) == pytest.approx([4 / 7, 0, 3 / 7, 0]), "0 and 2 are not named"


def test_buckets_of_one_task_and_number_share_by_their_examples():
    kinds = np.array([0, 0, 0, 1], np.int32)
    assert shares(kinds, ["a"] * 4, [1] * 4, {"a": 5.0}, {1: 0.1}) == pytest.approx([3 / 4, 1 / 4])


@pytest.mark.parametrize(
    ("task_weights", "count_weights", "says"),
    [
        (
            {},
            {1: 1.0, 3: 1.0},
            r"gives 3 sources a weight, but no example has so many \(1 with 0, 5 with 1, 1 with 2\): leave",
        ),
        (
            {"a": 1.0, "b": 1.0},
            {2: 1.0},
            r"gives 'b' a weight, but data\.source_count_weights none to its examples \(1 with 0, 2 with 1\): change",
        ),
    ],
)
def test_a_weight_that_no_example_answers_is_refused_with_the_counts(task_weights, count_weights, says):
    with pytest.raises(Refused, match=says):
        of(task_weights, count_weights)


def test_folders_are_found_by_name_and_a_misspelt_one_is_refused(tmp_path):
    for name in ("shop", "street", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert task_folders(tmp_path, {"street": 0.5, "shop": 0.0}) == {"street": tmp_path / "street"}
    with pytest.raises(Refused, match=r"names 'stret', which is no folder of data\.path = .*: did you mean 'street'\?"):
        task_folders(tmp_path, {"stret": 1.0})
    with pytest.raises(Refused, match=r"names 'xyz', which is no folder .*: it holds shop, street"):
        task_folders(tmp_path, {"xyz": 1.0})
    with pytest.raises(Refused, match=r"notes\.txt': with data\.task_weights it is the folder that holds those of the"):
        task_folders(tmp_path / "notes.txt", {"shop": 1.0})
