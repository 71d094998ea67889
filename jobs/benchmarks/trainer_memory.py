"""How much memory a trainer rank takes to load, refresh, publish, save and export, as multiples of the model in fp32.

    python -m jobs.benchmarks.trainer_memory --gib 1.1 --ranks 2

Each operation's figure is the peak of the rank's resident memory (sampled every 5 ms) above what it was before. What a
rank must hold is its shard: 1/ranks of the model in fp32 after a load, and half of that again for the bf16 reference.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

from rlhf.diffusion.objectives import SFT
from rlhf.models import FAMILIES
from rlhf.models.tiny import transformer_config
from rlhf.models.trainable import Full, Trainable
from rlhf.shards import buffers, distributed
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainerConfig
from rlhf.types import REFERENCE

GIB = 2**30
_SCHEDULER = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def measured(operation: Callable[[], object]) -> tuple[int, int]:
    """(peak, lasting) growth of this process's resident memory in bytes while `operation` runs."""
    process = psutil.Process()

    def resident() -> int:
        return process.memory_info().rss

    before = peak = resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    operation()
    over.set()
    watcher.join()
    after = resident()
    return max(peak, after) - before, after - before


def write_model(folder: Path, gib: float) -> int:
    """A random Flux transformer folder of about `gib` GiB in fp32, saved as bf16; returns its parameter count."""
    for heads in range(2, 64):
        shape = {"layers": 4, "single_layers": 8, "heads": heads, "head_dim": 64}
        with torch.device("meta"):
            count = sum(p.numel() for p in FluxTransformer2DModel(**transformer_config(**shape)).parameters())
        if 4 * count >= gib * GIB:
            break
    write_shapes(folder, **shape)
    torch.set_default_dtype(torch.bfloat16)
    FluxTransformer2DModel(**transformer_config(**shape)).save_pretrained(folder / "transformer")
    torch.set_default_dtype(torch.float32)
    return count


def write_shapes(folder: Path, **shape: int) -> None:
    """The JSON files of a Kontext folder with such a transformer."""
    config = transformer_config(**shape)
    vae = {"latent_channels": config["in_channels"] // 4, "block_out_channels": [8] * 4}
    files = {
        "transformer/config.json": {"_class_name": "FluxTransformer2DModel", **config},
        "vae/config.json": vae,
        "tokenizer_2/tokenizer_config.json": {"model_max_length": 64},
        "scheduler/scheduler_config.json": _SCHEDULER,
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))


def rank_figures(rank: int, ranks: int, folder: str) -> dict[str, tuple[int, int]]:
    """Run every operation on one rank: {operation: (peak, lasting) bytes}."""
    store = dist.FileStore(f"{folder}/store", ranks)
    mesh = distributed.start(rank=rank, world=ranks, store=store, device="cpu", timeout_s=600)
    family, full = FAMILIES["flux_kontext"](path=Path(folder)), Trainable(parts=(Full(),))
    made = []

    def load() -> None:
        made.append(Trainer(family=family, config=TrainerConfig(), trainable=full, objective=SFT(), mesh=mesh, seed=0))

    def publish() -> None:  # one buffer at a time, as the object store takes them
        for buffer, _ in buffers.pack(made[0].shards(), capacity=64 * 2**20):
            del buffer

    figures = {"load": measured(load)}
    (trainer,) = made
    figures["make reference"] = measured(lambda: trainer.keep(REFERENCE))
    figures["refresh"] = measured(lambda: trainer.refresh(REFERENCE))
    figures["publish"] = measured(publish)
    figures["save"] = measured(lambda: trainer.save(Path(folder) / "state"))
    figures["export"] = measured(lambda: trainer.export(Path(folder) / "export"))
    distributed.stop()
    return figures


def figures(gib: float, ranks: int) -> dict[str, tuple[float, float]]:
    """Largest (peak, lasting) growth over the ranks of each operation, in multiples of the model's fp32 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        size = 4 * write_model(Path(folder), gib)
        with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
            everyone = list(pool.map(rank_figures, range(ranks), repeat(ranks), repeat(folder), timeout=600))
    largest = {name: np.max([one[name] for one in everyone], axis=0) / size for name in everyone[0]}
    return {name: (float(peak), float(lasting)) for name, (peak, lasting) in largest.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.1, help="size of the model in fp32")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    print(f"{'operation':<16}{'peak':>8}{'lasting':>10}   × the model in fp32, {arguments.ranks} ranks")
    for name, (peak, lasting) in figures(arguments.gib, arguments.ranks).items():
        print(f"{name:<16}{peak:>8.2f}{lasting:>10.2f}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
