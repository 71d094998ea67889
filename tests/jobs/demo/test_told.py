"""What the demo says of a run, by rows whose answer is known."""

import json

import pytest

from jobs.demo.__main__ import told
from jobs.world.data import PACKAGE

NULL = max(map(abs, json.loads((PACKAGE / "manifest.json").read_text())["null"]["gains"]))


def rows(tuned: float, kept: float) -> list[dict[str, float]]:
    return [
        {"step": 0, "eval/base_true_rate": 0.2, "eval/base_kept": 0.9},
        {"step": 10, "eval/policy_true_rate": 0.9, "eval/policy_kept": 0.1},
        {"step": 20, "eval/policy_true_rate": tuned, "eval/policy_kept": kept},
    ]


@pytest.mark.parametrize(
    ("tuned", "word"), [(0.2 * (1 + 2 * NULL), "rose"), (0.2 * (1 - 2 * NULL), "fell"), (0.2, "hardly moved")]
)
def test_the_last_evaluation_is_held_against_the_base_and_the_null(tuned, word):
    headline, facts = told(rows(tuned, 0.88))
    assert f"which nothing is trained on, {word}: 0.200 → {tuned:.3f}" in headline and "bought" not in headline
    assert facts["true_rate_base"] == 0.2 and facts["true_rate_tuned"] == tuned and facts["null_gain"] == NULL
    assert facts["true_rate_gain"] == pytest.approx(tuned / 0.2 - 1)


def test_a_subject_that_is_lost_is_said():
    headline, facts = told(rows(0.3, 0.7))
    assert "partly bought with the subject" in headline and facts["kept_tuned"] == 0.7
