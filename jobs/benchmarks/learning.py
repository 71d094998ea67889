"""Does online DPO learn, and not only run? Real sampler, pairs, publish, loop and trainer in one process, without Ray.

    python -m jobs.benchmarks.learning --steps 80 --seeds 3 --out learning.png

The reward is the warmth of the decoded picture (mean red − mean blue). The null is not the spread over prompts, which is
far too small, but whole runs in which each pair's rewards are shuffled: those runs move the held-out reward too. A run with
β's sign flipped must lose what a true run gains.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import DeviceMesh

from actors.sampler import Sampler, SampleRequest
from jobs.benchmarks.curves import Curve, plot
from jobs.benchmarks.one_process import Handed, OneRank, train_in
from rlhf.data.audit import candidate_seed
from rlhf.data.batches import CachePlace
from rlhf.data.cache import commit, encoding_key, write_part
from rlhf.data.encoding import encode_all
from rlhf.data.fingerprint import fingerprints
from rlhf.data.media import encode_png
from rlhf.data.work import OnlineWork
from rlhf.diffusion.objectives import DPO
from rlhf.loops.train import Duty
from rlhf.models import load_family
from rlhf.models.tiny import write_flux_kontext
from rlhf.models.trainable import Full, Trainable
from rlhf.rollouts.pairing import RewardScale, RolloutGroup, make_pair
from rlhf.runs.folder import RunFolder
from rlhf.shards import buffers, distributed
from rlhf.tables import EditModelTable, SamplingTable, TrainerConfig
from rlhf.training.trainer import Trainer
from rlhf.types import REFERENCE, Candidate, Geometry, Pair, Prompt, Score, Source, Verdict, seed_from

Mode = Literal["true", "shuffled", "flipped"]
HEIGHT, WIDTH, GROUPS, CANDIDATES, HELD_OUT = 48, 32, 12, 4, 16
BETA, LEARNING_RATE, REFRESH_EVERY = 2000.0, 3e-3, 20
SAMPLING = SamplingTable(steps=4, batch_size=16)
FULL = Trainable(parts=(Full(),))


def warmth(media: np.ndarray) -> np.ndarray:
    """Mean red minus mean blue of uint8 (B, F, H, W, 3), in units of the full range: −1 … 1, shape (B,)."""
    means = media.reshape(len(media), -1, 3).mean(axis=1) / 255
    return means[:, 0] - means[:, 2]


@dataclass(frozen=True, kw_only=True)
class World:
    """A model, and prompts whose encodings are in a cache."""

    model: EditModelTable
    prompts: tuple[Prompt, ...]
    cache: CachePlace


def make_world(folder: Path, count: int) -> World:
    """`count` prompts on random source pictures; the last HELD_OUT of them are never trained on."""
    path = write_flux_kontext(folder / "kontext")
    model = EditModelTable(path=str(path), height=HEIGHT, width=WIDTH)
    family = load_family(model)
    prompts = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        picture = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
        file, data = folder / f"{index}.png", encode_png(picture.numpy())
        file.write_bytes(data)
        source = Source(path=str(file), content=xxhash.xxh3_128_hexdigest(data))
        geometry = Geometry(height=HEIGHT, width=WIDTH)
        prompts.append(Prompt(key=str(index), instruction="make it warm", sources=(source,), geometry=geometry))
    cache = CachePlace(folder=str(folder / "cache"), fingerprints=fingerprints(family))
    wanted = [encoding for prompt in prompts for encoding in family.encodings(prompt)]
    rows = encode_all(family.load_codec("cpu"), wanted, batch_size=1)
    keyed = {encoding_key(encoding, cache.fingerprints[encoding.kind]): row for encoding, row in rows.items()}
    commit(cache.folder, [write_part(cache.folder, keyed)])
    return World(model=model, prompts=tuple(prompts), cache=cache)


class WarmPairs:
    """The source of work: pairs of what the published policy samples, by their warmth. A run is never resumed."""

    def __init__(self, world: World, trainer: OneRank, *, seed: int, mode: Mode):
        self._prompts, self._trainer, self._seed, self._mode = world.prompts, trainer.trainer, seed, mode
        self._sampler = Sampler(world.model, SAMPLING, "cpu", trainable=FULL, cache=world.cache)
        self._scale, self._shuffle = RewardScale(weights={"warmth": 1.0}), np.random.default_rng(seed)

    def take(self, step: int) -> list[Handed]:
        pairs = self._pairs(step)
        return [Handed(work=pairs, values=[side.latents for pair in pairs for side in (pair.winner, pair.loser)])]

    def metrics(self) -> dict[str, float]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None:
        self.publish(step)

    def publish(self, step: int) -> None:
        """Make the sampler hold the trainer's weights."""
        arrays, manifests = zip(*buffers.pack(self._trainer.shards()), strict=True)
        _, read_back, _ = self._sampler.load(step, manifests, *arrays)
        assert read_back == tuple(manifest.checksum for manifest in manifests)

    def held_out_warmth(self) -> float:
        """Of the held-out prompts, always from the same noise."""
        media, _ = self._sample(self._prompts[-HELD_OUT:], [seed_from("held out", index) for index in range(HELD_OUT)])
        return float(warmth(media).mean())

    def _pairs(self, step: int) -> list[Pair]:
        train = self._prompts[:-HELD_OUT]
        cursors = [step * GROUPS + index for index in range(GROUPS)]
        attempts = [(cursor, attempt) for cursor in cursors for attempt in range(CANDIDATES)]
        media, latents = self._sample(
            [train[cursor % len(train)] for cursor, _ in attempts],
            [candidate_seed(self._seed, *attempt) for attempt in attempts],
        )
        rewards = warmth(media)
        if self._mode == "shuffled":
            rewards = self._shuffle.permuted(rewards.reshape(GROUPS, CANDIDATES), axis=1).reshape(-1)
        candidates = [
            Candidate(cursor=cursor, attempt=attempt, version=step, media=None, latents=array)
            for (cursor, attempt), array in zip(attempts, latents, strict=True)
        ]
        scores = [Score(verdict=Verdict(valid=True), rewards={"warmth": float(reward)}) for reward in rewards]
        groups = [
            RolloutGroup(
                cursor=cursor,
                prompt=train[cursor % len(train)],
                candidates=tuple(candidates[first : first + CANDIDATES]),
                scores=tuple(scores[first : first + CANDIDATES]),
            )
            for cursor, first in zip(cursors, range(0, len(candidates), CANDIDATES), strict=True)
        ]
        self._scale = self._scale.observe(groups)
        return [pair for group in groups if (pair := make_pair(group, self._scale.totals(group)))]

    def _sample(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """uint8 (B, F, H, W, 3) and each one's latents."""
        size, media, latents = SAMPLING.batch_size, list[np.ndarray](), list[np.ndarray]()
        requests = [
            SampleRequest(prompt=prompt, noise_seed=seed, slot=index % size)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        for start in range(0, len(requests), size):
            results: list[Any] = self._sampler.sample(requests[start : start + size])
            media += results[1::2]
            latents += results[2::2]
        return np.stack(media), latents


def learning_curve(
    world: World, runs: Path, mesh: DeviceMesh, seed: int, mode: Mode, steps: int, every: int = 10
) -> Curve:
    """(step, mean held-out reward at fixed noise) every `every` steps, of one run, whose folder is in `runs`."""
    config = TrainerConfig(
        train_batch_size=GROUPS,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        max_train_steps=steps,
        gradient_checkpointing=False,
        weight_decay=0.0,
    )
    run = RunFolder.claim(runs, f"{mode}_{seed}", "", resume="never")
    objective = DPO(beta=-BETA if mode == "flipped" else BETA)
    work = OnlineWork(config, world.cache, run.path / "pairs", run.fence, seed=seed, save_latents=False)
    trainer = OneRank(
        Trainer(
            family=load_family(world.model), config=config, trainable=FULL, objective=objective, mesh=mesh, seed=seed
        ),
        work,
    )
    source = WarmPairs(world, trainer, seed=seed, mode=mode)
    curve: Curve = []
    duties = [
        Duty(every=REFRESH_EVERY, do=lambda step: trainer.trainer.refresh(REFERENCE)),
        Duty(every=1, do=source.publish),
        Duty(every=every, do=lambda step: curve.append((step, source.held_out_warmth())), at_start=True),
    ]
    train_in(run, steps, source, trainer, duties)
    return curve


def all_curves(steps: int, seeds: int) -> dict[Mode, list[Curve]]:
    """Curves of `seeds` runs in each mode, on one tiny model."""
    modes: tuple[Mode, ...] = ("true", "shuffled", "flipped")
    torch.set_num_threads(1)  # these matrices are too small to share
    mesh = distributed.start(rank=0, world=1, store=dist.HashStore(), device="cpu", timeout_s=60)
    try:
        with tempfile.TemporaryDirectory() as folder:
            world, runs = make_world(Path(folder), count=48 + HELD_OUT), Path(folder) / "runs"
            return {
                mode: [learning_curve(world, runs, mesh, seed, mode, steps) for seed in range(seeds)] for mode in modes
            }
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
