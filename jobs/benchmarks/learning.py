"""Does online DPO learn, and not only run? Real sampler, pairs, publish and trainer in one process, without Ray.

    python -m jobs.benchmarks.learning --steps 80 --seeds 3 --out learning.png

The reward is the warmth of the decoded picture (mean red − mean blue). The null is not the spread over prompts, which is
far too small, but whole runs in which each pair's rewards are shuffled: those runs move the held-out reward too. A run with
β's sign flipped must lose what a true run gains.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from jobs.benchmarks.curves import Curve, plot
from rlhf.data.audit import candidate_seed
from rlhf.data.batches import collate, latents_from_array, latents_to_array
from rlhf.diffusion.objectives import DPO
from rlhf.models import FAMILIES
from rlhf.models.family import Codec, Family
from rlhf.models.sampling import sample
from rlhf.models.tiny import write_flux_kontext
from rlhf.rollouts.pairing import RewardScale, RolloutGroup, make_pair
from rlhf.shards import buffers, distributed
from rlhf.tables import TrainerConfig
from rlhf.training.trainer import Trainer
from rlhf.types import Candidate, Condition, Prompt, Score, Verdict, noise_from, seed_from, stack_conditions

Mode = Literal["true", "shuffled", "flipped"]
HEIGHT, WIDTH, SAMPLING_STEPS, GROUPS, CANDIDATES, HELD_OUT = 48, 32, 4, 12, 4, 16
BETA, LEARNING_RATE = 2000.0, 3e-3


def warmth(images: np.ndarray) -> np.ndarray:
    """Mean red minus mean blue of uint8 (B, H, W, 3), in units of the full range: −1 … 1, shape (B,)."""
    means = images.reshape(len(images), -1, 3).mean(axis=1) / 255
    return means[:, 0] - means[:, 2]


@dataclass(frozen=True, kw_only=True)
class World:
    """Prompts with their encoded conditions, and the family and codec that made them."""

    family: Family
    codec: Codec
    prompts: tuple[Prompt, ...]
    encoded: dict[str, Condition]

    def conditions(self, prompts) -> Condition:
        return stack_conditions([self.encoded[prompt.key] for prompt in prompts])


def make_world(folder: Path, count: int) -> World:
    """`count` prompts on random source pictures; the last HELD_OUT of them are never trained on."""
    family = FAMILIES["flux_kontext"](path=folder)
    codec = family.load_codec("cpu")
    prompts, encoded = [], {}
    text = codec.encode_text(["make it warm"])
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        picture = torch.randint(0, 256, (1, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
        prompt = Prompt(
            image_id=str(index),
            instruction="make it warm",
            image="",
            height=HEIGHT,
            width=WIDTH,
            text_key="warm",
            source_key=str(index),
        )
        prompts.append(prompt)
        encoded[prompt.key] = text | codec.encode_source(picture)
    return World(family=family, codec=codec, prompts=tuple(prompts), encoded=encoded)


class Sampler:
    """A plain model in the compute dtype that only ever changes by a publish."""

    def __init__(self, world: World):
        self.world, self.denoiser = world, world.family.load_denoiser("cpu")
        self.parameters = dict(self.denoiser.named_parameters())

    def load(self, trainer: Trainer) -> None:
        for buffer, manifest in buffers.pack(trainer.shards()):
            buffers.load(self.parameters, buffer, manifest)
            assert buffers.checksum(self.parameters, manifest) == manifest.checksum

    def sample(self, prompts, seeds) -> tuple[np.ndarray, list[np.ndarray]]:
        """uint8 (B, H, W, 3) pictures and their bf16 latents."""
        shape = self.world.family.latent_shape(HEIGHT, WIDTH)
        noise = torch.stack([noise_from(seed, shape) for seed in seeds])
        x0 = sample(self.world.family, self.denoiser, self.world.conditions(prompts), noise, SAMPLING_STEPS)
        arrays = [latents_to_array(latents) for latents in x0]
        return self.world.codec.decode(torch.stack([latents_from_array(a) for a in arrays])).numpy(), arrays


def learning_curve(world: World, mesh, seed: int, mode: Mode, steps: int, every: int = 10) -> Curve:
    """(step, mean held-out reward at fixed noise) every `every` steps, of one run."""
    config = TrainerConfig(
        train_batch_size=GROUPS,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        max_train_steps=steps,
        gradient_checkpointing=False,
        weight_decay=0.0,
    )
    beta = -BETA if mode == "flipped" else BETA
    trainer = Trainer(family=world.family, config=config, objective=DPO(beta=beta), mesh=mesh, seed=seed)
    sampler, scale = Sampler(world), RewardScale(weights={"warmth": 1.0})
    train, held_out = world.prompts[:-HELD_OUT], world.prompts[-HELD_OUT:]
    shuffle = np.random.default_rng(seed)
    curve = []
    for step in range(steps + 1):
        sampler.load(trainer)
        if step % every == 0:
            pictures, _ = sampler.sample(held_out, [seed_from("held out", i) for i in range(HELD_OUT)])
            curve.append((step, float(warmth(pictures).mean())))
        if step == steps:
            return curve
        cursors = [step * GROUPS + i for i in range(GROUPS)]
        prompts = [train[cursor % len(train)] for cursor in cursors for _ in range(CANDIDATES)]
        attempts = [(cursor, attempt) for cursor in cursors for attempt in range(CANDIDATES)]
        pictures, latents = sampler.sample(prompts, [candidate_seed(seed, *attempt) for attempt in attempts])
        rewards = warmth(pictures).reshape(GROUPS, CANDIDATES)
        if mode == "shuffled":
            rewards = shuffle.permuted(rewards, axis=1)
        groups = [
            RolloutGroup(
                cursor=cursor,
                prompt=prompts[CANDIDATES * i],
                candidates=tuple(
                    Candidate(cursor=cursor, attempt=k, version=step, image=None, latents=latents[CANDIDATES * i + k])
                    for k in range(CANDIDATES)
                ),
                scores=tuple(
                    Score(verdict=Verdict(valid=True), rewards={"warmth": float(rewards[i, k])})
                    for k in range(CANDIDATES)
                ),
            )
            for i, cursor in enumerate(cursors)
        ]
        scale = scale.observe(groups)
        pairs = [pair for group in groups if (pair := make_pair(group, scale.totals(group)))]
        process = world.family.process
        trainer.step([collate(pairs, world.conditions, process, seed=seed, step=step + 1, first_index=0)])
        if (step + 1) % 20 == 0:
            trainer.refresh_reference()
    raise AssertionError("unreachable")


def all_curves(steps: int, seeds: int) -> dict[Mode, list[Curve]]:
    """Curves of `seeds` runs in each mode, on one tiny model."""
    modes: tuple[Mode, ...] = ("true", "shuffled", "flipped")
    torch.set_num_threads(1)  # these matrices are too small to share
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=60)
    try:
        with tempfile.TemporaryDirectory() as folder:
            world = make_world(write_flux_kontext(Path(folder) / "kontext"), count=48 + HELD_OUT)
            return {mode: [learning_curve(world, mesh, seed, mode, steps) for seed in range(seeds)] for mode in modes}
    finally:
        distributed.stop()


def changes(curves: dict[Mode, list[Curve]]) -> dict[Mode, list[float]]:
    """Held-out reward after minus before, per run."""
    return {mode: [curve[-1][1] - curve[0][1] for curve in runs] for mode, runs in curves.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("learning.png"))
    arguments = parser.parse_args()
    curves = all_curves(arguments.steps, arguments.seeds)
    measure = "held-out warmth (mean red − mean blue)"
    plot(curves, arguments.out, legend="rewards", measure=measure, title="Online DPO on a tiny Kontext model")
    moved = changes(curves)
    null = max(abs(change) for change in moved["shuffled"])
    for mode, values in moved.items():
        print(f"{mode:>9}: " + "  ".join(f"{value:+.4f} ({value / null:+.1f} × null)" for value in values))
    print(f"null (largest shuffled change): {null:.4f}; curves: {arguments.out}")


if __name__ == "__main__":
    main()
