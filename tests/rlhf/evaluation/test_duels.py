"""Win rates, differences and intervals with known answers; the source distance."""

import numpy as np
import pytest

from rlhf.evaluation.duels import Duel, Estimate, Picture, estimates, judge_result, source_distance, source_result


def duel(prompt, base, tuned, variant=0, distances=(None, None)):
    """base, tuned: the score of judge "a", None where it failed."""

    def picture(side, score, distance):
        scores = {} if score is None else {"a": score}
        return Picture(file=f"pictures/{prompt}_{variant}_{side}.png", scores=scores, source_distance=distance)

    return Duel(
        prompt=prompt,
        variant=variant,
        key=str(prompt),
        instruction="x",
        height=8,
        width=8,
        source=None,
        base=picture("base", base, distances[0]),
        tuned=picture("tuned", tuned, distances[1]),
    )


def test_a_tie_is_half_a_win():
    duels = [duel(0, 0.0, 1.0), duel(1, 0.0, 3.0), duel(2, 2.0, 2.0), duel(3, 2.0, 1.0)]
    result = judge_result("a", duels, seed=0)
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.win_rate.value == (1 + 1 + 0.5 + 0) / 4
    assert result.difference.value == (1 + 3 + 0 - 1) / 4
    assert (result.base, result.tuned) == (1.0, 1.75)
    assert (result.prompts, result.pairs, result.left_out) == (4, 4, 0)


def test_two_prompts_have_an_interval_that_can_be_counted():
    """Resamples of two prompts: both the first (1/4), both the second (1/4), one of each (1/2): so the 2.5 and 97.5 %
    points are the extremes."""
    (estimate,) = estimates([0, 1], np.array([[0.0], [1.0]]), seed=0)
    assert estimate == Estimate(value=0.5, low=0.0, high=1.0)
    (inner,) = estimates([0, 1], np.array([[0.0], [1.0]]), seed=0, level=0.4)
    assert (inner.low, inner.high) == (0.5, 0.5)


def test_a_failed_score_leaves_its_pair_out_and_is_counted():
    duels = [duel(0, 0.0, 1.0), duel(1, None, 5.0), duel(2, 5.0, None), duel(3, 1.0, 0.0)]
    result = judge_result("a", duels, seed=0)
    assert (result.prompts, result.pairs, result.left_out) == (2, 2, 2)
    assert (result.base, result.tuned, result.win_rate.value, result.difference.value) == (0.5, 0.5, 0.5, 0.0)
    assert judge_result("a", duels[1:3], seed=0) is None and judge_result("b", duels, seed=0) is None


def test_a_prompt_with_fewer_scored_pairs_weighs_less():
    """One prompt with three pairs of difference 1, one with a single pair of −3: the mean is 0, not −1."""
    prompts, values = [0, 0, 0, 1], np.array([[1.0], [1.0], [1.0], [-3.0]])
    (estimate,) = estimates(prompts, values, seed=0)
    assert estimate == Estimate(value=0.0, low=-3.0, high=1.0)


def test_a_single_prompt_gives_no_interval():
    result = judge_result("a", [duel(0, 0.0, 1.0, variant) for variant in range(5)], seed=0)
    assert result.win_rate == Estimate(value=1.0, low=None, high=None)
    assert result.difference == Estimate(value=1.0, low=None, high=None)


def test_more_pictures_of_the_same_prompts_do_not_narrow_the_interval():
    random = np.random.default_rng(0)
    differences = random.normal(0.1, 1.0, 30)
    once = estimates(range(30), differences[:, None], seed=1)
    ten_times = estimates(np.repeat(np.arange(30), 10), np.repeat(differences, 10)[:, None], seed=1)
    assert ten_times[0].low == pytest.approx(once[0].low) and ten_times[0].high == pytest.approx(once[0].high)
    as_if_independent = estimates(range(300), np.repeat(differences, 10)[:, None], seed=1)
    assert as_if_independent[0].high - as_if_independent[0].low < 0.5 * (once[0].high - once[0].low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """400 experiments of 50 prompts × 3 correlated pictures: the win rate's and the mean's truth lie within about 95 %."""
    random = np.random.default_rng(0)
    covered = np.zeros(2)
    for trial in range(400):
        values = (random.normal(0.0, 1.0, (50, 1)) + random.normal(0.0, 1.0, (50, 3))).ravel()
        columns = np.stack([(np.sign(values) + 1) / 2, values], axis=1)
        for i, (found, truth) in enumerate(
            zip(estimates(np.repeat(np.arange(50), 3), columns, seed=trial, resamples=500), (0.5, 0.0), strict=True)
        ):
            covered[i] += found.low <= truth <= found.high
    assert np.all((covered / 400 > 0.91) & (covered / 400 < 0.98)), covered / 400


def test_equal_seeds_give_equal_intervals_and_the_memory_bound_changes_nothing(monkeypatch):
    values = np.random.default_rng(0).normal(size=(40, 1))
    whole = estimates(range(40), values, seed=3)
    assert whole == estimates(range(40), values, seed=3) != estimates(range(40), values, seed=4)
    monkeypatch.setattr("rlhf.evaluation.duels._CELLS", 40 * 7)
    assert estimates(range(40), values, seed=3) == whole


def test_source_distance_looks_at_the_half_that_changed_least():
    source = np.full((4, 4, 3), 100, np.uint8)
    edit = source.copy()
    edit[:2] = 255  # half of the pixels: the edit itself
    assert source_distance(edit, source) == 0.0
    edit[2:, :, 0] = 70  # and one channel of the rest by −30: uint8 must not wrap around
    assert source_distance(edit, source) == pytest.approx(30 / 3 / 255)
    assert source_distance(np.full_like(source, 151), source) == pytest.approx(51 / 255)
    assert source_distance(np.full((1, 1, 3), 255, np.uint8), np.zeros((1, 1, 3), np.uint8)) == 1.0
    with pytest.raises(ValueError, match=r"\(2, 4, 3\).*\(4, 4, 3\)"):
        source_distance(edit[:2], source)


def test_source_result_is_about_tuned_minus_base():
    duels = [duel(0, 0, 0, distances=(0.4, 0.1)), duel(1, 0, 0, distances=(0.2, 0.3))]
    result = source_result(duels, seed=0)
    assert (result.prompts, result.pairs) == (2, 2)
    assert (result.base, result.tuned, result.difference.value) == pytest.approx((0.3, 0.2, -0.1))
    assert (result.difference.low, result.difference.high) == pytest.approx((-0.3, 0.1))
    assert source_result([duel(0, 0, 0)], seed=0) is None
