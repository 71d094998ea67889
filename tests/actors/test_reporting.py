"""What a contact sheet says of pictures."""

from actors.reporting import ahead, describe
from rlhf.rollouts.pairing import RewardScale, make_pair
from rlhf.types import Score, Verdict
from tests.rlhf.rollouts.groups import group


def test_a_winner_says_by_how_much_and_by_which_reward():
    one = group(0, {"hps": 0.2, "ctr": 0.10}, {"hps": 0.3, "ctr": 0.12})
    pair = make_pair(one, RewardScale(weights={"hps": 1.0, "ctr": 2.0}, scaling="fixed").parts(one))
    assert ahead(pair) == "by 0.18: hps +0.17, ctr +0.01"  # (0.75 − 0.25) / 3 and 2 × 0.02 / 3


def test_scores_and_failures_are_described():
    score = Score(verdict=Verdict(valid=True, pass_probability=0.93), rewards={"hps": 0.28, "ctr": 0.05})
    assert describe(score) == "PASS p=0.93\nhps 0.2800  ctr 0.0500"
    assert describe(Score(verdict=Verdict(valid=False, reason="two\nspoons"))) == "FAIL\ntwo spoons"
