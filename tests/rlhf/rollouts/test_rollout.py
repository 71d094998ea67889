import dataclasses
import json
import math
import random

import pytest

from rlhf.rollouts.buffer import take, wanted
from rlhf.rollouts.reliability import JudgeUnreliable
from rlhf.rollouts.rollout import NothingPasses, drain, judge_failed, judge_lost, judged, sample_lost, sampled
from rlhf.rollouts.state import Judge, Sample, restore, snapshot
from tests.rlhf.rollouts.groups import FAIL, answer, candidate, enqueue, finish, fresh, passed, place, prompt


def by_attempt(candidate):
    return passed(hps=float(candidate.attempt))


def rejecting(*attempts):
    return lambda candidate: FAIL if candidate.attempt in attempts else by_attempt(candidate)


def to_judging(state, cursor=0):
    """Enqueue one prompt and sample its first candidates: the state and the Judge commands."""
    state, commands = enqueue(state, [cursor])
    judges = []
    for command in commands:
        state, more = answer(state, command, by_attempt)
        judges += more
    return state, judges


def test_a_group_starts_with_as_many_attempts_as_it_needs():
    state, commands = enqueue(fresh(num_valid_samples=3), [0])
    assert [(c.cursor, c.attempt) for c in commands] == [(0, 0), (0, 1), (0, 2)]
    assert all(isinstance(c, Sample) and c.prompt == prompt(0) for c in commands)
    assert place(state, 0) == "sampling" and place(state, 1) == "unseen"


def test_a_sampled_candidate_goes_to_the_judges_with_its_prompt():
    state, judges = to_judging(fresh())
    assert judges == [Judge(ticket=j.ticket, candidate=candidate(0, a), prompt=prompt(0)) for a, j in enumerate(judges)]
    assert place(state, 0) == "judging"


def test_only_the_group_that_failed_is_topped_up():
    state, commands = enqueue(fresh(), [0, 1])
    issued = []
    while commands:
        command = commands.pop(0)
        issued += [(command.cursor, command.attempt)] if isinstance(command, Sample) else []
        judge = rejecting(0, 2) if isinstance(command, Judge) and command.candidate.cursor == 0 else by_attempt
        state, more = answer(state, command, judge)
        commands += more
    assert sorted(issued) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert [c.attempt for c in state.closed[0].candidates] == [1, 3]
    assert [c.attempt for c in state.closed[1].candidates] == [0, 1]


def test_a_closed_group_lists_its_candidates_by_attempt():
    state, commands = enqueue(fresh(), [0])
    state = finish(state, commands[::-1], by_attempt)
    assert [c.attempt for c in state.closed[0].candidates] == [0, 1]
    assert state.closed[0].values("hps") == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_arrival_order_changes_neither_candidates_nor_pairs(seed):
    def judge(candidate):
        valid = random.Random(f"{candidate.cursor}/{candidate.attempt}").random() < 0.4
        return passed(hps=math.sin(candidate.cursor * 7 + candidate.attempt)) if valid else FAIL

    def run(order):
        state, batches = fresh(max_sample_attempts=6), []
        for step in range(4):
            pairs = None
            while pairs is None:
                state, commands = enqueue(state, wanted(state, 5, lookahead=0))
                state = finish(state, commands, judge, order)
                state, pairs = take(state, 5, step=step, max_age=9, version_steps={0: 0})
            state, metrics, _ = drain(state)
            batches.append((pairs, metrics))
        return batches, snapshot(state)["scale"]

    assert run(random.Random(seed)) == run(None)


def test_too_few_valid_is_dropped_with_its_counts():
    state, commands = enqueue(fresh(), [0])
    state = finish(state, commands, rejecting(*range(1, 20)))
    assert state.dropped == {"too_few_valid": 1} and not state.closed and not state.open and not state.tickets
    state, metrics, notes = drain(state)
    assert notes == ("prompt 0: dropped, too few valid: 1 of 20 passed, 19 FAIL, 0 quarantined",)
    assert metrics["filter/pass_rate"] == 1 / 20
    assert metrics["rollout/attempts_per_group"] == 20
    assert metrics["rollout/dropped_too_few_valid"] == 1
    assert drain(state)[1]["rollout/dropped_too_few_valid"] == 0


def test_two_valid_of_three_wanted_still_make_a_group_when_attempts_run_out():
    state, commands = enqueue(fresh(num_valid_samples=3, max_sample_attempts=4), [0])
    state = finish(state, commands, rejecting(0, 2))
    assert [c.attempt for c in state.closed[0].candidates] == [1, 3]


def test_a_tie_is_dropped():
    state, commands = enqueue(fresh(), [0])
    state = finish(state, commands, lambda c: passed(hps=0.5))
    assert state.dropped == {"tie": 1}


def test_a_lost_sample_is_the_same_attempt_under_a_new_ticket():
    state, (first, _) = enqueue(fresh(), [0])
    state, (again,) = sample_lost(state, first.ticket)
    assert (again.cursor, again.attempt, again.prompt) == (first.cursor, first.attempt, first.prompt)
    assert again.ticket not in (0, 1)
    assert state.open[0].issued == 2
    late = sampled(state, first.ticket, candidate(0, 0))
    assert late == (state, ()) and late[0] is state


def test_a_lost_judgement_is_the_same_candidate_under_a_new_ticket():
    state, (first, _) = to_judging(fresh())
    state, (again,) = judge_lost(state, first.ticket)
    assert isinstance(again, Judge) and again.candidate == first.candidate and again.ticket != first.ticket
    assert judged(state, first.ticket, FAIL)[0] is state


def test_lost_pixels_are_sampled_again():
    state, (first, _) = to_judging(fresh())
    state, (again,) = sample_lost(state, first.ticket)
    assert isinstance(again, Sample) and again.attempt == first.candidate.attempt


def test_a_ticket_is_spent_once_and_answers_of_the_wrong_kind_change_nothing():
    state, (sample, _) = enqueue(fresh(), [0])
    for unchanged, commands in (
        judged(state, sample.ticket, FAIL),
        judge_failed(state, sample.ticket, "hps", ""),
        judge_lost(state, sample.ticket),
        judged(state, 99, FAIL),
        judge_failed(state, 99, "hps", ""),
        judge_lost(state, 99),
        sample_lost(state, 99),
    ):
        assert unchanged is state and commands == ()
    state, (judge,) = sampled(state, sample.ticket, candidate(0, 0))
    assert sampled(state, judge.ticket, candidate(0, 0))[0] is state
    state, _ = judged(state, judge.ticket, by_attempt(judge.candidate))
    assert judged(state, judge.ticket, by_attempt(judge.candidate))[0] is state


@pytest.mark.parametrize("got", [(1, 0), (0, 1)])
def test_a_candidate_of_another_prompt_or_attempt_is_an_error(got):
    state, (sample, *_) = enqueue(fresh(), [0, 1])
    with pytest.raises(ValueError, match=r"asked for .*\(0, 0\)"):
        sampled(state, sample.ticket, candidate(*got))


def test_cursors_come_in_turn():
    state, _ = enqueue(fresh(), [0])
    for cursor in (0, 2, -1):
        with pytest.raises(ValueError, match="next cursor is 1"):
            enqueue(state, [cursor])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200, "0.3", None, True])
def test_a_reward_that_is_no_number_quarantines_the_candidate(value):
    state, (judge, _) = to_judging(fresh(names=("hps", "ctr")))
    rewards = {"hps": 0.2} if value is None else {"hps": 0.2, "ctr": value}
    state, (sample,) = judged(state, judge.ticket, passed(**rewards))
    assert sample.attempt == 2 and state.open[0].quarantined == 1 and not state.open[0].valid
    _, metrics, notes = drain(state)
    assert metrics["rollout/quarantined_ctr"] == 1 and "ctr" in notes[0]
    assert "filter/pass_rate" not in metrics


def test_a_failed_judge_quarantines_the_candidate_and_tops_up():
    state, (first, second) = to_judging(fresh())
    state, (sample,) = judge_failed(state, first.ticket, "hps", "timeout")
    state, _ = judged(state, second.ticket, passed(hps=0.1))
    state = finish(state, [sample], by_attempt)
    assert [c.attempt for c in state.closed[0].candidates] == [1, 2]


def failing_at(share, judge="ctr", calls=200):
    """Judge candidates, every 1/share-th of which fails at `judge`; the events that made it so are seeded."""
    state = fresh(names=("hps", "ctr"), max_failure_rate=0.5, max_dropped_in_a_row=10**6)
    state, commands = enqueue(state, [0])
    rng, done = random.Random(5), 0
    while done < calls:
        if not commands:
            state, commands = enqueue(state, [state.next_cursor])
        command = commands.pop(0)
        done += isinstance(command, Judge)
        if isinstance(command, Judge) and rng.random() < share:
            state, more = judge_failed(state, command.ticket, judge, "connection refused")
        else:
            state, more = answer(state, command, lambda c: passed(hps=float(c.attempt), ctr=0.1))
        commands += more
    return state


def test_a_judge_that_fails_too_often_stops_the_run():
    with pytest.raises(JudgeUnreliable, match=r"'ctr' failed \d+ of its last \d+ calls.*connection refused"):
        failing_at(0.8)
    assert failing_at(0.3).calls["ctr"].count(True) > 0


def test_one_failure_is_not_yet_a_rate():
    state = failing_at(1.0, calls=9)
    assert state.calls["ctr"] == (True,) * 9 and state.calls["filter"] == (False,) * 9
    with pytest.raises(JudgeUnreliable, match="10 of its last 10 calls"):
        failing_at(1.0, calls=10)


def test_the_failure_rate_forgets_calls_beyond_its_window():
    assert len(failing_at(0.2).calls["filter"]) == 50


def test_nothing_passes_stops_with_the_counts():
    state, commands = enqueue(fresh(max_dropped_in_a_row=3), range(3))
    with pytest.raises(
        NothingPasses, match=r"0 of 60 candidates passed the filter; check .*3 groups in a row.*60 FAIL"
    ):
        finish(state, commands, lambda c: FAIL)


def test_nothing_but_ties_stops_and_says_so():
    state, commands = enqueue(fresh(max_dropped_in_a_row=4), range(4))
    with pytest.raises(NothingPasses, match=r"8 of 8 candidates passed the filter; but the rewards tie"):
        finish(state, commands, lambda c: passed(hps=1.0))


def test_a_usable_group_ends_the_row_of_drops():
    state = fresh(max_dropped_in_a_row=2, max_sample_attempts=2)
    for cursor in range(9):
        state, commands = enqueue(state, [cursor])
        state = finish(state, commands, lambda c: by_attempt(c) if c.cursor % 2 else FAIL)
    assert state.dropped == {"too_few_valid": 5} and len(state.closed) == 4


def test_reward_metrics_are_means_since_the_last_drain():
    state, commands = enqueue(fresh(names=("hps", "ctr")), [0])
    state = finish(state, commands, lambda c: passed(hps=float(c.attempt), ctr=3.0 + c.attempt))
    state, metrics, _ = drain(state)
    assert (metrics["reward/hps"], metrics["reward/ctr"], metrics["reward/mean"]) == (0.5, 3.5, 2.0)
    assert "reward/hps" not in drain(state)[1]


def test_a_resume_reopens_exactly_what_was_neither_trained_nor_dropped():
    state, commands = enqueue(fresh(), range(3))
    state = finish(state, commands, lambda c: FAIL if c.cursor == 1 else by_attempt(c))
    state, pairs = take(state, 1, step=0, max_age=0, version_steps={0: 0})
    assert [pair.cursor for pair in pairs] == [0]
    state, _ = enqueue(state, [3, 4])
    stored = json.loads(json.dumps(snapshot(state)))
    again = restore(stored, state)
    assert again.queued == (2, 3, 4) and again.next_cursor == 5 and again.trained == 1
    assert again.dropped == {"too_few_valid": 1} and again.scale == state.scale and again.calls == state.calls
    assert [place(again, cursor) for cursor in range(6)] == ["done", "done", "queued", "queued", "queued", "unseen"]
    assert wanted(again, 2, lookahead=1) == (2, 3, 4, 5)
    resumed, commands = enqueue(again, wanted(again, 2, lookahead=1))
    assert {(c.cursor, c.attempt) for c in commands} == {(cursor, a) for cursor in (2, 3, 4, 5) for a in (0, 1)}
    for ticket in state.tickets:  # an answer to a command from before the resume
        assert sampled(resumed, ticket, candidate(3, 0))[0] is resumed
    assert snapshot(restore(stored, fresh())) == stored


def test_states_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fresh().next_cursor = 1
