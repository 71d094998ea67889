"""What caching latents and conditions saves: one SFT with `data.latents = "cached"` and with "on_the_fly", in turn.

    python -m jobs.benchmarks.cached_training --steps 60 --repeats 2 --out cached_training

The recipe is sft_demo.toml on the twenty pairs of the miniature world, with Ray, one rank and one encoder, for each family: on
the fly, every visit is encoded while the rank trains. Told are the median time of an update, the time before the first one, and
the largest memory of Ray's busy workers while training (what no other process shares, `uss` of psutil). The ratios are of one run
on one machine: a real VAE and text encoder weigh far more against the network than the miniature's.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import psutil

from jobs import train
from jobs.cli import parse, run_main
from jobs.demo.__main__ import lay_out
from jobs.one_process import refuse_small
from jobs.recipes import TrainRecipe
from jobs.world.edits import EDIT_MODELS
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import made

RECIPE = Path(__file__).parents[1] / "configs" / "sft_demo.toml"
WARMUP, EVERY_S = 10, 0.25
"""Updates that are not timed; seconds between two looks at the workers."""
Latents = Literal["cached", "on_the_fly"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run."""

    update_s: float
    before_s: float
    memory_mib: float


class Workers:
    """The memory of Ray's workers below this process that are not idle, looked at from a thread."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        """(time.time(), MiB of all)."""
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(timeout=10)

    def _look(self) -> None:
        while not self._ended.wait(EVERY_S):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    name = "".join(process.cmdline()[:1])
                    if name.startswith("ray::") and name != "ray::IDLE":
                        total += process.memory_full_info().uss
                except psutil.Error:  # it ended between two looks
                    continue
            self.seen.append((time.time(), total / 2**20))


def measured(family: str, latents: Latents, world: Path, folder: Path, steps: int) -> Cost:
    """One run with a cache of its own."""
    changes = {
        "model.family": family,
        "model.path": world / EDIT_MODELS[family].folder,
        "data.path": world / "edits",
        "data.cache": folder / "cache",
        "data.latents": latents,
        "run.dir": folder / "runs",
        "trainer.max_train_steps": steps,
    }
    recipe = parse(
        TrainRecipe, ["--config", str(RECIPE), *(f"--{key}={value}" for key, value in changes.items())]
    ).config
    workers, started = Workers(), time.time()
    with workers.watched():
        run = train.run(recipe)
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [row["time/step"] for row in rows if "time/step" in row]
    ended = metrics.stat().st_mtime
    began = ended - sum(seconds)
    return Cost(
        update_s=statistics.median(seconds[WARMUP:]),
        before_s=began - started,
        memory_mib=max(memory for seen, memory in workers.seen if began <= seen <= ended),
    )


def told(family: str, costs: Mapping[Latents, Sequence[Cost]]) -> Iterator[str]:
    """A line a run, and the ratios of the fastest."""
    for way, found in costs.items():
        for cost in found:
            figures = f"{cost.update_s:.3f} s an update, {cost.before_s:.0f} s before, {cost.memory_mib:.0f} MiB"
            yield f"{family}, {way:>10}: {figures}"
    cached, fly = (min(costs[way], key=lambda cost: cost.update_s) for way in get_args(Latents))
    ratio = (
        f"{fly.update_s / cached.update_s:.2f} of the time and {fly.memory_mib / cached.memory_mib:.2f} of the memory"
    )
    yield f"{family}: on the fly an update takes {ratio} of a cached one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("cached_training"), help="folder for the figures")
    arguments = parser.parse_args()
    refuse_small("--steps", arguments.steps, WARMUP + 10)
    refuse_small("--repeats", arguments.repeats, 1)
    out = made(arguments.out.resolve(), "--out")
    figures = {}
    with tempfile.TemporaryDirectory(dir=out) as work:
        lay_out(Path(work) / "world")
        for family in EDIT_MODELS:
            costs: dict[Latents, list[Cost]] = {way: [] for way in get_args(Latents)}
            for repeat, (way, found) in product(range(arguments.repeats), costs.items()):
                folder = Path(work) / f"{family}_{way}_{repeat}"
                found.append(measured(family, way, Path(work) / "world", folder, arguments.steps))
            print("\n".join(told(family, costs)))
            figures[family] = {way: [vars(cost) for cost in found] for way, found in costs.items()}
    write_durably(out / "cached_training.json", json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_main(main)
