"""Real rank processes for tests: started once, joined over gloo, then handed functions to run together.

Starting a process and importing diffusers takes ten seconds, so a session pays for it once per world size, and once more after
each failure: ranks of which one failed are out of step, and every later test would fail for the first one's reason.
"""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

ANSWER_S = 400
"""A job's longest time: far more than any takes, less than a test may take. Of a collective too: a slow machine is no fault."""


def _serve(rank: int, world: int, store_file: str, connection) -> None:
    from rlhf.shards import distributed

    torch.set_num_threads(1)
    mesh = distributed.start(
        rank=rank, world=world, store=dist.FileStore(store_file, world), device="cpu", timeout_s=ANSWER_S
    )
    while (job := connection.recv_bytes()) != b"stop":
        try:
            function, arguments = cloudpickle.loads(job)
            connection.send_bytes(cloudpickle.dumps((True, function(mesh, *arguments))))
        except BaseException:
            connection.send_bytes(cloudpickle.dumps((False, traceback.format_exc())))
    distributed.stop()


class Ranks:
    """`world` processes in one process group. `run(f, *args)` calls f(mesh, *args) on each and returns the results."""

    def __init__(self, world: int, folder: Path):
        self._world, self._folder, self._groups = world, folder, 0
        self._connections, self._processes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._groups += 1
        for rank in range(self._world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._world, str(self._folder / f"store{self._groups}"), there), daemon=True
            )
            process.start()
            there.close()  # so that the end of a process is the end of its pipe
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable, *arguments: Any) -> list[Any]:
        """Raises AssertionError with the traceback of the first rank that failed, ended or did not answer."""
        if not self._processes:
            self._start()
        try:
            job = cloudpickle.dumps((function, arguments))
            for connection in self._connections:
                connection.send_bytes(job)
            return self._results()
        except BaseException:
            self.stop()
            raise

    def _results(self) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + ANSWER_S
        while waiting := [c for rank, c in enumerate(self._connections) if rank not in results]:
            ready = wait(waiting, deadline - time.monotonic())
            assert ready, f"{len(waiting)} of {self._world} ranks did not answer in {ANSWER_S} s"
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    ok, results[rank] = cloudpickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, results[rank] = False, f"its process ended with exit code {self._ended(rank)}"
                assert ok, f"rank {rank} failed:\n{results[rank]}"
        return [results[rank] for rank in range(self._world)]

    def _ended(self, rank: int) -> int | None:
        self._processes[rank].join(5)
        return self._processes[rank].exitcode

    def stop(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"stop")
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._connections, self._processes = [], []
