import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rewards.config import RewardConfig
from rlhf.rollouts.pairing import RewardScale, RolloutGroup, make_pair
from tests.rlhf.rollouts.groups import group

NUMBER = st.floats(-1e100, 1e100)


def test_running_scale_known_answer():
    # Group a: squares 0.5·(2)² = 2, 1 degree of freedom; group b: (−1, 0, 1), squares 2, 2 degrees: σ² = 4/3.
    a = group(0, {"hps": 1.0}, {"hps": 3.0})
    b = group(1, {"hps": 9.0}, {"hps": 10.0}, {"hps": 11.0})
    scale = RewardScale(weights={"hps": 1.0}).observe([a, b])
    sigma = math.sqrt(4 / 3)
    assert scale.deviations()["hps"] == pytest.approx(sigma, rel=1e-15)
    assert scale.totals(a) == pytest.approx([-1 / sigma, 1 / sigma])
    pair = make_pair(a, scale.parts(a))
    assert (pair.winner.attempt, pair.loser.attempt) == (1, 0)
    assert pair.margin == pytest.approx(2 / sigma) and pair.margins == {"hps": pair.margin}


def test_a_group_without_spread_counts_with_its_degrees_of_freedom():
    wide, flat = group(0, {"hps": 1.0}, {"hps": 3.0}), group(1, {"hps": 7.0}, {"hps": 7.0})
    assert RewardScale(weights={"hps": 1.0}).observe([wide, flat]).deviations() == {"hps": 1.0}  # 2 / (1 + 1)


def test_spread_across_prompts_does_not_count():
    near = [group(i, {"hps": 100.0 * i}, {"hps": 100.0 * i + 1}) for i in range(5)]
    assert RewardScale(weights={"hps": 1.0}).observe(near).deviations()["hps"] == pytest.approx(math.sqrt(0.5))


def test_each_reward_counts_the_same_whatever_its_units():
    rewards = [({"hps": 0.30, "ctr": 0.050}, {"hps": 0.20, "ctr": 0.051}), ({"hps": 0.2, "ctr": 0.05},) * 2]
    groups = [group(i, *values) for i, values in enumerate(rewards)]
    scale = RewardScale(weights={"hps": 1.0, "ctr": 1.0}).observe(groups)
    assert scale.totals(groups[0]) == pytest.approx([0.0, 0.0], abs=1e-9)  # +1 in hps, −1 in ctr


def test_reward_without_spread_adds_nothing():
    one = group(0, {"hps": 0.1, "ctr": 0.1}, {"hps": 0.3, "ctr": 0.1}, {"hps": 0.1, "ctr": 0.1})
    scale = RewardScale(weights={"hps": 1.0, "ctr": 1.0}).observe([one])
    assert scale.deviations()["ctr"] == 0.0
    assert scale.totals(one) == RewardScale(weights={"hps": 1.0}).observe([one]).totals(one)
    nothing = group(1, {"hps": 0.1, "ctr": 0.1}, {"hps": 0.1, "ctr": 0.1})
    empty = RewardScale(weights={"hps": 1.0, "ctr": 1.0}).observe([nothing])
    assert empty.totals(nothing) == (0.0, 0.0)
    assert make_pair(nothing, empty.parts(nothing)) is None


def test_fixed_scale_is_the_seeds_mixture():
    scale = RewardScale(weights={"hps": 1.0, "ctr": 1.0}, scaling="fixed")
    one = group(0, {"hps": 0.25, "ctr": 0.06}, {"hps": 0.50, "ctr": 0.02}, {"hps": 0.10, "ctr": 0.04})
    assert scale.totals(one) == pytest.approx([0.28, 0.51, 0.02])
    assert scale.observe([one]) is scale
    assert RewardScale(weights={"ctr": 1.0}, scaling="fixed").totals(one) == (0.06, 0.02, 0.04)
    with pytest.raises(ValueError, match="running"):
        RewardConfig(weights={"hps": 1.0, "sharpness": 1.0}, scaling="fixed")


def test_fixed_scale_sees_ties_that_clipping_makes():
    low = group(0, {"hps": 0.10, "ctr": 0.05}, {"hps": 0.14, "ctr": 0.05})
    assert RewardScale(weights={"hps": 1.0, "ctr": 1.0}, scaling="fixed").ties(low)
    assert not RewardScale(weights={"hps": 1.0, "ctr": 1.0}).ties(low)


def test_window_keeps_256_groups_and_all_of_a_larger_batch():
    wide = [group(i, {"hps": 0.0}, {"hps": 100.0}) for i in range(3)]
    narrow = [group(i, {"hps": 0.0}, {"hps": 1.0}) for i in range(256)]
    scale = RewardScale(weights={"hps": 1.0}).observe(wide).observe(narrow)
    assert len(scale.window) == 256
    assert scale.deviations()["hps"] == pytest.approx(math.sqrt(0.5))
    assert len(RewardScale(weights={"hps": 1.0}).observe(wide + narrow).window) == 259


@pytest.mark.parametrize("scaling", ["running", "fixed"])
def test_snapshot_survives_json_exactly(scaling):
    groups = [group(i, {"hps": 0.1 * i, "ctr": 0.3}, {"hps": 0.7, "ctr": 1 / (i + 3)}) for i in range(9)]
    scale = RewardScale(weights={"hps": 1.0, "ctr": 1.0}, scaling=scaling).observe(groups)
    again = RewardScale.restore(json.loads(json.dumps(scale.snapshot())))
    assert again == scale
    assert again.totals(groups[3]) == scale.totals(groups[3])


def test_equal_totals_make_no_pair():
    assert make_pair(group(0, {"hps": 1.0}, {"hps": 2.0}), [{"hps": 0.5}] * 2) is None


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=6), st.randoms())
def test_order_within_ties_does_not_matter(totals, order: random.Random):
    one = group(0, *({"hps": total} for total in totals))
    shuffled = list(range(len(totals)))
    order.shuffle(shuffled)
    other = RolloutGroup(
        cursor=0,
        prompt=one.prompt,
        candidates=tuple(one.candidates[i] for i in shuffled),
        scores=tuple(one.scores[i] for i in shuffled),
    )
    parts = [{"hps": total} for total in totals]
    assert make_pair(one, parts) == make_pair(other, [parts[i] for i in shuffled])


@given(st.lists(st.lists(st.tuples(NUMBER, NUMBER), min_size=2, max_size=4), min_size=1, max_size=4))
def test_totals_are_finite_and_margins_positive(batch):
    groups = [group(i, *({"hps": h, "ctr": c} for h, c in values)) for i, values in enumerate(batch)]
    scale = RewardScale(weights={"hps": 1.0, "ctr": 1.0}).observe(groups)
    for one in groups:
        totals = scale.totals(one)
        assert all(map(math.isfinite, totals))
        pair = make_pair(one, scale.parts(one))
        assert pair is None or (pair.margin > 0 and pair.winner.attempt != pair.loser.attempt)


@given(st.lists(NUMBER, min_size=2, max_size=5))
def test_one_reward_ranks_as_it_is(values):
    one = group(0, *({"hps": value} for value in values))
    pair = make_pair(one, RewardScale(weights={"hps": 1.0}).observe([one]).parts(one))
    if pair:
        assert pair.winner_score.rewards["hps"] >= pair.loser_score.rewards["hps"]


def test_weights_multiply_standardised_rewards():
    one = group(0, {"hps": 0.0, "ctr": 0.02}, {"hps": 2.0, "ctr": 0.01})
    scale = RewardScale(weights={"hps": 1.0, "ctr": 3.0}).observe([one])
    unit = math.sqrt(0.5)  # two values one deviation apart: ±1/√2
    assert scale.totals(one) == pytest.approx([-unit + 3 * unit, unit - 3 * unit])
    assert RewardScale.restore(json.loads(json.dumps(scale.snapshot()))) == scale
    pair = make_pair(one, scale.parts(one))
    assert (pair.winner.attempt, pair.loser.attempt) == (0, 1) and pair.margin == pytest.approx(4 * unit)
    assert pair.margins == pytest.approx({"hps": -2 * unit, "ctr": 6 * unit}), "it lost in hps and won by ctr"


def test_weights_average_the_seeds_mixture():
    one = group(0, {"hps": 0.25, "ctr": 0.06}, {"hps": 0.50, "ctr": 0.02})
    scale = RewardScale(weights={"ctr": 1.0, "hps": 3.0}, scaling="fixed")
    assert scale.totals(one) == pytest.approx([0.75 * 0.5 + 0.25 * 0.06, 0.75 + 0.25 * 0.02])


def test_a_weight_of_0_asks_a_judge_and_decides_nothing():
    reward = RewardConfig(weights={"hps": 2.0, "shown": 0.0})
    assert reward.names == ("hps", "shown") and reward.mix == {"hps": 2.0}
