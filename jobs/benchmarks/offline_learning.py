"""Does offline DPO learn, and not only run? A small Stable Diffusion is made from photos and tuned to what people click on.

    python -m jobs.benchmarks.offline_learning --seeds 3 --out offline_learning [--pairs PARQUET]

Photos come under a warm and a cold light, and people click on the warm one. A VAE and then a UNet are fitted to all of them
(SFT), which gives a base whose samples look a little like photos. DPO then trains on pairs. The measure is the implicit
accuracy on held-out pairs, beside that of runs on shuffled labels: the spread over pairs is too small to judge by. Everything is
the product's own: index, loop, trainer, objectives, family, sampling; without Ray, in one process.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.distributed.device_mesh import DeviceMesh

from actors.checks import check_pairs, in_threads
from jobs.cli import resolved_toml, run_main
from jobs.one_process import Curve, NothingHanded, OneRank, one_rank, plot, refuse_small, train_in, trainer_table
from jobs.recipes import EvaluateRecipe
from jobs.world.looks import render, to_uint8
from jobs.world.photos import SCENES, photo
from rlhf.data.batches import EncodedExample, batches_of
from rlhf.data.encoding import encode_all
from rlhf.data.examples import read_index
from rlhf.data.media import encode_png
from rlhf.data.sizes import Sizes
from rlhf.data.sources import open_source
from rlhf.data.stream import Visit
from rlhf.data.work import IndexedExamples
from rlhf.diffusion.objectives import DPO, SFT
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.runs.folder import RunFolder, made
from rlhf.tables import SizedModelTable
from rlhf.types import Batch, Geometry

Labels = Literal["true", "shuffled"]
SIDE, BATCH, HELD_OUT, DRAWS = 32, 16, 64, 4
BETA, LEARNING_RATE = 1000.0, 1e-3
GEOMETRY = Geometry(height=SIDE, width=SIDE)
SIZED = Sizes(sizes=(GEOMETRY,))

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


def generated_pairs(folder: Path, count: int, seed: int = 0) -> Path:
    """The index of photos under two lights, of which the warmer one is preferred."""
    random = np.random.default_rng(seed)
    kinds, rows = list(product(SCENES, COLOURS)), []
    for index in range(count):
        scene, colour = kinds[index % len(kinds)]
        picture = torch.from_numpy(photo(scene, COLOURS[colour], SIDE, SIDE, random)).expand(2, -1, -1, -1, -1)
        looks = [[random.uniform(-0.1, 0.1), light * random.uniform(0.3, 0.6), 1.0, 0.0, 0.0] for light in (1, -1)]
        warm, cold = to_uint8(render(picture, torch.tensor(looks))).numpy()
        caption = f"a photo of {colour} {scene}"
        rows.append({"jpg_0": encode_png(warm), "jpg_1": encode_png(cold), "label_0": 1.0, "caption": caption})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return read_pairs(folder / "pairs.parquet", folder)


def read_pairs(path: Path, folder: Path, split: str = "train") -> Path:
    """The index, in `folder`, of the checked pairs of a file or folder in Pick-a-Pic's columns. Raises: BadInput."""
    return check_pairs(
        [path],
        split,
        key="--pairs",
        cache=folder,
        on_bad_row="stop",
        source_counts=range(1),
        needs_loser=True,
        items=None,
        check_all=partial(in_threads, print),
    )


def encode(family: Family, pairs: Path) -> list[EncodedExample]:
    """Every pair with its winner and loser."""
    indexed = IndexedExamples(family, pairs, (SIZED,), ("winner", "loser"))
    visits = [Visit(row=row) for row in range(len(indexed.index.table))]
    wanted = [encoding for visit in visits for encoding in indexed.encodings(visit)]
    rows = encode_all(family.load_codec("cpu"), wanted, BATCH)
    return [indexed.encoded(visit, rows.__getitem__) for visit in visits]


def shuffled(pairs: Sequence[EncodedExample], seed: int) -> list[EncodedExample]:
    """Winner and loser exchanged in half of the pairs, at random."""
    swap = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return [
        replace(pair, x0={"winner": pair.x0["loser"], "loser": pair.x0["winner"]}) if swapped else pair
        for pair, swapped in zip(pairs, swap, strict=True)
    ]


def model_of(folder: Path) -> SizedModelTable:
    return SizedModelTable(family="stable_diffusion", path=str(folder), height=SIDE, width=SIDE)


def make_base(keep: Path, pairs: Path, mesh: DeviceMesh, steps: int) -> Path:
    """`keep`/base: a Stable Diffusion whose VAE reconstructs the pictures and whose UNet has learnt to draw them."""
    folder = write_stable_diffusion(keep / "base")
    fit_vae(folder / "vae", pairs, 3 * steps)  # fitted for `steps` alone it decodes both lights alike
    encoded = encode(load_family(model_of(folder)), pairs)
    alike = [replace(pair, x0={"target": pair.x0[role]}) for role in ("winner", "loser") for pair in encoded]
    run = RunFolder.claim(keep / "runs", "base", "", resume="never")
    config = trainer_table(batch=BATCH, learning_rate=LEARNING_RATE, steps=steps)
    work = InMemory(alike, (), seed=0, steps=steps)
    train_in(run, NothingHanded(), OneRank(model_of(folder), config, SFT(), work, mesh, seed=0))
    shutil.rmtree(folder / "unet")
    shutil.copytree(run.path / "final" / "unet", folder / "unet")
    return folder


def fit_vae(folder: Path, pairs: Path, steps: int) -> None:
    """Fit the VAE in `folder` to the pictures: a random decoder does not undo a random encoder.

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
    index = read_index(pairs)
    shown = [example.targets for example in index.examples(range(len(index.table)), SIZED)]
    pictures = np.concatenate([open_source(of[role], GEOMETRY) for role in ("winner", "loser") for of in shown])
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
        return batches_of(self._family, examples, BATCH, seed=self._seed, step=step, first_index=0)

    def held_out(self, rank: int) -> list[Batch]:
        encoded, size = self._held_out, len(self._held_out)
        steps = [-draw for draw in range(1, DRAWS + 1)]
        return [b for step in steps for b in batches_of(self._family, encoded, size, seed=0, step=step, first_index=0)]


def all_curves(
    pairs: Path, keep: Path, *, base_steps: int = 300, dpo_steps: int = 120, every: int = 20, seeds: int = 3
) -> dict[Labels, list[Curve]]:
    """Of runs with true and with shuffled labels from one base, (step, implicit accuracy on held-out pairs).

    `keep`/base and `keep`/tuned hold weights.
    """
    with one_rank() as mesh:
        folder = make_base(keep, pairs, mesh, base_steps)
        encoded = encode(load_family(model_of(folder)), pairs)
        train_on, held_out = encoded[:-HELD_OUT], encoded[-HELD_OUT:]
        config = trainer_table(batch=BATCH, learning_rate=LEARNING_RATE, steps=dpo_steps)
        curves: dict[Labels, list[Curve]] = {"true": [], "shuffled": []}
        for labels, seed in product(curves, range(seeds)):
            learn_from = shuffled(train_on, seed) if labels == "shuffled" else train_on
            work = InMemory(learn_from, held_out, seed=seed, steps=dpo_steps)
            trainer = OneRank(model_of(folder), config, DPO(beta=BETA), work, mesh, seed)
            run = RunFolder.claim(keep / "runs", f"{labels}_{seed}", "", resume="never")
            measure = partial(trainer.held_out, "implicit_acc")
            curves[labels].append(train_in(run, NothingHanded(), trainer, measure=measure, every=every))
            if (labels, seed) == ("true", 0):
                shutil.copytree(run.path / "final" / "unet", keep / "tuned", dirs_exist_ok=True)
        return curves


def evaluation(keep: Path, pairs: Path, seeds: int = 2) -> EvaluateRecipe:
    """The recipe that lets `jobs.evaluate` compare `keep`/base with `keep`/tuned by the warmth of their samples."""
    captions = sorted(set(read_index(pairs).table["caption"].to_pylist()))
    (keep / "prompts.txt").write_text("\n".join(captions) + "\n")
    judge = {"function": "jobs.one_process:warmth", "num_cpus": 0.1}
    return EvaluateRecipe.model_validate(
        {
            "out": str(keep / "evaluation"),
            "model": model_of(keep / "base").model_dump(exclude_unset=True) | {"guidance_scale": 1.0},
            "tuned": {"denoiser": str(keep / "tuned")},
            "data": {"path": str(keep / "prompts.txt")},
            "sampling": {"steps": 20, "seeds": seeds, "batch_size": 8},
            "reward": {"weights": {"warmth": 1.0}},
            "judges": {"python": {"warmth": judge}},
            "samplers": {"num_cpus": 0.3, "num_gpus": 0.0},
            "cluster": {"num_cpus": 2.0, "object_store_memory": 200_000_000},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=Path, help="Parquet in Pick-a-Pic's columns; default: 264 generated pairs")
    parser.add_argument("--out", type=Path, default=Path("offline_learning"), help="folder for models, plot and pages")
    arguments = parser.parse_args()
    refuse_small("--seeds", arguments.seeds, 1)
    refuse_small("--steps", arguments.steps, 20)
    keep = made(arguments.out.resolve(), "--out")
    pairs = read_pairs(arguments.pairs, keep) if arguments.pairs else generated_pairs(keep / "data", 264)
    refuse_small("--pairs: the number of pairs", len(read_index(pairs).table), HELD_OUT + BATCH)
    curves = all_curves(pairs, keep, dpo_steps=arguments.steps, seeds=arguments.seeds)
    measure = "implicit accuracy on held-out pairs (0.5: none)"
    plot(curves, keep / "curves.png", legend="labels", measure=measure, title="Offline DPO, small Stable Diffusion")
    for labels, runs in curves.items():
        print(f"{labels:>9}: " + "  ".join(f"{curve[-1][1]:.3f}" for curve in runs))
    (keep / "evaluate.toml").write_text(resolved_toml(evaluation(keep, pairs)))
    print(
        f"curves: {keep / 'curves.png'}; base against tuned: python -m jobs.evaluate --config {keep / 'evaluate.toml'}"
    )


if __name__ == "__main__":
    run_main(main)
