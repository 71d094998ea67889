"""Does offline DPO learn, and not only run? A small Stable Diffusion is made from photos and tuned to what people click on.

    python -m jobs.benchmarks.offline_learning --seeds 3 --out offline_learning [--pairs PARQUET]

Photos come under a warm and a cold light, and people click on the warm one. A VAE and then a UNet are fitted to all of them
(SFT), which gives a base whose samples look a little like photos. DPO then trains on pairs. The measure is the implicit
accuracy on held-out pairs; the null is not 0.5 ± the spread over pairs, but whole runs on shuffled labels. Everything is
the product's own: trainer, objectives, family, sampling; without Ray, in one process.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from jobs.benchmarks.curves import Curve, plot
from jobs.cli import resolved_toml
from jobs.demo.photos import photo, relight
from rlhf.data.batches import draws
from rlhf.data.media import decode_image, fit_image
from rlhf.data.pair_files import blocks_of, find_files, read_block
from rlhf.diffusion.objectives import DPO, SFT, Objective
from rlhf.evaluation.config import EvaluateConfig
from rlhf.models import FAMILIES
from rlhf.models.family import Family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.shards import distributed
from rlhf.tables import TrainerConfig
from rlhf.training.trainer import Trainer
from rlhf.types import Condition, PairBatch

Labels = Literal["true", "shuffled"]
SIDE, BATCH, HELD_OUT, DRAWS = 32, 16, 64, 4
BETA, LEARNING_RATE = 1000.0, 1e-3


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pairs of pictures of one thing each, the preferred one first."""

    winners: np.ndarray
    """uint8 (pairs, H, W, 3)."""
    losers: np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The same, encoded: latents (pairs, C, h, w), fp32, and conditions."""

    winners: Tensor
    losers: Tensor
    condition: Condition

    def batch(self, family: Family, rows: np.ndarray, seed: int, step: int) -> PairBatch:
        t, noise = draws(family.process, seed=seed, step=step, indices=range(len(rows)), shape=self.winners.shape[1:])
        condition = {name: tensor[rows] for name, tensor in self.condition.items()}
        return PairBatch(winner=self.winners[rows], loser=self.losers[rows], condition=condition, t=t, noise=noise)

    def part(self, rows: slice) -> "Pairs":
        condition = {name: tensor[rows] for name, tensor in self.condition.items()}
        return Pairs(winners=self.winners[rows], losers=self.losers[rows], condition=condition)

    def shuffled(self, seed: int) -> "Pairs":
        """Winner and loser exchanged in half of the pairs, at random."""
        swap = torch.from_numpy(np.random.default_rng(seed).random(len(self.winners)) < 0.5)[:, None, None, None]
        winners, losers = torch.where(swap, self.losers, self.winners), torch.where(swap, self.winners, self.losers)
        return Pairs(winners=winners, losers=losers, condition=self.condition)


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


def generated_pictures(count: int, seed: int = 0) -> Pictures:
    """Photos under two lights, the warmer one preferred: that is what the demo's simulated clicks go to."""
    random = np.random.default_rng(seed)
    winners: list[np.ndarray] = []
    losers: list[np.ndarray] = []
    captions = []
    for index in range(count):
        colour, scene = list(COLOURS)[index % len(COLOURS)], SCENES[index // len(COLOURS) % len(SCENES)]
        picture = photo(scene, COLOURS[colour], SIDE, SIDE, random) / 255
        for light, side in ((1, winners), (-1, losers)):
            relit = relight(picture, light * random.uniform(0.3, 0.6), 1.0 + random.uniform(-0.1, 0.1))
            side.append((relit * 255).astype(np.uint8))
        captions.append(f"a photo of {colour} {scene}")
    return Pictures(winners=np.stack(winners), losers=np.stack(losers), captions=tuple(captions))


def read_pictures(path: Path, split: str = "train") -> Pictures:
    """Pairs of a Parquet file or folder in Pick-a-Pic's columns, cropped to SIDE × SIDE."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    captions = []
    for file in find_files(path, split):
        for raw in (raw for block in blocks_of(file) for raw in read_block(block)):
            first, second = (fit_image(decode_image(data or b""), SIDE, SIDE, "crop") for data in raw.pictures)
            label = raw.fields["label_0"]
            if label in (0, 1):
                for side, picture in zip(sides, (first, second) if label == 1 else (second, first), strict=True):
                    side.append(picture)
                captions.append(raw.fields["caption"])
    return Pictures(winners=np.stack(sides[0]), losers=np.stack(sides[1]), captions=tuple(captions))


def make_base(folder: Path, pictures: Pictures, mesh: DeviceMesh, *, vae_steps: int, sft_steps: int) -> Path:
    """A Stable Diffusion folder whose VAE reconstructs `pictures` and whose UNet has learnt to draw them."""
    write_stable_diffusion(folder)
    everything = np.concatenate([pictures.winners, pictures.losers])
    fit_vae(folder / "vae", everything, vae_steps)
    family = FAMILIES["stable_diffusion"](path=folder)
    pairs = encode(family, pictures)
    alike = Pairs(
        winners=torch.cat([pairs.winners, pairs.losers]),
        losers=torch.cat([pairs.losers, pairs.winners]),
        condition={name: torch.cat([tensor] * 2) for name, tensor in pairs.condition.items()},
    )
    trainer = train(family, SFT(), alike, mesh, seed=0, steps=sft_steps)
    trainer.export(folder / "tuned")
    shutil.rmtree(folder / "unet")
    (folder / "tuned").rename(folder / "unet")
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


def encode(family: Family, pictures: Pictures) -> Pairs:
    codec = family.load_codec("cpu")
    winners, losers = (
        codec.encode_target(torch.from_numpy(side)).float() for side in (pictures.winners, pictures.losers)
    )
    return Pairs(winners=winners, losers=losers, condition=codec.encode_text(list(pictures.captions)))


def train(
    family: Family,
    objective: Objective,
    pairs: Pairs,
    mesh: DeviceMesh,
    *,
    seed: int,
    steps: int,
    every: int = 0,
    watch: Callable[[int, Trainer], None] = lambda step, trainer: None,
) -> Trainer:
    """A trainer after `steps` updates; `watch` sees it at the start and after every `every`-th."""
    config = TrainerConfig(
        train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        max_train_steps=steps,
        gradient_checkpointing=False,
        weight_decay=0.0,
    )
    trainer = Trainer(family=family, config=config, objective=objective, mesh=mesh, seed=seed)
    random = np.random.default_rng(seed)
    watch(0, trainer)
    for step in range(1, steps + 1):
        rows = random.choice(len(pairs.winners), BATCH, replace=False)
        trainer.step([pairs.batch(family, rows, seed, step)])
        if every and step % every == 0:
            watch(step, trainer)
    return trainer


def learning_curve(
    folder: Path, train_on: Pairs, held_out: Pairs, mesh: DeviceMesh, seed: int, labels: Labels, steps: int, every: int
) -> tuple[Curve, Trainer]:
    """(step, implicit accuracy on held-out pairs) of one run, and its trainer."""
    family = FAMILIES["stable_diffusion"](path=folder)
    pairs = train_on.shuffled(seed) if labels == "shuffled" else train_on
    rows = np.arange(len(held_out.winners))
    measured = [held_out.batch(family, rows, 0, -draw) for draw in range(1, DRAWS + 1)]
    curve: Curve = []

    def watch(step: int, trainer: Trainer) -> None:
        curve.append((step, trainer.evaluate(measured)["implicit_acc"]))

    trainer = train(family, DPO(beta=BETA), pairs, mesh, seed=seed, steps=steps, every=every, watch=watch)
    return curve, trainer


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long everything takes."""

    vae_steps: int = 300
    sft_steps: int = 300
    dpo_steps: int = 120
    every: int = 20
    seeds: int = 3


def all_curves(size: Size, pictures: Pictures, keep: Path) -> dict[Labels, list[Curve]]:
    """Curves of runs with true and with shuffled labels from one base. `keep`/base and `keep`/tuned hold weights."""
    torch.set_num_threads(1)  # these matrices are too small to share
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=600)
    try:
        folder = make_base(keep / "base", pictures, mesh, vae_steps=size.vae_steps, sft_steps=size.sft_steps)
        pairs = encode(FAMILIES["stable_diffusion"](path=folder), pictures)
        train_on, held_out = pairs.part(slice(None, -HELD_OUT)), pairs.part(slice(-HELD_OUT, None))
        curves: dict[Labels, list[Curve]] = {"true": [], "shuffled": []}
        for labels, runs in curves.items():
            for seed in range(size.seeds):
                curve, trainer = learning_curve(
                    folder, train_on, held_out, mesh, seed, labels, size.dpo_steps, size.every
                )
                runs.append(curve)
                if labels == "true" and seed == 0:
                    trainer.export(keep / "tuned")
        return curves
    finally:
        distributed.stop()


def evaluation(keep: Path, captions: Sequence[str], seeds: int = 2) -> EvaluateConfig:
    """The recipe that lets `jobs.evaluate` compare `keep`/base with `keep`/tuned by the warmth of their samples."""
    (keep / "prompts.txt").write_text("\n".join(sorted(set(captions))) + "\n")
    judge = {"function": "jobs.benchmarks.offline_learning:warmth", "num_cpus": 0.1}
    return EvaluateConfig.model_validate(
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
            "painters": {"num_cpus": 0.3, "num_gpus": 0.0},
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
    pictures = read_pictures(arguments.pairs) if arguments.pairs else generated_pictures(264)
    curves = all_curves(Size(dpo_steps=arguments.steps, seeds=arguments.seeds), pictures, keep)
    measure = "implicit accuracy on held-out pairs (0.5: none)"
    plot(curves, keep / "curves.png", legend="labels", measure=measure, title="Offline DPO, small Stable Diffusion")
    for labels, values in last(curves).items():
        print(f"{labels:>9}: " + "  ".join(f"{value:.3f}" for value in values))
    (keep / "evaluate.toml").write_text(resolved_toml(evaluation(keep, pictures.captions)))
    print(
        f"curves: {keep / 'curves.png'}; base against tuned: python -m jobs.evaluate --config {keep / 'evaluate.toml'}"
    )


if __name__ == "__main__":
    main()
