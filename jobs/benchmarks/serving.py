"""What Serve costs a judge: one model called directly with full batches, by 64 callers through its handle, and by HTTP.

    python -m jobs.benchmarks.serving --seconds 10 --repeats 3 --out serving.json

The model is a random HPSv2 checkpoint whose full batch takes about a second on one CPU core. `direct` calls it in an
actor that has the CPUs, and so the torch threads, of the judge's replica: full batches from memory, nothing else. The
callers each ask again as soon as they have an answer; the handle's pass references to pictures in the object store, as a
run does, HTTP's send PNG in base64. Direct, handle and HTTP take turns, and a ratio is taken between neighbours in time:
absolute figures belong to one machine at one hour.

Serving takes more processes than one, so other load on the machine costs it more than it costs `direct`. The second ratio
leaves out, on both sides, the seconds in which the model's thread was ready to run and another thread had its core.

Left out: GPUs, several replicas, and requests that come at their own pace (tests/serve_apps/test_load.py).
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import open_clip
import ray
import torch
from ray import serve
from ray.serve.context import _get_global_client

from jobs.launch import cluster
from rlhf.data.media import encode_base64
from rlhf.rewards import load_reward
from rlhf.rewards.config import JudgeConfig, JudgesConfig, ServeConfig
from rlhf.rewards.connections import connection
from rlhf.section import ClusterConfig
from serve_apps import deploy

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 320, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PICTURES, SIDE, PROMPTS = 32, 512, 8
FULL = 64
"""Callers at whose number throughput is compared: four full batches."""


class Direct:
    """The model alone, as its replica has it."""

    def __init__(self, judge: JudgeConfig) -> None:
        self._reward = load_reward("hps", judge, "cpu")
        self._rows = judge.max_batch_size

    def about(self) -> tuple[int, int]:
        """(process id, torch threads)."""
        return os.getpid(), torch.get_num_threads()

    def batches(self, pictures: list[Any], prompts: list[str], seconds: float) -> int:
        """Score full batches for so long; how many pictures that were. pictures: references."""
        loaded = ray.get(pictures)
        media = [loaded[index % len(loaded)][None] for index in range(self._rows)]
        texts = [prompts[index % len(prompts)] for index in range(self._rows)]
        end, scored = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            self._reward.score(media, texts, [()] * self._rows, [{}] * self._rows)
            scored += self._rows
        return scored


class Clock:
    """Seconds since it was made: all of them, and those in which the process's busiest thread had a core or slept."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._threads = self._read()
        self._started = time.monotonic()

    def read(self) -> tuple[float, float]:
        seconds = time.monotonic() - self._started
        worked = [tuple(now - self._threads[name]) for name, now in self._read().items() if name in self._threads]
        return seconds, seconds - float(max(worked, default=(0.0, 0.0))[1])

    def _read(self) -> dict[str, np.ndarray]:
        """Thread → (seconds on a core, seconds in the queue for one); empty where the system does not tell."""
        files = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        return {file.parent.name: np.array(file.read_text().split()[:2], float) / 1e9 for file in files}


async def load(ask: Callable[[int], Awaitable[object]], callers: int, seconds: float) -> list[float]:
    """The seconds of each answer to `callers` who each call `ask(number)` again and again for so long."""
    latencies: list[float] = []
    started = time.monotonic()

    async def call(number: int) -> None:
        while time.monotonic() - started < seconds:
            asked = time.monotonic()
            await ask(number)
            latencies.append(time.monotonic() - asked)
            number += callers

    await asyncio.gather(*[call(number) for number in range(callers)])
    return latencies


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds, by nearest rank."""
    found = 1000 * np.percentile(latencies, (50, 95, 99), method="inverted_cdf")
    return dict(zip(("p50", "p95", "p99"), found.tolist(), strict=True))


def measure(
    section: ServeConfig, *, seconds: float, repeats: int, callers: Sequence[int], num_cpus: float = 1.0
) -> dict[str, Any]:
    """Deploy the model on the connected cluster and take the figures; the judge is gone afterwards.

    seconds: of each measurement; callers: how many at once, one of them `FULL`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hps.pt"
        torch.manual_seed(0)
        torch.save({"state_dict": open_clip.CLIP(**CLIP_CONFIG).state_dict()}, path)
        path.with_suffix(".json").write_text(json.dumps(CLIP_CONFIG))
        table = {"path": str(path), "num_cpus": num_cpus, "max_ongoing_requests": 2 * FULL}
        judges = JudgesConfig.model_validate({"hps": table})
        direct = ray.remote(Direct).options(num_cpus=num_cpus).remote(judges.hps)
        try:
            deployed = deploy.deploy(judges, section, ["hps"], "benchmark")
            return asyncio.run(_turns(direct, deployed, deploy.serve_token(section), seconds, repeats, callers))
        finally:
            deploy.undeploy("benchmark", ["hps"])
            ray.kill(direct)


async def _turns(
    direct: Any, deployed: deploy.Deployed, token: str | None, seconds: float, repeats: int, callers: Sequence[int]
) -> dict[str, Any]:
    small = np.random.default_rng(0).integers(0, 256, (PICTURES, SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    pictures = list(small.repeat(8, axis=1).repeat(8, axis=2))
    prompts = [f"a picture of dish number {index}" for index in range(PROMPTS)]
    references = [ray.put(picture) for picture in pictures]
    bodies = [
        json.dumps({"image_base64": encode_base64(picture), "prompt": prompts[index % PROMPTS]}).encode()
        for index, picture in enumerate(pictures)
    ]
    handle = serve.get_app_handle(deployed.apps["hps"])
    app = _get_global_client().get_serve_details()["applications"][deployed.apps["hps"]]
    (deployment,) = app["deployments"].values()
    (replica,) = deployment["replicas"]
    limits = httpx.Limits(max_connections=max(callers), max_keepalive_connections=max(callers))
    url = f"{deployed.url}{deploy.route('hps')}/score"
    direct_pid, threads = await direct.about.remote()

    async def alone() -> np.ndarray:
        """Pictures a second: as the clock says, and without the seconds in the queue for a core."""
        clock = Clock(direct_pid)
        return await direct.batches.remote(references, prompts, seconds) / np.array(clock.read())

    keys = connection(url, token, 300)
    keys["headers"] |= {"Content-Type": "application/json"}
    async with httpx.AsyncClient(limits=limits, **keys) as client:

        async def by_handle(number: int) -> None:
            await handle.score.remote(references[number % PICTURES], prompts[number % PROMPTS])

        async def by_http(number: int) -> None:
            (await client.post(url, content=bodies[number % PICTURES])).raise_for_status()

        ways = {"handle": by_handle, "http": by_http}
        for ask in ways.values():
            await load(ask, FULL, min(1.0, seconds))  # connections, the object store's pages, prompts encoded
        runs: list[dict[str, Any]] = [{way: {} for way in ways} for _ in range(repeats)]
        for run, (way, ask) in product(runs, ways.items()):
            before, measured = await alone(), run[way]
            for count in callers:
                clock = Clock(replica["pid"])
                latencies = await load(ask, count, seconds)
                rates = len(latencies) / np.array(clock.read())
                measured[f"{count} callers"] = {"rate": float(rates[0])} | percentiles(latencies)
                if count == FULL:
                    near = (before + await alone()) / 2
                    measured["direct"] = float(near[0])
                    measured["ratio"], measured["ratio_undisturbed"] = (rates / near).tolist()
    return {"torch_threads": threads, "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "runs": runs}


def table(figures: dict[str, Any]) -> str:
    """The medians over the repeats, a line for each way and number of callers; then the ratios, repeat by repeat."""
    runs, ratios = figures["runs"], list[str]()
    lines = [f"{'':<8}{'callers':>9}{'a second':>10}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}"]
    for way in runs[0]:
        each = {key: [run[way][key] for run in runs] for key in runs[0][way]}
        lines.append(f"{'direct':<8}{'':>9}{statistics.median(each['direct']):>10.1f}")
        for callers in (key for key in each if key.endswith("callers")):
            found = each[callers]
            rate, *rest = (statistics.median(one[key] for one in found) for key in ("rate", "p50", "p95", "p99"))
            lines.append(f"{way:<8}{callers.split()[0]:>9}{rate:>10.1f}" + "".join(f"{x:>9.0f}" for x in rest))
        for ratio, name in (("ratio", "direct"), ("ratio_undisturbed", "direct, without waits for a core")):
            repeats = ", ".join(f"{value:.2f}" for value in each[ratio])
            ratios.append(f"{way} with {FULL} callers: {statistics.median(each[ratio]):.2f} × {name} ({repeats})")
    last = "{torch_threads} torch threads, {cores} cores, load average {load_average:.1f}".format(**figures)
    return "\n".join([*lines, *ratios, last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, FULL])
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    arguments = parser.parse_args()
    if FULL not in arguments.callers:
        parser.error(f"--callers must have {FULL} among them: throughput is compared there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with cluster(ClusterConfig(num_cpus=4), "benchmark"):
        figures = measure(
            ServeConfig(port=port), seconds=arguments.seconds, repeats=arguments.repeats, callers=arguments.callers
        )
    print(table(figures))
    arguments.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
