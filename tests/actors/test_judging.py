"""The driver's side of judging with real actors: every medium gets one answer, whatever becomes of who is asked."""

import contextlib
import signal
import time

import numpy as np
import psutil
import pytest
import ray

from actors.judges import Answer
from actors.judging import (
    READS_AT_ONCE,
    JudgesDied,
    Judging,
    JudgingFailed,
    Read,
    handle_ready,
    judge_all,
)
from rlhf.rewards.config import JudgesConfig
from rlhf.types import Geometry, Prompt
from tests.judge_server import warmth
from tests.processes import ray_processes

PROMPT = Prompt(key="0", instruction="warm", geometry=Geometry(height=8, width=8))


def pictures(count):
    return list(np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))


@contextlib.contextmanager
def asking(judge_server, timeout_s):
    url = f"{judge_server()}/hpsv2"
    judges = JudgesConfig.model_validate({"hps": {"url": url}, "retries": 0, "timeout_s": timeout_s})
    made = Judging(judges, ["hps"], {}, max_restarts=1)
    yield made
    made.close()


@pytest.fixture
def judging(cluster, judge_server):
    with asking(judge_server, timeout_s=60.0) as made:
        yield made


@pytest.fixture
def impatient(cluster, judge_server):
    """One whose judge has a second to answer, so that silence is told after less than five."""
    with asking(judge_server, timeout_s=1.0) as made:
        yield made


def wait_for(judging, became, count):
    deadline = time.monotonic() + 120
    while len(became) < count:
        assert time.monotonic() < deadline
        handle_ready(judging.waiting, 1.0)
        judging.watch()
    return became


def ask(judging, shown):
    """Ask about pictures; what became of each comes into the list that is returned."""
    became = []
    for picture in shown:
        judging.ask(ray.put(picture), PROMPT, became.append)
    return became


def reads(shown, each, started=None):
    def start(part):
        if started is not None:
            started.append(part)
        return [ray.put([warmth(picture) for picture in part]), *map(ray.put, part)]

    for place in range(0, len(shown), each):
        part = shown[place : place + each]
        yield Read(key=place, start=lambda part=part: start(part), prompts=lambda about: [PROMPT] * len(about))


def test_every_medium_of_every_read_gets_its_own_answer_a_few_reads_at_a_time(judging):
    shown, started, done = pictures(20), [], 0
    for judged in judge_all(judging, reads(shown, 3, started)):
        expected = [warmth(picture) for picture in shown[judged.key : judged.key + 3]]
        assert [answer.rewards["hps"] for answer in judged.answers] == judged.about == expected
        done += 1
        assert len(started) - done < READS_AT_ONCE + 1
    assert done == 7 and judging.pending == 0 and not judging.waiting


def test_an_actor_that_died_is_replaced_and_its_media_are_asked_about_again(judging):
    shown, killed = pictures(24), []
    answers = {}
    for judged in judge_all(judging, reads(shown, 2)):
        if not killed:
            killed.append(judging._actor)
            ray.kill(killed[0])
        answers[judged.key] = [answer.rewards["hps"] for answer in judged.answers]
    assert answers == {i: [warmth(picture) for picture in shown[i : i + 2]] for i in range(0, 24, 2)}
    assert judging._actor is not killed[0]


def test_who_pumps_a_table_of_its_own_is_told_of_the_death(judging):
    ray.kill(judging._actor)
    became = wait_for(judging, ask(judging, pictures(3)), 3)
    assert {type(one) for one in became} == {JudgesDied} and all(one.reason for one in became)
    again = wait_for(judging, ask(judging, pictures(3)), 3)  # as they come
    assert sorted(one.rewards["hps"] for one in again) == sorted(warmth(picture) for picture in pictures(3))


def test_an_actor_that_is_stopped_is_replaced_and_one_restart_too_many_is_an_error(impatient):
    stopped = []

    def stop_a_running_actor():
        (answer,) = wait_for(impatient, ask(impatient, pictures(1)), 1)
        assert isinstance(answer, Answer)
        for process in ray_processes("Judges"):  # the last one may not be gone yet
            process.send_signal(signal.SIGSTOP)
            stopped.append(process)
        return ask(impatient, pictures(2))

    try:
        became = wait_for(impatient, stop_a_running_actor(), 2)
        assert {type(one) for one in became} == {JudgesDied}
        with pytest.raises(JudgingFailed, match=r"failed 2 times; the last: no answer to any of 2 media for \d s"):
            wait_for(impatient, stop_a_running_actor(), 2)
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_what_cannot_be_read_ends_it_with_the_reason_and_forgets_the_rest(judging):
    @ray.remote(num_cpus=0, max_retries=0)
    def broken():
        raise OSError("the disk is gone")

    def start():
        return list(broken.options(num_returns=2).remote())

    with pytest.raises(JudgingFailed, match="media cannot be read: the disk is gone"):
        list(judge_all(judging, [Read(key=0, start=start, prompts=lambda about: [PROMPT])]))
    assert not judging.waiting
