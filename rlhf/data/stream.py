"""Which pair trains when, and how it is cropped, mirrored and captioned: pure functions of (seed, position).

Every epoch visits each pair once, or, where batches are filled up, at least once. Blocks are permuted, and rows are permuted
within windows of some blocks, so that whoever reads pictures as they come holds a few blocks and not the data set; one window is
a plain permutation. Where not all pairs may share a batch, each batch is of one bucket, and a bucket's last batch of an epoch is
filled up with its first pairs. A resume needs nothing but the number of steps done, on any number of ranks.

In a mixture (`rlhf.data.mixture`) every batch draws its bucket by itself, and takes the next pairs of it: the pairs of a bucket
are visited in permutations of their own, one after the other, however often the others come.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from rlhf.tables import HeldOutConfig, PairDataConfig
from rlhf.training_tables import TrainerConfig
from rlhf.types import CENTRE, seed_from


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One pair at one place of the stream."""

    row: int
    """In the index."""
    mirrored: bool = False
    """Both pictures, and the source, left to right."""
    blank: bool = False
    """Trained with the empty caption."""
    alone: bool = False
    """Trained without its sources."""
    crop: tuple[float, float] = CENTRE
    """(down, across) of the crop in what may be cut off: 0 … 1; 0.5, 0.5 is the centre."""


@dataclass(frozen=True, kw_only=True, eq=False)  # told apart by identity: hashing every block for a visit is slow
class PairStream:
    """`stream[position]` for any position ≥ 0."""

    block_sizes: tuple[int, ...]
    """Pairs per block, in the index's order."""
    data: PairDataConfig
    seed: int
    batch_size: int = 1
    buckets: np.ndarray | None = None
    """int32 (pairs,): pairs of one number may share a batch. None: all may."""
    shares: np.ndarray | None = None
    """(buckets,): the probability that a batch is of each; None: no mixture, every pair once in an epoch."""
    caption_dropout: np.ndarray | None = None
    """(buckets,): the share of pairs of each that trains with the empty caption; None: `data.caption_dropout` of all."""

    def __getitem__(self, position: int) -> Visit:
        data, row = self.data, self._row(position)
        down, across = (_unit(self.seed, way, position) for way in ("crop down", "crop across"))
        return Visit(
            row=row,
            mirrored=data.hflip and _unit(self.seed, "mirror", position) < 0.5,
            blank=_unit(self.seed, "caption", position) < self._blanks(row),
            alone=_unit(self.seed, "sources", position // self.batch_size)
            < data.source_dropout,  # all of a batch alike
            crop=(down, across) if data.crop == "random" else CENTRE,
        )

    def _blanks(self, row: int) -> float:
        """How often a row's caption is left out."""
        if self.caption_dropout is None:
            return self.data.caption_dropout
        assert self.buckets is not None
        return float(self.caption_dropout[self.buckets[row]])

    def _row(self, position: int) -> int:
        if self.shares is not None:
            return _mixed(self, position)
        epoch, place = divmod(position, self.epoch)
        return int(_order(self, epoch)[place]) if self.data.shuffle or self._groups is not None else place

    def of_rank(self, trainer: TrainerConfig, step: int, rank: int) -> list[Visit]:
        """What a rank trains on in an update; the first step is 1."""
        start = (step - 1) * trainer.pairs_per_step + rank * trainer.pairs_per_rank
        return [self[place] for place in range(start, start + trainer.pairs_per_rank)]

    @property
    def _groups(self) -> np.ndarray | None:
        """`buckets` where batches must be made of them."""
        return self.buckets if self.batch_size > 1 else None

    @cached_property
    def epoch(self) -> int:
        """Positions of an epoch; in a mixture as many as there are pairs that may be drawn, and no pair is sure to come."""
        if self.shares is not None:
            assert self.buckets is not None
            return int((self.shares[self.buckets] > 0).sum())
        if (groups := self._groups) is None:
            return sum(self.block_sizes)
        counts = np.bincount(groups)
        return int((-(-counts // self.batch_size)).sum()) * self.batch_size


DRAWN_AT_ONCE = 4096


def _mixed(stream: PairStream, position: int) -> int:
    """The row at a position of a mixture."""
    assert stream.buckets is not None
    batch, place = divmod(position, stream.batch_size)
    window, index = divmod(batch, DRAWN_AT_ONCE)
    drawn, before = _window(stream, window)
    bucket = int(drawn[index])
    earlier = int(before[bucket] + (drawn[:index] == bucket).sum())
    rows = _rows_of(stream, bucket)
    epoch, at = divmod(earlier * stream.batch_size + place, len(rows))
    order = _order_within(stream, bucket, epoch) if stream.data.shuffle else range(len(rows))
    return int(rows[order[at]])


def _drawn(stream: PairStream, window: int) -> np.ndarray:
    """The buckets of DRAWN_AT_ONCE batches, int64."""
    assert stream.shares is not None
    hashes = _hashes(seed_from(stream.seed, "mixture", window), DRAWN_AT_ONCE)
    uniform = (hashes >> np.uint64(11)) / 2.0**53  # exact, and so below 1: a bucket without a share is never drawn
    edges = np.cumsum(stream.shares)
    return np.searchsorted(edges / edges[-1], uniform, side="right")


@lru_cache(maxsize=2)
def _window(stream: PairStream, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of some batches, and how many batches of each came before them."""
    assert stream.shares is not None
    before = np.zeros(len(stream.shares), np.int64)
    for earlier in range(window):
        before += np.bincount(_drawn(stream, earlier), minlength=len(before))
    return _drawn(stream, window), before


@lru_cache(maxsize=1024)
def _rows_of(stream: PairStream, bucket: int) -> np.ndarray:
    return np.flatnonzero(stream.buckets == bucket)


@lru_cache(maxsize=1024)
def _order_within(stream: PairStream, bucket: int, epoch: int) -> np.ndarray:
    return permutation(seed_from(stream.seed, "mixture", bucket, epoch), len(_rows_of(stream, bucket)))


def held_out_visits(held_out: HeldOutConfig, trainer: TrainerConfig, count: int) -> list[Visit]:
    """The first `eval.max_pairs` of `count` pairs as they are, as many as fill every rank's batches."""
    fit = trainer.ranks * trainer.train_batch_size
    used = min(count, held_out.max_pairs) // fit * fit
    return [Visit(row=row) for row in range(used)]


def _unit(seed: int, what: str, position: int) -> float:
    """Uniform in [0, 1)."""
    return seed_from(seed, what, position) / 2**63


@lru_cache(maxsize=2)
def _order(stream: PairStream, epoch: int) -> np.ndarray:
    """Index rows in the order of an epoch, int64 (positions,)."""
    rows = _shuffled(stream, epoch) if stream.data.shuffle else np.arange(sum(stream.block_sizes))
    if (groups := stream._groups) is None:
        return rows
    batches = _batches(rows, groups[rows], stream.batch_size)
    if stream.data.shuffle:
        batches = batches[permutation(seed_from(stream.seed, "batches", epoch), len(batches))]
    return batches.ravel()


def _batches(rows: np.ndarray, buckets: np.ndarray, size: int) -> np.ndarray:
    """int64 (batches, size): rows of one bucket each, in the order of their first rows."""
    found, firsts = list[np.ndarray](), list[np.ndarray]()
    for bucket in np.unique(buckets):
        (places,) = np.nonzero(buckets == bucket)
        whole = np.resize(places, -(-len(places) // size) * size).reshape(-1, size)
        found.append(rows[whole])
        firsts.append(whole[:, 0])
    return np.concatenate(found)[np.argsort(np.concatenate(firsts), kind="stable")]


def _shuffled(stream: PairStream, epoch: int) -> np.ndarray:
    firsts = np.concatenate([[0], np.cumsum(stream.block_sizes)])
    blocks = permutation(seed_from(stream.seed, "blocks", epoch), len(stream.block_sizes))
    window = len(blocks) if stream.data.latents == "cached" else stream.data.shuffle_blocks  # mixed with each other
    parts = []
    for start in range(0, len(blocks), window):
        rows = np.concatenate([np.arange(firsts[b], firsts[b + 1]) for b in blocks[start : start + window]])
        parts.append(rows[permutation(seed_from(stream.seed, "rows", epoch, start), len(rows))])
    return np.concatenate(parts)


def permutation(seed: int, count: int) -> np.ndarray:
    """A permutation of range(count) made of hashes, so that no library's generator can change it."""
    return np.argsort(_hashes(seed, count), kind="stable")


def _hashes(seed: int, count: int) -> np.ndarray:
    """splitmix64, uint64 (count,)."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
