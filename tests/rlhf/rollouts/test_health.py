from functools import partial

import pytest

from rlhf.rollouts.health import (
    Load,
    SamplerLost,
    StaleWeights,
    Stalled,
    Start,
    died,
    dispatched,
    healthy,
    loaded,
    published,
    replied,
    start,
    started,
    ticked,
)

LIMITS = {"max_restarts": 2, "timeout_s": 10.0}
QUIET = partial(ticked, open_groups=0, judging=0)


def run(state, *events, now=0.0):
    """The last state and all commands of some events."""
    commands = ()
    for event in events:
        state, more = event(state, now=now)
        commands += more
    return state, commands


def serving(count=1):
    """Samplers that have started and loaded version 1."""
    state, _ = start(count, now=0.0, **LIMITS)
    for sampler in range(count):
        state, _ = run(state, partial(started, index=sampler, generation=0))
    state, _ = run(state, partial(published, version=1, checksum="c1"))
    for sampler in range(count):
        state, _ = run(state, partial(loaded, index=sampler, generation=0, version=1, checksum="c1"))
    return state


def busy():
    """Since 0 s, so until 10 s."""
    return run(serving(), partial(dispatched, index=0, tickets=(4, 5)))[0]


def test_only_a_loaded_sampler_gets_work():
    state, commands = start(2, now=0.0, **LIMITS)
    assert commands == (Start(sampler=0, generation=0), Start(sampler=1, generation=0))
    state, commands = run(state, partial(started, index=0, generation=0))
    assert commands == () and healthy(state) == ()  # nothing was published yet
    state, commands = run(state, partial(published, version=1, checksum="c1"))
    assert commands == (Load(sampler=0, generation=0, version=1),) and healthy(state) == ()
    state, commands = run(state, partial(started, index=1, generation=0))
    assert commands == (Load(sampler=1, generation=0, version=1),)
    state, _ = run(state, partial(loaded, index=0, generation=0, version=1, checksum="c1"))
    assert healthy(state) == (0,)
    with pytest.raises(ValueError, match="sampler 1 is stale"):
        run(state, partial(dispatched, index=1, tickets=(0,)))


def test_a_busy_sampler_gets_no_second_batch():
    with pytest.raises(ValueError, match="sampler 0 is busy"):
        run(busy(), partial(dispatched, index=0, tickets=(6,)))


def test_an_idle_sampler_loads_a_publish_at_once_and_a_busy_one_after_its_batch():
    state = run(serving(2), partial(dispatched, index=0, tickets=(4,)))[0]
    state, commands = run(state, partial(published, version=2, checksum="c2"))
    assert commands == (Load(sampler=1, generation=0, version=2),) and healthy(state) == ()
    state, commands = run(state, partial(replied, index=0, generation=0))
    assert commands == (Load(sampler=0, generation=0, version=2),) and healthy(state) == ()


def test_a_sampler_that_holds_the_current_version_serves_again_after_its_batch():
    state, commands = run(busy(), partial(replied, index=0, generation=0))
    assert commands == () and healthy(state) == (0,)


def test_a_load_that_a_publish_overtakes_is_followed_by_another():
    state, _ = run(serving(), partial(published, version=2, checksum="c2"))
    state, commands = run(state, partial(published, version=3, checksum="c3"))
    assert commands == ()
    state, commands = run(state, partial(loaded, index=0, generation=0, version=2, checksum="c2"))
    assert commands == (Load(sampler=0, generation=0, version=3),) and healthy(state) == ()
    state, _ = run(state, partial(loaded, index=0, generation=0, version=3, checksum="c3"))
    assert healthy(state) == (0,) and state.samplers[0].version == 3


@pytest.mark.parametrize("overtaken", [False, True])
def test_another_checksum_stops_the_run(overtaken):
    state, _ = run(serving(), partial(published, version=2, checksum="c2"))
    if overtaken:
        state, _ = run(state, partial(published, version=3, checksum="c3"))
    with pytest.raises(StaleWeights, match="sampler 0 holds checksum c1 for policy version 2, not the published c2"):
        run(state, partial(loaded, index=0, generation=0, version=2, checksum="c1"))


def test_versions_only_grow():
    with pytest.raises(ValueError, match="version 1 is not above 1"):
        run(serving(), partial(published, version=1, checksum="c1"))


def test_death_gives_the_batch_back_and_the_new_process_loads_before_it_serves():
    state, commands = run(busy(), partial(died, index=0, generation=0, reason="oom"))
    assert commands == (Start(sampler=0, generation=1, tickets=(4, 5), reason="oom"),)
    assert healthy(state) == ()
    state, commands = run(state, partial(started, index=0, generation=1))
    assert commands == (Load(sampler=0, generation=1, version=1),) and healthy(state) == ()
    state, _ = run(state, partial(loaded, index=0, generation=1, version=1, checksum="c1"))
    assert healthy(state) == (0,)


def test_a_hung_batch_is_condemned_after_its_deadline_and_its_late_answers_change_nothing():
    state = busy()
    assert run(state, QUIET, now=10.0) == (state, ())
    state, commands = run(state, QUIET, now=10.5)
    (command,) = commands
    assert isinstance(command, Start) and command.generation == 1 and command.tickets == (4, 5)
    late = (
        partial(replied, index=0, generation=0),
        partial(loaded, index=0, generation=0, version=1, checksum="wrong"),
        partial(started, index=0, generation=0),
        partial(died, index=0, generation=0, reason="killed"),
    )
    assert run(state, *late, now=11.0) == (state, ())


@pytest.mark.parametrize("loading", [False, True])
def test_starting_and_loading_have_deadlines_too(loading):
    state, _ = start(1, now=0.0, **LIMITS)
    if loading:
        state, _ = run(
            state, partial(published, version=1, checksum="c1"), partial(started, index=0, generation=0), now=5.0
        )
    assert run(state, QUIET, now=15.0 if loading else 10.0) == (state, ())
    state, commands = run(state, QUIET, now=16.0)
    reason = "loading version 1" if loading else "starting"
    assert commands == (Start(sampler=0, generation=1, reason=commands[0].reason),) and reason in commands[0].reason
    assert reason in state.samplers[0].history[0]


def test_too_many_restarts_stop_the_run_with_the_history():
    state = serving()
    for generation, reason in enumerate(("first", "second")):
        state, _ = run(state, partial(died, index=0, generation=generation, reason=reason))
    with pytest.raises(SamplerLost, match=r"(?s)max_restarts = 2.*0: first.*1: second.*2: third"):
        run(state, partial(died, index=0, generation=2, reason="third"))


def test_work_and_a_healthy_sampler_with_nothing_in_flight_is_a_stall():
    with pytest.raises(Stalled, match=r"3 groups are open and samplers \(0, 1\) are healthy"):
        run(serving(2), partial(ticked, open_groups=3, judging=0))
    for waiting in (
        run(serving(), QUIET),
        run(serving(), partial(ticked, open_groups=3, judging=1)),
        run(busy(), partial(ticked, open_groups=3, judging=0)),
        run(start(1, now=0.0, **LIMITS)[0], partial(ticked, open_groups=3, judging=0)),
    ):
        assert waiting[1] == ()


def test_a_batch_that_was_just_given_back_is_not_a_stall():
    state, _ = run(serving(2), partial(dispatched, index=0, tickets=(4,)))
    state, commands = run(state, partial(ticked, open_groups=1, judging=0), now=11.0)
    reason = state.samplers[0].history[0].removeprefix("generation 0: ")
    assert Start(sampler=0, generation=1, tickets=(4,), reason=reason) in commands
    with pytest.raises(Stalled):
        run(state, partial(ticked, open_groups=1, judging=0), now=12.0)


@pytest.mark.parametrize("sent", ["healthy", "busy", "loading"])
def test_events_out_of_turn_change_nothing(sent):
    loading, _ = run(serving(), partial(published, version=2, checksum="c2"))
    state = {"healthy": serving(), "busy": busy(), "loading": loading}[sent]
    up, answered = partial(started, index=0, generation=0), partial(replied, index=0, generation=0)
    acked = partial(loaded, index=0, generation=0, version=1, checksum="c1")  # once more
    for event in (up, acked) if sent == "busy" else (up, acked, answered):
        assert run(state, event) == (state, ())
