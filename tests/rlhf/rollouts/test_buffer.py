import pytest

from rlhf.rollouts.buffer import take, wanted
from rlhf.rollouts.rollout import NothingPasses, drain
from tests.rlhf.rollouts.groups import FAIL, enqueue, finish, fresh, passed


def by_attempt(candidate):
    return passed(hps=float(candidate.attempt))


def closed(cursors, *, version=0, state=None, judge=by_attempt):
    state, commands = enqueue(state or fresh(), cursors)
    return finish(state, commands, judge, version=version)


def test_wanted_keeps_lookahead_plus_one_batches():
    state = fresh()
    assert wanted(state, 4, lookahead=0) == (0, 1, 2, 3)
    assert wanted(state, 4, lookahead=2) == tuple(range(12))
    state, commands = enqueue(state, wanted(state, 4, lookahead=0))
    assert wanted(state, 4, lookahead=0) == ()
    state = finish(state, commands, lambda c: FAIL if c.cursor == 2 else by_attempt(c))
    assert wanted(state, 4, lookahead=0) == (4,)
    assert wanted(state, 1, lookahead=0) == ()


def test_too_few_groups_change_nothing():
    state = closed(range(3))
    after, pairs = take(state, 4, step=99, max_age=0, version_steps={})
    assert pairs is None and after is state


def test_the_lowest_cursors_are_consumed_in_order():
    state, commands = enqueue(fresh(), range(5))
    state = finish(state, list(reversed(commands)), by_attempt)
    state, pairs = take(state, 3, step=0, max_age=0, version_steps={0: 0})
    assert [pair.cursor for pair in pairs] == [0, 1, 2]
    assert sorted(state.closed) == [3, 4] and state.trained == 3
    state, pairs = take(state, 3, step=1, max_age=1, version_steps={0: 0})
    assert pairs is None


@pytest.mark.parametrize(
    ("step", "max_age", "version_steps", "fresh_enough"),
    [
        (7, 2, {0: 5}, True),
        (8, 2, {0: 5}, False),  # too old
        (4, 2, {0: 5}, False),  # from steps that a rollback undid
        (5, 2, {1: 5}, False),  # a version that this run no longer knows
    ],
)
def test_age_is_checked_when_consumed(step, max_age, version_steps, fresh_enough):
    state = closed(range(2))
    state, pairs = take(state, 2, step=step, max_age=max_age, version_steps=version_steps)
    assert (pairs is not None) == fresh_enough
    if not fresh_enough:
        assert state.dropped == {"stale": 2} and not state.closed and state.scale.window == ()


def test_stale_groups_make_room_for_fresh_ones():
    state = closed(range(2), version=0)
    state = closed(range(2, 4), version=1, state=state)
    state, pairs = take(state, 2, step=9, max_age=1, version_steps={0: 5, 1: 9})
    assert [pair.cursor for pair in pairs] == [2, 3] and state.dropped == {"stale": 2}
    metrics = drain(state)[1]
    assert metrics["rollout/dropped_stale"] == 2 and metrics["rollout/staleness"] == 0
    assert len(state.scale.window) == 2


def test_a_pair_is_as_old_as_its_older_side():
    state, commands = enqueue(fresh(), [0])
    early, late = commands
    state = finish(state, [early], by_attempt, version=3)
    state = finish(state, [late], by_attempt, version=4)
    assert take(state, 1, step=8, max_age=1, version_steps={3: 6, 4: 8})[1] is None
    (pair,) = take(state, 1, step=8, max_age=2, version_steps={3: 6, 4: 8})[1]
    assert pair.version == 3


def test_a_running_scale_learns_from_consumed_groups_only():
    state = closed(range(3), judge=lambda c: passed(hps=float(c.attempt * (10 if c.cursor == 2 else 1))))
    state, pairs = take(state, 2, step=0, max_age=0, version_steps={0: 0})
    assert state.scale.deviations()["hps"] == pytest.approx(0.5**0.5)
    assert [pair.margin for pair in pairs] == pytest.approx([2**0.5] * 2)
    metrics = drain(state)[1]
    assert metrics["reward/margin"] == pytest.approx(2**0.5)


def test_a_tie_that_only_the_scale_reveals_is_dropped_when_consumed():
    # +1σ in one reward and −1σ in the other: equal totals from unequal rewards.
    state = closed(range(1), state=fresh(names=("hps", "ctr")), judge=lambda c: passed(hps=c.attempt, ctr=-c.attempt))
    assert sorted(state.closed) == [0]
    state, pairs = take(state, 1, step=0, max_age=0, version_steps={0: 0})
    assert pairs is None and state.dropped == {"tie": 1} and state.scale.window == ()
    assert wanted(state, 1, lookahead=0) == (1,)


def test_endless_staleness_stops_the_run():
    state = fresh(max_dropped_in_a_row=3)
    with pytest.raises(NothingPasses, match=r"too old to train on.*max_age = 1"):
        for _ in range(99):
            state, commands = enqueue(state, wanted(state, 2, lookahead=0))
            state = finish(state, commands, by_attempt)
            state, pairs = take(state, 2, step=50, max_age=1, version_steps={0: 0})
            assert pairs is None
