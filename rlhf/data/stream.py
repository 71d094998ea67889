"""Which pair trains when, and how it is cropped, mirrored and captioned: pure functions of (seed, position).

Every epoch visits each pair once. Blocks are permuted, and rows are permuted within windows of some blocks, so that
whoever reads pictures as they come holds a few blocks and not the data set; one window is a plain permutation. A resume
needs nothing but the number of steps done, on any number of ranks.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from rlhf.tables import HeldOutConfig, PairDataConfig, TrainerConfig
from rlhf.types import seed_from


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One pair at one place of the stream."""

    row: int
    """In the index."""
    mirrored: bool
    """Both pictures, and the source, left to right."""
    blank: bool
    """Trained with the empty caption."""
    crop: tuple[float, float]
    """(down, across) of the crop in what may be cut off: 0 … 1; 0.5, 0.5 is the centre."""


@dataclass(frozen=True, kw_only=True, eq=False)  # told apart by identity: hashing every block for a visit is slow
class PairStream:
    """`stream[position]` for any position ≥ 0."""

    block_sizes: tuple[int, ...]
    """Pairs per block, in the index's order."""
    window: int
    """Blocks whose rows are mixed with each other."""
    seed: int
    shuffle: bool = True
    hflip: bool = True
    random_crop: bool = False
    caption_dropout: float = 0.0

    def __getitem__(self, position: int) -> Visit:
        epoch, place = divmod(position, self._count)
        row = int(_order(self, epoch)[place]) if self.shuffle else place
        down, across = (_unit(self.seed, way, position) for way in ("crop down", "crop across"))
        return Visit(
            row=row,
            mirrored=self.hflip and _unit(self.seed, "mirror", position) < 0.5,
            blank=_unit(self.seed, "caption", position) < self.caption_dropout,
            crop=(down, across) if self.random_crop else (0.5, 0.5),
        )

    @cached_property
    def _count(self) -> int:
        return sum(self.block_sizes)


def training_stream(data: PairDataConfig, block_sizes: tuple[int, ...], seed: int) -> PairStream:
    """The stream of a recipe."""
    return PairStream(
        block_sizes=block_sizes,
        window=len(block_sizes) if data.latents == "cached" else data.shuffle_blocks,
        seed=seed,
        shuffle=data.shuffle,
        hflip=data.hflip,
        random_crop=data.crop == "random",
        caption_dropout=data.caption_dropout,
    )


def held_out_visits(held_out: HeldOutConfig, trainer: TrainerConfig, count: int) -> list[Visit]:
    """The first `eval.max_pairs` of `count` pairs as they are, as many as fill every rank's batches."""
    fit = trainer.ranks * trainer.train_batch_size
    used = min(count, held_out.max_pairs) // fit * fit
    return [Visit(row=row, mirrored=False, blank=False, crop=(0.5, 0.5)) for row in range(used)]


def _unit(seed: int, what: str, position: int) -> float:
    """Uniform in [0, 1)."""
    return seed_from(seed, what, position) / 2**63


@lru_cache(maxsize=2)
def _order(stream: PairStream, epoch: int) -> np.ndarray:
    """Index rows in the order of an epoch, int64 (pairs,)."""
    firsts = np.concatenate([[0], np.cumsum(stream.block_sizes)])
    blocks = permutation(seed_from(stream.seed, "blocks", epoch), len(stream.block_sizes))
    parts = []
    for start in range(0, len(blocks), stream.window):
        rows = np.concatenate([np.arange(firsts[b], firsts[b + 1]) for b in blocks[start : start + stream.window]])
        parts.append(rows[permutation(seed_from(stream.seed, "rows", epoch, start), len(rows))])
    return np.concatenate(parts)


def permutation(seed: int, count: int) -> np.ndarray:
    """A permutation of range(count) made of hashes (splitmix64), so that no library's generator can change it."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
