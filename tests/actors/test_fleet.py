"""What the fleet sends to its samplers: batches of one bucket, each picture at its own place. Samplers are real actors."""

import time
from types import SimpleNamespace

import jobs  # isort: skip  (first: it makes settings that Ray reads when it is imported)  # noqa: F401
import pytest
import ray

from actors.fleet import Fleet, SampleWork
from actors.publication import Publication
from actors.sampler import SampleRequest
from rlhf.errors import NotFinite, Refused
from rlhf.tables import OnlineSamplersConfig
from rlhf.types import Geometry, Prompt

DEADLINE_S = 240.0


class Echo:
    """A sampler that holds anything and whose pictures are the requests."""

    def load(self, version, manifests, *arrays):
        return version, ()

    def sample(self, requests):
        return [0, *(part for request in requests for part in (request, len(requests)))]


class Refuses(Echo):
    """One whose weights give no picture."""

    def sample(self, requests):
        raise NotFinite("the denoiser gives NaN", [0])


@pytest.fixture
def start(cluster):
    """`start(class)`: a fleet of one sampler that has loaded."""
    made = []

    def start(sampler, max_restarts=0):
        waiting = {}
        actor = ray.remote(sampler).options(num_cpus=0.1)
        table = OnlineSamplersConfig(count=1, max_restarts=max_restarts, timeout_s=DEADLINE_S)
        made.append(Fleet(lambda index: actor.remote(), table, waiting))
        made[-1].load(Publication(version=0, buffers=()))
        return SimpleNamespace(fleet=made[-1], waiting=waiting)

    yield start
    for fleet in made:
        fleet.close()


def run(world, queue, until):
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline, "the fleet does not answer"
        world.fleet.dispatch(queue)
        ready, _ = ray.wait(list(world.waiting), timeout=1.0)
        for reference in ready:
            world.waiting.pop(reference)(reference)


def work(ticket, slot, bucket, sent):
    prompt = Prompt(key=str(ticket), instruction="", geometry=Geometry(height=16, width=16))
    return SampleWork(
        ticket=ticket,
        bucket=bucket,
        request=SampleRequest(prompt=prompt, noise_seed=ticket, slot=slot),
        done=lambda version, media, count: sent.append((ray.get(media).noise_seed, ray.get(count))),
        lost=lambda reason: pytest.fail(reason),
    )


def test_a_batch_takes_the_first_waiter_of_every_slot_of_one_bucket(start):
    sent, fleet = [], start(Echo)
    places = [("a", 0), ("a", 1), ("b", 2), ("a", 0), ("b", 2), ("a", 3)]
    queue = [work(ticket, slot, bucket, sent) for ticket, (bucket, slot) in enumerate(places)]
    run(fleet, queue, lambda: len(sent) == len(places))
    assert sent == [(0, 3), (1, 3), (5, 3), (2, 1), (3, 1), (4, 1)] and not queue


def test_what_a_sampler_refuses_ends_the_run_and_is_not_tried_again(start):
    """A new process with the same weights would meet the same."""
    sent, fleet = [], start(Refuses, max_restarts=3)
    with pytest.raises(NotFinite, match="the denoiser gives NaN") as caught:
        run(fleet, [work(0, 0, "a", sent)], lambda: sent)
    assert isinstance(caught.value, Refused) and str(caught.value.cause) == "the denoiser gives NaN"
