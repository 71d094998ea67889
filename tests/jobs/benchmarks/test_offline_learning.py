"""Offline DPO teaches: held-out pairs are told apart by runs on true labels, and not by runs on shuffled ones."""

import json

import pytest

from jobs import evaluate
from jobs.benchmarks.offline_learning import all_curves, evaluation, generated_pairs, read_pairs
from rlhf.rewards.config import ServeConfig
from tests.conftest import SERVE_PORT
from tests.jobs.offline_world import GROCERY, write_grocery

MARGIN = 0.1
"""Implicit accuracy by which every true run must exceed the best shuffled one."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_true_labels_beat_shuffled_ones_and_samples_follow_them(cluster, tmp_path):
    """On what people clicked on, where the photos are at hand; else on generated ones."""
    pairs = (
        read_pairs(write_grocery(tmp_path / "data", train=264), tmp_path)
        if GROCERY.exists()
        else generated_pairs(tmp_path / "data", 264)
    )
    curves = all_curves(pairs, tmp_path, base_steps=200, dpo_steps=60, every=60)
    end = {labels: [curve[-1][1] for curve in runs] for labels, runs in curves.items()}
    assert len(end["true"]) == len(end["shuffled"]) == 3
    assert all(curve[0] == (0, 0.0) for runs in curves.values() for curve in runs), (
        "policy and reference differ at step 0"
    )
    assert min(end["true"]) > max(end["shuffled"]) + MARGIN, end
    config = evaluation(tmp_path, pairs, seeds=1).model_copy(update={"serve": ServeConfig(port=SERVE_PORT)})
    out = evaluate.evaluate(config, evaluate.checked(config))
    result = json.loads((out / "results.json").read_text())["judges"]["warmth"]
    assert result["win_rate"]["low"] > 0.5 and result["difference"]["low"] > 0, result
    assert (out / "index.html").is_file()
