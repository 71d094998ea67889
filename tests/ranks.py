"""Real rank processes for tests: started once, joined over gloo, then handed functions to run together.

Starting a process and importing diffusers takes ten seconds, so a session pays for it once per world size.
"""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist


def _serve(rank: int, world: int, store_file: str, connection) -> None:
    from rlhf.shards import distributed

    torch.set_num_threads(1)
    mesh = distributed.start(
        rank=rank, world=world, store=dist.FileStore(store_file, world), device="cpu", timeout_s=120
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

    def __init__(self, world: int, folder):
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, str(folder / f"store{world}"), there), daemon=True
            )
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable, *arguments: Any, timeout: float = 300) -> list[Any]:
        job = cloudpickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(job)
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(timeout):
                self.stop()
                raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
            ok, value = cloudpickle.loads(connection.recv_bytes())
            results.append((ok, value))
        for rank, (ok, value) in enumerate(results):
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        return [value for _, value in results]

    def stop(self) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    connection.send_bytes(b"stop")
                process.join(5)
            if process.is_alive():
                process.terminate()
                process.join(5)
