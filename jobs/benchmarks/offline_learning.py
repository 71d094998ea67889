"""Does offline DPO learn, and not only run? A small Stable Diffusion is made from photos and tuned to what people click on.

    python -m jobs.benchmarks.offline_learning --seeds 3 --out offline_learning [--pairs PARQUET]

Photos come under a warm and a cold light, and people click on the warm one. A VAE and then a UNet are fitted to all of them
(SFT), which gives a base whose samples look a little like photos. DPO then trains on pairs. The measure is the implicit
accuracy on held-out pairs; the null is not 0.5 ± the spread over pairs, but whole runs on shuffled labels. Everything is
the product's own: index, loop, trainer, objectives, family, sampling; without Ray, in one process.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.distributed.device_mesh import DeviceMesh

from actors.checks import check_pairs, in_threads
from actors.sources import OfflineSource
from jobs.benchmarks.curves import Curve, plot
from jobs.benchmarks.one_process import OneRank, train_in
from jobs.cli import resolved_toml
from jobs.demo.photos import photo, relight
from jobs.recipes.evaluate import EvaluateRecipe
from rlhf.data.batches import EncodedExample, HandedEncodings, batch_of
from rlhf.data.encoding import encode_all
from rlhf.data.examples import PairIndex
from rlhf.data.media import encode_png
from rlhf.data.sources import open_source
from rlhf.data.stream import Visit
from rlhf.data.work import IndexedExamples
from rlhf.diffusion.objectives import DPO, SFT, Objective
from rlhf.loops.train import Duty
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.models.trainable import Full, Trainable
from rlhf.runs.folder import RunFolder
from rlhf.shards import distributed
from rlhf.tables import SizedModelTable, TrainerConfig
from rlhf.training.trainer import Trainer
from rlhf.types import CENTRE, Batch, Geometry

Labels = Literal["true", "shuffled"]
SIDE, BATCH, HELD_OUT, DRAWS = 32, 16, 64, 4
BETA, LEARNING_RATE = 1000.0, 1e-3
GEOMETRY = Geometry(height=SIDE, width=SIDE)

SCENES = ("fruit", "soup", "boxes")
COLOURS = {
    "red": (0.8, 0.2, 0.2),
    "green": (0.3, 0.7, 0.3),
    "blue": (0.2, 0.3, 0.8),
    "yellow": (0.85, 0.75, 0.2),
    "purple": (0.6, 0.2, 0.7),
    "white": (0.9, 0.9, 0.88),
    "brown": (0.5, 0.33, 0.2),
    "orange": (0.9, 0.5, 0.15),
}


def warmth(images: Sequence[np.ndarray], prompts: object = None, items: object = None) -> list[float]:
    """Mean red − mean blue of uint8 (H, W, 3) pictures, −1 … 1: what the better light has more of. Also a judge."""
    means = [image.reshape(-1, 3).mean(axis=0) / 255 for image in images]
    return [float(mean[0] - mean[2]) for mean in means]


def generated_pairs(folder: Path, count: int, seed: int = 0) -> PairIndex:
    """Photos under two lights, the warmer one preferred: that is what the demo's simulated clicks go to."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        colour, scene = list(COLOURS)[index % len(COLOURS)], SCENES[index // len(COLOURS) % len(SCENES)]
        picture = photo(scene, COLOURS[colour], SIDE, SIDE, random) / 255
        warm, cold = (
            (relight(picture, light * random.uniform(0.3, 0.6), 1.0 + random.uniform(-0.1, 0.1)) * 255).astype(np.uint8)
            for light in (1, -1)
        )
        caption = f"a photo of {colour} {scene}"
        rows.append({"jpg_0": encode_png(warm), "jpg_1": encode_png(cold), "label_0": 1.0, "caption": caption})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return read_pairs(folder / "pairs.parquet", folder)


def read_pairs(path: Path, folder: Path, split: str = "train") -> PairIndex:
    """The checked pairs of a file or folder in Pick-a-Pic's columns; `folder` keeps their index. Raises: BadInput."""
    return check_pairs(
        path,
        split,
        key="--pairs",
        cache=folder,
        on_bad_row="stop",
        needs_source=False,
        needs_loser=True,
        items=None,
        check_all=partial(in_threads, print),
    ).index


def pictures_of(pairs: PairIndex) -> np.ndarray:
    """uint8 (2 · pairs, H, W, 3): all winners, then all losers."""
    shown = [pair.pictures(pairs.blocks[pair.block]) for pair in pairs.preferences(len(pairs))]
    return np.concatenate([open_source(of[role], GEOMETRY) for role in ("winner", "loser") for of in shown])


def encode(family: Family, pairs: PairIndex) -> list[EncodedExample]:
    """Every pair with its winner and loser."""
    indexed = IndexedExamples(family, pairs, GEOMETRY, ("winner", "loser"))
    visits = [Visit(row=row, mirrored=False, blank=False, crop=CENTRE) for row in range(len(pairs))]
    wanted = [encoding for visit in visits for encoding in indexed.encodings(visit)]
    rows = encode_all(family.load_codec("cpu"), wanted, BATCH)
    encodings = HandedEncodings({encoding: row.tensors for encoding, row in rows.items()})
    return [indexed.encoded(visit, encodings) for visit in visits]


def shuffled(pairs: Sequence[EncodedExample], seed: int) -> list[EncodedExample]:
    """Winner and loser exchanged in half of the pairs, at random."""
    swap = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return [
        replace(pair, x0={"winner": pair.x0["loser"], "loser": pair.x0["winner"]}) if swapped else pair
        for pair, swapped in zip(pairs, swap, strict=True)
    ]


def model_of(folder: Path) -> SizedModelTable:
    return SizedModelTable(family="stable_diffusion", path=str(folder), height=SIDE, width=SIDE)


def make_base(keep: Path, pairs: PairIndex, mesh: DeviceMesh, *, vae_steps: int, sft_steps: int) -> Path:
    """`keep`/base: a Stable Diffusion whose VAE reconstructs the pictures and whose UNet has learnt to draw them."""
    folder = write_stable_diffusion(keep / "base")
    fit_vae(folder / "vae", pictures_of(pairs), vae_steps)
    encoded = encode(load_family(model_of(folder)), pairs)
    alike = [replace(pair, x0={"target": pair.x0[role]}) for role in ("winner", "loser") for pair in encoded]
    run = RunFolder.claim(keep / "runs", "base", "", resume="never")
    work = InMemory(alike, (), seed=0, steps=sft_steps)
    final = train_in(
        run, sft_steps, OfflineSource(), new_trainer(folder, SFT(), work, mesh, seed=0, steps=sft_steps), []
    )
    shutil.rmtree(folder / "unet")
    shutil.copytree(final / "unet", folder / "unet")
    return folder


def fit_vae(folder: Path, pictures: np.ndarray, steps: int) -> None:
    """Fit the VAE in `folder` to uint8 (n, H, W, 3): a random decoder does not undo a random encoder.

    Its scaling_factor becomes 1 / the latents' deviation, as in real checkpoints (Rombach et al., arXiv 2112.10752, G.1).
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = pixels[torch.randint(len(pixels), (BATCH,), generator=random)]
        latents = vae.encode(batch).latent_dist.mode()
        loss = F.mse_loss(vae.decode(latents).sample, batch) + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        deviation = vae.encode(pixels[:256]).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    vae.save_pretrained(folder)


class InMemory:
    """`rlhf.data.work.Work` of encoded examples: BATCH at random for every update, and all held-out ones DRAWS times."""

    def __init__(
        self, training: Sequence[EncodedExample], held_out: Sequence[EncodedExample], *, seed: int, steps: int
    ):
        random = np.random.default_rng(seed)
        self._rows = [random.choice(len(training), BATCH, replace=False) for _ in range(steps)]
        self._training, self._held_out, self._seed = training, held_out, seed

    def open(self, family: Family) -> None:
        self._family = family

    def batches(self, step: int, rank: int, handed: None, values: Sequence[Any]) -> list[Batch]:
        examples = [self._training[row] for row in self._rows[step - 1]]
        return [batch_of(self._family, examples, seed=self._seed, step=step, first_index=0)]

    def held_out(self, rank: int) -> list[Batch]:
        draws = range(1, DRAWS + 1)
        return [batch_of(self._family, self._held_out, seed=0, step=-draw, first_index=0) for draw in draws]


def new_trainer(
    folder: Path, objective: Objective, work: InMemory, mesh: DeviceMesh, *, seed: int, steps: int
) -> OneRank:
    config = TrainerConfig(
        train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        max_train_steps=steps,
        gradient_checkpointing=False,
        weight_decay=0.0,
    )
    trainable, family = Trainable(parts=(Full(),)), load_family(model_of(folder))
    return OneRank(
        Trainer(family=family, config=config, trainable=trainable, objective=objective, mesh=mesh, seed=seed), work
    )


def learning_curve(
    keep: Path,
    train_on: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    mesh: DeviceMesh,
    seed: int,
    labels: Labels,
    steps: int,
    every: int,
) -> tuple[Curve, Path]:
    """(step, implicit accuracy on held-out pairs) of one run from `keep`/base, and the folder of its weights."""
    run = RunFolder.claim(keep / "runs", f"{labels}_{seed}", "", resume="never")
    pairs = shuffled(train_on, seed) if labels == "shuffled" else train_on
    work = InMemory(pairs, held_out, seed=seed, steps=steps)
    trainer = new_trainer(keep / "base", DPO(beta=BETA), work, mesh, seed=seed, steps=steps)
    curve: Curve = []

    def measure(step: int) -> None:
        curve.append((step, trainer.evaluate()["implicit_acc"]))

    return curve, train_in(run, steps, OfflineSource(), trainer, [Duty(every=every, do=measure, at_start=True)])


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long everything takes."""

    vae_steps: int = 300
    sft_steps: int = 300
    dpo_steps: int = 120
    every: int = 20
    seeds: int = 3


def all_curves(size: Size, pairs: PairIndex, keep: Path) -> dict[Labels, list[Curve]]:
    """Curves of runs with true and with shuffled labels from one base. `keep`/base and `keep`/tuned hold weights."""
    torch.set_num_threads(1)  # these matrices are too small to share
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=600)
    try:
        folder = make_base(keep, pairs, mesh, vae_steps=size.vae_steps, sft_steps=size.sft_steps)
        encoded = encode(load_family(model_of(folder)), pairs)
        train_on, held_out = encoded[:-HELD_OUT], encoded[-HELD_OUT:]
        curves: dict[Labels, list[Curve]] = {"true": [], "shuffled": []}
        for labels, runs in curves.items():
            for seed in range(size.seeds):
                curve, final = learning_curve(keep, train_on, held_out, mesh, seed, labels, size.dpo_steps, size.every)
                runs.append(curve)
                if labels == "true" and seed == 0:
                    shutil.copytree(final / "unet", keep / "tuned", dirs_exist_ok=True)
        return curves
    finally:
        distributed.stop()


def evaluation(keep: Path, pairs: PairIndex, seeds: int = 2) -> EvaluateRecipe:
    """The recipe that lets `jobs.evaluate` compare `keep`/base with `keep`/tuned by the warmth of their samples."""
    captions = sorted(set(pairs.table["caption"].to_pylist()))
    (keep / "prompts.txt").write_text("\n".join(captions) + "\n")
    judge = {"function": "jobs.benchmarks.offline_learning:warmth", "num_cpus": 0.1}
    return EvaluateRecipe.model_validate(
        {
            "out": str(keep / "evaluation"),
            "model": {
                "family": "stable_diffusion",
                "path": str(keep / "base"),
                "height": SIDE,
                "width": SIDE,
                "guidance_scale": 1.0,
            },
            "tuned": {"denoiser": str(keep / "tuned")},
            "data": {"path": str(keep / "prompts.txt")},
            "sampling": {"steps": 20, "seeds": seeds, "batch_size": 8},
            "reward": {"weights": {"warmth": 1.0}},
            "judges": {"python": {"warmth": judge}},
            "samplers": {"num_cpus": 0.3, "num_gpus": 0.0},
            "cluster": {"num_cpus": 2.0, "object_store_memory": 200_000_000},
        }
    )


def last(curves: dict[Labels, list[Curve]]) -> dict[Labels, list[float]]:
    """Held-out implicit accuracy at the end of every run."""
    return {labels: [curve[-1][1] for curve in runs] for labels, runs in curves.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Size.dpo_steps)
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--pairs", type=Path, help="Parquet in Pick-a-Pic's columns; default: 264 generated pairs")
    parser.add_argument("--out", type=Path, default=Path("offline_learning"), help="folder for models, plot and pages")
    arguments = parser.parse_args()
    keep = arguments.out.resolve()
    pairs = read_pairs(arguments.pairs, keep) if arguments.pairs else generated_pairs(keep / "data", 264)
    curves = all_curves(Size(dpo_steps=arguments.steps, seeds=arguments.seeds), pairs, keep)
    measure = "implicit accuracy on held-out pairs (0.5: none)"
    plot(curves, keep / "curves.png", legend="labels", measure=measure, title="Offline DPO, small Stable Diffusion")
    for labels, values in last(curves).items():
        print(f"{labels:>9}: " + "  ".join(f"{value:.3f}" for value in values))
    (keep / "evaluate.toml").write_text(resolved_toml(evaluation(keep, pairs)))
    print(
        f"curves: {keep / 'curves.png'}; base against tuned: python -m jobs.evaluate --config {keep / 'evaluate.toml'}"
    )


if __name__ == "__main__":
    main()
