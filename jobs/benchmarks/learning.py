"""Does online DPO learn, and not only run? Real sampler, pairs, publish, loop and trainer in one process, without Ray.

    python -m jobs.benchmarks.learning --steps 80 --seeds 3 --out learning.png

The reward is the warmth of the decoded picture (mean red − mean blue). The null is not the spread over prompts, which is
far too small, but whole runs in which each pair's rewards are shuffled: those runs move the held-out reward too. A run with
β's sign flipped must lose what a true run gains.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash

from actors.sampler import Sampler, SampleRequest
from jobs.benchmarks.one_process import FULL, Curve, Handed, OneRank, one_rank, plot, train_in, trainer_table, warmth
from rlhf.data.audit import candidate_seed
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.encoding import encode_all
from rlhf.data.fingerprint import fingerprints
from rlhf.data.media import encode_png
from rlhf.data.work import OnlineWork
from rlhf.diffusion.objectives import DPO
from rlhf.loops.train import Duty
from rlhf.models import load_family
from rlhf.models.tiny import write_flux_kontext
from rlhf.rollouts.pairing import RewardScale, RolloutGroup, make_pair
from rlhf.runs.folder import RunFolder
from rlhf.shards import buffers
from rlhf.tables import EditModelTable, SamplingTable
from rlhf.training.trainer import Trainer
from rlhf.types import REFERENCE, Candidate, Encoded, Geometry, Prompt, Score, Source, Verdict, seed_from

Mode = Literal["true", "shuffled", "flipped"]
HEIGHT, WIDTH, GROUPS, CANDIDATES, HELD_OUT = 48, 32, 12, 4, 16
BETA, LEARNING_RATE, REFRESH_EVERY = 2000.0, 3e-3, 20
SAMPLING = SamplingTable(steps=4, batch_size=16)


def make_world(folder: Path, count: int) -> tuple[EditModelTable, list[Prompt], EncodingCache]:
    """A model, `count` prompts on random pictures, of which the last HELD_OUT are never trained on, and their encodings."""
    model = EditModelTable(path=str(write_flux_kontext(folder / "kontext")), height=HEIGHT, width=WIDTH)
    family, prompts, geometry = load_family(model), list[Prompt](), Geometry(height=HEIGHT, width=WIDTH)
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        picture = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
        file, data = folder / f"{index}.png", encode_png(picture.numpy())
        file.write_bytes(data)
        source = Source(path=str(file), content=xxhash.xxh3_128_hexdigest(data))
        prompts.append(Prompt(key=str(index), instruction="make it warm", sources=(source,), geometry=geometry))
    cache = EncodingCache(folder / "cache", fingerprints(family))
    wanted = [encoding for prompt in prompts for encoding in family.encodings(prompt)]
    rows = encode_all(family.load_codec("cpu"), wanted, batch_size=1)
    keyed = {cache.key(encoding): Encoded(tensors=row) for encoding, row in rows.items()}
    commit(cache.folder, [write_part(cache.folder, keyed)])
    return model, prompts, cache


class WarmPairs:
    """The source of work: pairs of what the published policy samples, by their warmth. A run is never resumed."""

    def __init__(self, prompts: Sequence[Prompt], sampler: Sampler, trainer: Trainer, *, seed: int, mode: Mode):
        self._prompts, self._sampler, self._trainer = prompts, sampler, trainer
        self._seed, self._mode = seed, mode
        self._scale, self._shuffle = RewardScale(weights={"warmth": 1.0}), np.random.default_rng(seed)

    def metrics(self) -> dict[str, float]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None:
        self.publish(step)

    def publish(self, step: int) -> None:
        """Make the sampler hold the trainer's weights."""
        arrays, manifests = zip(*buffers.pack(self._trainer.shards()), strict=True)
        _, read_back = self._sampler.load(step, manifests, *arrays)
        assert read_back == tuple(manifest.checksum for manifest in manifests)

    def held_out_warmth(self) -> float:
        """Of the held-out prompts, always from the same noise."""
        media, _ = self._sample(self._prompts[-HELD_OUT:], [seed_from("held out", index) for index in range(HELD_OUT)])
        return float(np.mean(warmth(media)))

    def take(self, step: int) -> list[Handed]:
        train = self._prompts[:-HELD_OUT]
        attempts = [(step * GROUPS + index, attempt) for index in range(GROUPS) for attempt in range(CANDIDATES)]
        prompts = [train[cursor % len(train)] for cursor, _ in attempts]
        media, latents = self._sample(prompts, [candidate_seed(self._seed, *attempt) for attempt in attempts])
        rewards = np.reshape(warmth(media), (GROUPS, CANDIDATES))
        if self._mode == "shuffled":
            rewards = self._shuffle.permuted(rewards, axis=1)
        candidates = [
            Candidate(cursor=cursor, attempt=attempt, version=step, media=None, latents=array)
            for (cursor, attempt), array in zip(attempts, latents, strict=True)
        ]
        groups = [
            RolloutGroup(
                cursor=candidates[first].cursor,
                prompt=prompts[first],
                candidates=tuple(candidates[first : first + CANDIDATES]),
                scores=tuple(Score(verdict=Verdict(valid=True), rewards={"warmth": float(x)}) for x in row),
            )
            for first, row in zip(range(0, len(candidates), CANDIDATES), rewards, strict=True)
        ]
        self._scale = self._scale.observe(groups)
        pairs = [pair for group in groups if (pair := make_pair(group, self._scale.parts(group)))]
        return [(pairs, [side.latents for pair in pairs for side in (pair.winner, pair.loser)])]

    def _sample(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Each one's uint8 (F, H, W, 3) and latents."""
        size, results = SAMPLING.batch_size, list[Any]()
        requests = [
            SampleRequest(prompt=prompt, noise_seed=seed, slot=index % size)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        for start in range(0, len(requests), size):
            results += self._sampler.sample(requests[start : start + size])[1:]
        return results[::2], results[1::2]


def all_curves(steps: int, seeds: int) -> dict[Mode, list[Curve]]:
    """(step, mean held-out reward at fixed noise) of `seeds` runs in each mode, on one tiny model."""
    modes: tuple[Mode, ...] = ("true", "shuffled", "flipped")
    config = trainer_table(batch=GROUPS, learning_rate=LEARNING_RATE, steps=steps)
    with one_rank() as mesh, tempfile.TemporaryDirectory() as folder:
        model, prompts, cache = make_world(Path(folder), count=48 + HELD_OUT)

        def learn(mode: Mode, seed: int) -> Curve:
            run = RunFolder.claim(Path(folder) / "runs", f"{mode}_{seed}", "", resume="never")
            work = OnlineWork(config, cache, run.path / "pairs", run.fence, seed=seed, save_latents=False)
            ranks = OneRank(model, config, DPO(beta=-BETA if mode == "flipped" else BETA), work, mesh, seed)
            sampler = Sampler(model, SAMPLING, "cpu", trainable=FULL, cache=cache)
            source = WarmPairs(prompts, sampler, ranks.trainer, seed=seed, mode=mode)
            duties = [
                Duty(every=REFRESH_EVERY, do=lambda step: ranks.trainer.refresh(REFERENCE)),
                Duty(every=1, do=source.publish),
            ]
            return train_in(run, source, ranks, duties, measure=source.held_out_warmth, every=10)

        return {mode: [learn(mode, seed) for seed in range(seeds)] for mode in modes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("learning.png"))
    arguments = parser.parse_args()
    curves = all_curves(arguments.steps, arguments.seeds)
    measure = "held-out warmth (mean red − mean blue)"
    plot(curves, arguments.out, legend="rewards", measure=measure, title="Online DPO on a tiny Kontext model")
    moved = {mode: [curve[-1][1] - curve[0][1] for curve in runs] for mode, runs in curves.items()}
    null = max(abs(change) for change in moved["shuffled"])
    for mode, values in moved.items():
        print(f"{mode:>9}: " + "  ".join(f"{value:+.4f} ({value / null:+.1f} × null)" for value in values))
    print(f"null (largest shuffled change): {null:.4f}; curves: {arguments.out}")


if __name__ == "__main__":
    main()
