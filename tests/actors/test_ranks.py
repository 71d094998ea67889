"""Ranks on a real cluster: one answer each, and one failure ends them all within its deadline."""

import os
import signal

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group

from actors.ranks import Rank, RankGroup, RankLost
from rlhf.shards import distributed
from rlhf.training_tables import TrainerConfig
from tests.processes import assert_gone

pytestmark = pytest.mark.slow
TABLE = TrainerConfig(ranks=2, num_cpus=0.2, num_gpus=0.0, timeout_s=60)


class Lost(RankLost):
    pass


class Adder(Rank):
    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    def join(self, host, port):
        store = self.rendezvous(host, port)
        distributed.start(rank=self.rank, world=self.world, store=store, device="cpu", timeout_s=60)

    def add(self, value):
        total = torch.tensor(float(value))
        dist.all_reduce(total)
        return self.rank, total.item(), os.getpid()

    def fail(self, rank):
        if self.rank == rank:
            raise ValueError(f"rank {rank} cannot")
        dist.barrier()  # the others wait in a collective

    def hang(self, rank):
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture(scope="module")
def placement(cluster):
    group = placement_group([{"CPU": 0.2}] * 2)
    assert group.wait(60)
    yield group
    ray.util.remove_placement_group(group)


@pytest.fixture
def start(placement):
    groups = []

    def start(**options):
        groups.append(RankGroup(Adder, TABLE, placement, 2, **options))
        return groups[-1], [pid for _, _, pid in groups[-1].all("add", 0)]

    yield start
    for group in groups:
        group.kill()


def test_every_rank_answers_in_order_and_a_raised_error_ends_all(start):
    calls = []
    group, pids = start(meanwhile=lambda: calls.append(1))
    assert [answer[:2] for answer in group.all("add", each=[10, 11])] == [(0, 21.0), (1, 21.0)]
    assert calls
    with pytest.raises(ValueError, match="rank 1 cannot"):
        group.all("fail", 1)
    assert_gone(pids, within_s=30)


def test_a_killed_rank_is_lost_and_ends_all(start):
    group, pids = start(lost=Lost)
    psutil.Process(pids[1]).kill()
    with pytest.raises(Lost, match="add"):
        group.all("add", 1)
    assert_gone(pids, within_s=30)


def test_a_stopped_rank_is_lost_at_the_deadline_of_the_call(start):
    group, pids = start()
    with pytest.raises(RankLost, match="hang: rank 0 gave no answer in 3 s"):
        group.all("hang", 0, timeout_s=3)
    assert_gone(pids, within_s=30)


def test_a_rank_that_cannot_start_is_told_by_name(placement):
    class Broken(Adder):
        def __init__(self, rank, world):
            raise OSError("no such device")

    with pytest.raises(RankLost, match="thing 0 did not start"):
        RankGroup(Broken, TABLE, placement, 2, name="thing")
