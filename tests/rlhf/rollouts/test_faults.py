"""Rollout machine, pair buffer and sampler health together, driven through random faults, against a plain bookkeeper.

The machine below is a shell without actors: hypothesis chooses who answers, who dies, who hangs, which answers come
late or twice, when the trainer steps, publishes or resumes. After every choice the bookkeeper's invariants must hold.
"""

import json
import random
from functools import partial

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlhf.rollouts import health, rollout
from rlhf.rollouts.buffer import take, wanted
from rlhf.rollouts.state import Judge, Sample, restore, snapshot
from tests.rlhf.rollouts.groups import FAIL, asked_for, candidate, enqueue, fresh, passed, place, prompt

PAIRS, BATCH, TIMEOUT = 3, 4, 10.0
OUTCOMES = ["pass"] * 6 + ["tie", "fail", "fail", "nan", "error", "lost", "pixels"]
ENOUGH = dict(max_dropped_in_a_row=10**6, max_failure_rate=1.0, max_sample_attempts=5)


class Faults(RuleBasedStateMachine):
    lookahead = 1
    publish_every = 2
    max_age = 2  # lookahead + publish_every - 1, the least that works

    def __init__(self):
        super().__init__()
        self.now, self.step, self.version = 0.0, 0, 0
        self.rollout = fresh(names=("hps",), **ENOUGH)
        self.health, commands = health.start(2, max_restarts=10**6, timeout_s=TIMEOUT, now=self.now)
        self.version_steps, self.checksums = {}, {}
        self.to_sample: list[Sample] = []
        self.to_judge: dict[int, Judge] = {}
        self.processes: dict[tuple[int, int], dict] = {}  # (sampler, generation) → what the process really does
        self.late: list = []  # answers of the condemned, and answers that already came once
        self.trained: dict[int, int] = {}  # cursor → step: what the committed and current history has trained
        self.dropped: set[int] = set()
        self.obey(commands)
        self.publish()
        for _ in range(2 * len(self.processes)):
            self.finish_one(next(key for key, process in self.processes.items() if process["doing"]))
        self.fill()

    # What a shell does.

    def obey(self, commands):
        for command in commands:
            match command:
                case health.Start():
                    gone = self.processes.pop((command.sampler, command.generation - 1), {})
                    for sample in gone.get("batch", ()):  # it may answer although it was condemned
                        got = candidate(sample.cursor, sample.attempt, gone["version"])
                        self.late.append(partial(rollout.sampled, ticket=sample.ticket, candidate=got))
                    for ticket in command.tickets:
                        self.tell(partial(rollout.sample_lost, ticket=ticket))
                    self.processes[command.sampler, command.generation] = dict(doing="start", version=None)
                case health.Load():
                    process = self.processes[command.sampler, command.generation]
                    process.update(doing="load", load=command.version)
                case Sample():
                    self.to_sample.append(command)
                case Judge():
                    self.to_judge[command.ticket] = command

    def tell(self, event):
        before = self.live()
        self.rollout, commands = event(self.rollout)
        self.dropped |= before - self.live()
        self.obey(commands)

    def live(self):
        return {*self.rollout.queued, *self.rollout.open, *self.rollout.closed}

    def health_event(self, event):
        self.health, commands = event(self.health, now=self.now)
        self.obey(commands)

    def publish(self):
        self.version += 1
        self.version_steps[self.version] = self.step
        self.checksums[self.version] = f"sum{self.version}"
        self.health_event(partial(health.published, version=self.version, checksum=self.checksums[self.version]))

    def dispatch(self):
        for index in health.healthy(self.health):
            process = self.processes[index, self.health.samplers[index].generation]
            assert process["version"] == self.version, "a sampler got work without the current version"
            batch, self.to_sample = self.to_sample[:BATCH], self.to_sample[BATCH:]
            if batch:
                process.update(doing="batch", batch=batch)
                tickets = tuple(sample.ticket for sample in batch)
                self.health_event(partial(health.dispatched, index=index, tickets=tickets))

    def tick(self):
        self.dispatch()
        self.health_event(partial(health.ticked, open_groups=len(self.rollout.open), judging=len(self.to_judge)))

    def pick(self, data, what):
        return data.draw(st.sampled_from(sorted(what)))

    # What can happen.

    @rule(seed=st.integers(0, 10**6), rounds=st.integers(1, 6))
    def work_goes_on(self, seed, rounds):
        """Most things answer, in any order, and not all answers are good."""
        order = random.Random(seed)
        for _ in range(rounds):
            self.fill()
            for key in order.sample(sorted(self.processes), len(self.processes)):
                if self.processes[key]["doing"] and order.random() < 0.9:
                    self.finish_one(key)
            for ticket in order.sample(sorted(self.to_judge), len(self.to_judge)):
                if order.random() < 0.9:
                    self.judge(ticket, order.choice(OUTCOMES))
            self.the_trainer_steps()

    @rule()
    def fill(self):
        before = self.rollout.next_cursor
        self.rollout, commands = enqueue(self.rollout, wanted(self.rollout, PAIRS, self.lookahead))
        self.obey(commands)
        assert len(self.rollout.open) + len(self.rollout.closed) == (self.lookahead + 1) * PAIRS
        assert not self.rollout.queued or self.rollout.next_cursor == before, "a reopened prompt was passed over"
        self.tick()

    @rule(data=st.data(), count=st.integers(1, 6))
    def samplers_finish_what_they_do(self, data, count):
        for _ in range(count):
            if waiting := [key for key, process in self.processes.items() if process["doing"]]:
                self.finish_one(self.pick(data, waiting))

    def finish_one(self, key):
        sampler, generation = key
        process = self.processes[key]
        doing, process["doing"] = process["doing"], None
        if doing == "start":
            self.health_event(partial(health.started, index=sampler, generation=generation))
        elif doing == "load":
            process["version"] = process["load"]
            checksum = self.checksums[process["version"]]
            acked = partial(
                health.loaded, index=sampler, generation=generation, version=process["version"], checksum=checksum
            )
            self.health_event(acked)
        else:
            batch = process.pop("batch")
            self.health_event(partial(health.replied, index=sampler, generation=generation))
            for sample in batch:
                got = candidate(sample.cursor, sample.attempt, process["version"])
                event = partial(rollout.sampled, ticket=sample.ticket, candidate=got)
                self.tell(event)
                self.late.append(event)
        self.tick()

    @rule(data=st.data(), outcomes=st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=9))
    def judgements_come(self, data, outcomes):
        for outcome in outcomes:
            if self.to_judge:
                self.judge(self.pick(data, self.to_judge), outcome)

    def judge(self, ticket, outcome):
        reward = float(self.to_judge.pop(ticket).candidate.attempt)
        event = {
            "pass": partial(rollout.judged, ticket=ticket, score=passed(hps=reward)),
            "tie": partial(rollout.judged, ticket=ticket, score=passed(hps=0.5)),
            "fail": partial(rollout.judged, ticket=ticket, score=FAIL),
            "nan": partial(rollout.judged, ticket=ticket, score=passed(hps=float("nan"))),
            "error": partial(rollout.judge_failed, ticket=ticket, judge="hps", reason="timeout"),
            "lost": partial(rollout.judge_lost, ticket=ticket),
            "pixels": partial(rollout.sample_lost, ticket=ticket),
        }[outcome]
        self.tell(event)
        self.late.append(event)
        self.tick()

    @rule(data=st.data())
    def a_sampler_dies(self, data):
        sampler, generation = self.pick(data, self.processes)
        self.health_event(partial(health.died, index=sampler, generation=generation, reason="died"))
        self.tick()

    @rule()
    def whoever_waits_hangs_past_the_deadline(self):
        waiting = {key for key, process in self.processes.items() if process["doing"]}
        self.now += TIMEOUT + 1
        self.tick()
        assert not waiting & set(self.processes), "a process that hangs was not condemned"

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def a_late_or_repeated_answer_changes_nothing(self, data):
        event = self.late[data.draw(st.integers(0, len(self.late) - 1))]
        after, commands = event(self.rollout)
        assert after is self.rollout and commands == ()

    @rule(data=st.data())
    def an_event_of_a_condemned_process_changes_nothing(self, data):
        old = [(i, g) for i, sampler in self.health.samplers.items() for g in range(sampler.generation)]
        if old:
            sampler, generation = self.pick(data, old)
            for event in (
                partial(health.started, index=sampler, generation=generation),
                partial(health.replied, index=sampler, generation=generation),
                partial(health.died, index=sampler, generation=generation, reason="late"),
                partial(health.loaded, index=sampler, generation=generation, version=self.version, checksum="x"),
            ):
                assert event(self.health, now=self.now) == (self.health, ())

    @rule()
    def the_trainer_steps(self):
        before = self.rollout
        live = self.live()
        self.rollout, pairs = take(
            before, PAIRS, step=self.step, max_age=self.max_age, version_steps=self.version_steps
        )
        used = {pair.cursor for pair in pairs or ()}
        self.dropped |= live - self.live() - used
        if pairs is None:
            assert len(before.closed) >= PAIRS or self.rollout is before
            assert self.rollout.scale is before.scale
            return
        assert len(used) == len(pairs) == PAIRS and all(cursor > max(used) for cursor in self.rollout.closed)
        for pair in pairs:
            assert pair.cursor not in self.trained, "a pair trained twice"
            assert pair.winner.cursor == pair.loser.cursor == pair.cursor and pair.winner.attempt != pair.loser.attempt
            assert pair.prompt == prompt(pair.cursor) and pair.margin > 0
            assert pair.winner_score.verdict.valid and pair.loser_score.verdict.valid
            assert pair.winner_score.rewards["hps"] > pair.loser_score.rewards["hps"]
            assert 0 <= self.step - self.version_steps[pair.version] <= self.max_age, "a stale pair trained"
            self.trained[pair.cursor] = self.step
        self.step += 1
        if self.step % self.publish_every == 0:
            self.publish()
        self.tick()

    @rule(back=st.integers(1, 3))
    def the_trainer_rolls_back(self, back):
        """What was sampled by policies of undone steps must never train."""
        self.step = max(self.step - back, 0)
        self.version_steps = {version: step for version, step in self.version_steps.items() if step <= self.step}
        self.publish()

    @rule()
    def the_trainer_commits_and_is_rebuilt(self):
        """Back to a snapshot: open groups start over, and what was asked before is answered to nobody."""
        stored = json.loads(json.dumps(snapshot(self.rollout)))
        self.late += [partial(rollout.judged, ticket=ticket, score=passed(hps=1.0)) for ticket in self.to_judge]
        self.late += [
            partial(rollout.sampled, ticket=s.ticket, candidate=candidate(s.cursor, s.attempt)) for s in self.to_sample
        ]
        again = restore(stored, self.rollout)
        assert set(again.queued) == self.live() and snapshot(again) == stored
        assert again.scale == self.rollout.scale
        self.rollout, self.to_sample, self.to_judge = again, [], {}
        self.publish()

    # What must hold.

    @invariant()
    def every_prompt_is_in_exactly_one_place(self):
        state = self.rollout
        places = [set(state.queued), set(state.open), set(state.closed), set(self.trained), self.dropped]
        assert sum(map(len, places)) == len(set().union(*places)) == state.next_cursor
        assert set().union(*places) == set(range(state.next_cursor))
        assert state.trained == len(self.trained) and sum(state.dropped.values()) == len(self.dropped)
        for cursor in range(state.next_cursor):
            assert (place(state, cursor) == "done") == (cursor in self.dropped or cursor in self.trained)

    @invariant()
    def every_group_has_what_it_waits_for_and_no_more(self):
        limits = self.rollout.config
        for cursor, group in self.rollout.open.items():
            flying = [attempt for other, attempt in map(asked_for, self.rollout.tickets.values()) if other == cursor]
            assert len(flying) == group.pending > 0
            assert len(set(flying)) == len(flying)
            assert group.issued <= limits.max_sample_attempts
            assert len(group.valid) + group.pending <= limits.num_valid_samples
            if group.issued < limits.max_sample_attempts:
                assert len(group.valid) + group.pending == limits.num_valid_samples
        assert {asked_for(command)[0] for command in self.rollout.tickets.values()} <= set(self.rollout.open)

    @invariant()
    def every_ticket_is_on_its_way(self):
        """No stall with work left: each live ticket waits for dispatch, is with a live sampler, or with the judges."""
        waiting = [sample.ticket for sample in self.to_sample] + list(self.to_judge)
        for (sampler, generation), process in self.processes.items():
            assert self.health.samplers[sampler].generation == generation
            if self.health.samplers[sampler].status == "busy":
                waiting += [sample.ticket for sample in process["batch"]]
        live = [ticket for ticket in waiting if ticket in self.rollout.tickets]
        assert len(live) == len(set(live)) and set(live) == set(self.rollout.tickets)

    @invariant()
    def whoever_serves_holds_the_current_version(self):
        for index in health.healthy(self.health):
            assert self.processes[index, self.health.samplers[index].generation]["version"] == self.version

    def teardown(self):
        """Without further faults the run goes on: some batches of pairs are trained."""
        goal = self.step + 2
        for _ in range(400):
            if self.step >= goal:
                return
            self.fill()
            for key, process in list(self.processes.items()):
                if process["doing"]:
                    self.finish_one(key)
            for ticket, command in list(self.to_judge.items()):
                del self.to_judge[ticket]
                self.tell(partial(rollout.judged, ticket=ticket, score=passed(hps=float(command.candidate.attempt))))
            self.tick()
            self.the_trainer_steps()
            self.every_prompt_is_in_exactly_one_place()
        raise AssertionError("the run stands still although nothing is broken any more")


class StrictlyOnPolicy(Faults):
    lookahead = 0
    publish_every = 1
    max_age = 0


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestStrictlyOnPolicy = StrictlyOnPolicy.TestCase
TestStrictlyOnPolicy.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
