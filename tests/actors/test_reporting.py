"""What a contact sheet says of pictures, and what it shows beside held-out edits."""

import time

import numpy as np
import pytest
import ray

from actors.reporting import Reporter, ahead, describe, with_base
from rlhf.rollouts.pairing import RewardScale, make_pair
from rlhf.tables import TrackingTable
from rlhf.types import Geometry, Prompt, Score, Verdict
from tests.rlhf.rollouts.groups import group


def test_a_winner_says_by_how_much_and_by_which_reward():
    one = group(0, {"hps": 0.2, "ctr": 0.10}, {"hps": 0.3, "ctr": 0.12})
    pair = make_pair(one, RewardScale(weights={"hps": 1.0, "ctr": 2.0}, scaling="fixed").parts(one))
    assert ahead(pair) == "by 0.18: hps +0.17, ctr +0.01"  # (0.75 − 0.25) / 3 and 2 × 0.02 / 3


def test_scores_and_failures_are_described():
    score = Score(verdict=Verdict(valid=True, pass_probability=0.93), rewards={"hps": 0.28, "ctr": 0.05})
    assert describe(score) == "PASS p=0.93\nhps 0.2800  ctr 0.0500"
    assert describe(Score(verdict=Verdict(valid=False, reason="two\nspoons"))) == "FAIL\ntwo spoons"


def flat(value: int) -> np.ndarray:
    return np.full((4, 6, 3), value, np.uint8)


def test_a_held_out_edit_stands_beside_the_bases_of_the_same_prompt(tmp_path):
    source, before, after = (flat(1), "photo"), (flat(2), "base\nPASS 三文鱼"), (flat(3), "policy\nPASS")
    kept = tmp_path / "1.png"
    assert with_base([source, before], kept, is_base=True) == [source, before]
    one, (picture, caption), last = with_base([source, after], kept, is_base=False)
    assert one is source and last is after
    assert (picture == before[0]).all() and caption == before[1]


def test_a_base_that_is_gone_is_no_empty_column(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        with_base([(flat(3), "policy")], tmp_path / "1.png", is_base=False)


def test_a_sheet_waits_for_that_of_the_base_which_it_shows(cluster, tmp_path):
    """The base's picture takes a second, the policy's none."""

    @ray.remote(num_cpus=0)
    def painted(seconds):
        time.sleep(seconds)
        return flat(2)[None]

    prompt = Prompt(key="a", instruction="warm", sources=(), geometry=Geometry(height=4, width=6))
    score = Score(verdict=Verdict(valid=True), rewards={})
    reporter = Reporter(tmp_path, 2, None, TrackingTable())
    for step, (name, seconds) in enumerate((("base", 1), ("policy", 0))):
        reporter.edits(step, name, [prompt], [(painted.remote(seconds), score)])
    reporter.close()
    assert [file.name for file in sorted(tmp_path.glob("samples/*.png"))] == [
        "eval_base_step_000000.png",
        "eval_policy_step_000001.png",
    ]
