"""Does offline DPO learn, and not only run? A small Stable Diffusion is made from photos and tuned to what people click on.

    python -m jobs.benchmarks.offline_learning --seeds 3 --out offline_learning.png

Photos come in a well-lit and a badly lit version; the preferred one of a pair is the one with the higher simulated click
rate. A VAE and then a UNet are fitted to all of them (SFT), which gives a base whose samples look like photos. DPO then
trains on pairs. The measure is the implicit accuracy on held-out pairs; the null is not 0.5 ± the spread over pairs, but whole
runs on shuffled labels. Everything is the product's own: trainer, objectives, family, sampling; without Ray, in one process.
"""

import shutil
from collections.abc import Callable
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

from jobs.demo_photos import photo, relight
from rlhf import distributed
from rlhf.algorithms.objectives import DPO, SFT, Objective
from rlhf.config import TrainerConfig
from rlhf.data.collate import draws
from rlhf.models import FAMILIES
from rlhf.models.family import Family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.trainer import Trainer
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

    def shuffled(self, seed: int) -> "Pairs":
        """Winner and loser exchanged in half of the pairs, at random."""
        swap = torch.from_numpy(np.random.default_rng(seed).random(len(self.winners)) < 0.5)[:, None, None, None]
        winners, losers = torch.where(swap, self.losers, self.winners), torch.where(swap, self.winners, self.losers)
        return Pairs(winners=winners, losers=losers, condition=self.condition)


def generated_pictures(count: int, seed: int = 0) -> Pictures:
    """Photos under two lights; the one with the better simulated click rate wins."""
    random = np.random.default_rng(seed)
    winners, losers, captions = [], [], []
    for index in range(count):
        scene = ("fruit", "soup", "boxes")[index % 3]
        colour = tuple(random.uniform(0.2, 0.9, 3))
        picture = photo(scene, colour, SIDE, SIDE, random)
        good, bad = (
            relight(picture / 255, sign * random.uniform(0.3, 0.6), 1.0 + sign * random.uniform(0.0, 0.2))
            for sign in (1, -1)
        )
        winners.append((good * 255).astype(np.uint8))
        losers.append((bad * 255).astype(np.uint8))
        captions.append(f"a photo of {scene}")
    return Pictures(winners=np.stack(winners), losers=np.stack(losers), captions=tuple(captions))


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
) -> tuple[list[tuple[int, float]], Trainer]:
    """(step, implicit accuracy on held-out pairs) of one run, and its trainer."""
    family = FAMILIES["stable_diffusion"](path=folder)
    pairs = train_on.shuffled(seed) if labels == "shuffled" else train_on
    rows = np.arange(len(held_out.winners))
    measured = [held_out.batch(family, rows, 0, -draw) for draw in range(1, DRAWS + 1)]
    curve: list[tuple[int, float]] = []

    def watch(step: int, trainer: Trainer) -> None:
        curve.append((step, trainer.evaluate(measured)["implicit_acc"]))

    trainer = train(family, DPO(beta=BETA), pairs, mesh, seed=seed, steps=steps, every=every, watch=watch)
    return curve, trainer


def all_curves(
    pictures: Pictures, steps: int, seeds: int, every: int, vae_steps: int, sft_steps: int, keep: Path
) -> dict[str, list]:
    """Curves of `seeds` runs with true and with shuffled labels from one base; base and tuned weights stay in `keep`."""
    torch.set_num_threads(1)  # these matrices are too small to share
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=600)
    try:
        folder = make_base(keep / "base", pictures, mesh, vae_steps=vae_steps, sft_steps=sft_steps)
        pairs = encode(FAMILIES["stable_diffusion"](path=folder), pictures)
        train_on, held_out = (
            Pairs(
                winners=pairs.winners[part],
                losers=pairs.losers[part],
                condition={name: tensor[part] for name, tensor in pairs.condition.items()},
            )
            for part in (slice(None, -HELD_OUT), slice(-HELD_OUT, None))
        )
        curves: dict[str, list] = {"true": [], "shuffled": []}
        for labels in ("true", "shuffled"):
            for seed in range(seeds):
                curve, trainer = learning_curve(folder, train_on, held_out, mesh, seed, labels, steps, every)
                curves[labels].append(curve)
                print(f"{labels} {seed}: {curve}", flush=True)
                if labels == "true" and seed == 0:
                    trainer.export(keep / "tuned")
        return curves
    finally:
        distributed.stop()
