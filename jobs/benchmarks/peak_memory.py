"""The peak that a dry run tells for a trainer rank against what torch really allocates, on a CPU.

    python -m jobs.benchmarks.peak_memory --gib 1.1 --batch 2

A Flux transformer with random weights does two steps of DPO on one rank, while torch's profiler records every allocation. Beside
it stands the trace of the same recipe. The process takes more than torch allocates: libraries' own memory, and what the C
library keeps for the next allocation.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from jobs.benchmarks.trainer_memory import GIB, write_model
from rlhf.diffusion.objectives import DPO
from rlhf.models.flux_kontext import FluxKontext
from rlhf.models.trainable import Full, LoRA, Trainable
from rlhf.shards import distributed
from rlhf.training.memory import micro_batch, trainer_peak
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainerConfig
from rlhf.types import Geometry, Prompt, Source

SIZE = Geometry(height=128, width=128)
SOURCE = Source(path="", content="", height=SIZE.height, width=SIZE.width)
PROMPT = Prompt(key="", instruction="", sources=(SOURCE,), geometry=SIZE)


def _setup(folder: str, batch: int, how: str) -> tuple[FluxKontext, TrainerConfig, Trainable]:
    family = FluxKontext(path=Path(folder), dtype=torch.float32)
    config = TrainerConfig(ranks=1, train_batch_size=batch, gradient_accumulation_steps=1, ema_decay=0.9)
    lora = LoRA(rank=16, alpha=16.0, targets=FluxKontext.lora_targets)
    return family, config, Trainable(parts=(lora if how == "lora" else Full(),))


def allocated(folder: str, batch: int, how: str) -> int:
    """The most bytes that are allocated at once, from nothing to the end of the second step."""
    family, config, trainable = _setup(folder, batch, how)
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=600)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(family=family, config=config, trainable=trainable, objective=DPO(beta=1.0), mesh=mesh, seed=0)
        for _ in range(2):
            one = micro_batch(family, ("winner", "loser"), PROMPT, batch)
            trainer.step([replace(one, t=torch.full_like(one.t, 0.5))])
    distributed.stop()
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())))


def told(folder: str, batch: int, how: str) -> int:
    """Bytes that the trace gives."""
    family, config, trainable = _setup(folder, batch, how)
    return trainer_peak(family, config, trainable, DPO(beta=1.0), PROMPT).nbytes


def figures(gib: float, batch: int, how: str) -> tuple[int, int]:
    """(bytes told, bytes allocated), each found out in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), gib)
        answers = []
        for function in (told, allocated):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                answers.append(pool.submit(function, folder, batch, how).result(timeout=600))
    return answers[0], answers[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.1, help="size of the model in fp32")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    for how in ("full", "lora"):
        traced, real = figures(arguments.gib, arguments.batch, how)
        print(f"{how}: told {traced / GIB:.2f} GiB, allocated {real / GIB:.2f} GiB, ratio {traced / real:.2f}")


if __name__ == "__main__":
    main()
