"""When a judge fails too often to go on with."""

import pytest

from rlhf.rollouts.reliability import FailureRates, JudgeUnreliable


def test_a_judge_that_fails_more_than_its_share_stops_the_evaluation():
    rates = FailureRates(0.3)
    for _ in range(7):
        rates.add("a", None)
        rates.add("b", None)
    for _ in range(3):
        rates.add("a", "timed out")  # 3 of 10 is not above 0.3
    rates.check("a")
    with pytest.raises(JudgeUnreliable, match=r"'a' failed 4 of its last 11 calls.*30%.*broke"):
        rates.add("a", "broke")
    rates.check("b")
    rates.check("never asked")


def test_few_calls_are_judged_only_at_the_end():
    rates = FailureRates(0.3)
    for _ in range(9):
        rates.add("a", "broke")
    with pytest.raises(JudgeUnreliable, match="failed 9 of its last 9"):
        rates.check("a")


def test_only_the_last_fifty_calls_count():
    rates = FailureRates(0.2)
    for index in range(400):
        rates.add("a", "broke" if index % 10 == 0 else None)
    for _ in range(5):  # 10 of the last 50 are allowed: the 5 of every 50, and these
        rates.add("a", "broke")
    with pytest.raises(JudgeUnreliable):
        for _ in range(6):
            rates.add("a", "broke")
