"""Pairs for training offline: a place in the stream becomes tensors, from the cache, from encoder actors, or from a record.

Three kinds answer alike. `PicturePairs` are the rows of an index, with latents in the cache; `HandedPairs` are the same with
latents of an encoder that works beside the trainer. `StoredPairs` are the pairs/ folder of an online run, which holds the
sampler's own latents.

Shapes: B pairs, C latent channels, h w latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlhf.data import audit as record
from rlhf.data.batches import draws, latents_from_array
from rlhf.data.cache import ConditionCache, Manifest, source_key, target_key, text_key
from rlhf.data.examples import PairIndex, Preference, read_index
from rlhf.data.media import Fit
from rlhf.data.records import BadInput, Problem
from rlhf.data.stream import Visit
from rlhf.diffusion.process import Process
from rlhf.types import Condition, PairBatch

FIT: Fit = "crop"
BLANK = ""
"""The caption of classifier-free guidance's other branch."""

Latents = Mapping[str, np.ndarray]
"""One pair as an encoder hands it over: `winner`, for DPO `loser` (C, h, w), and what `encode_source` gave, all fp32."""


Sides = Literal["both", "winners"]
"""Which latents there are. `winners` is enough for SFT, whose pairs have the winner twice."""


@dataclass(frozen=True, kw_only=True)
class PairKeys:
    """Cache keys of what pairs are made of, for one model and picture size."""

    height: int
    width: int
    text: str
    """Fingerprint of the text encoders."""
    target: str
    source: str | None
    """None: the family sees no source."""

    def text_key(self, caption: str) -> str:
        return text_key(caption, self.text)

    def target_keys(self, pair: Preference, mirrored: bool) -> tuple[str, str]:
        """Of the first and of the second picture."""
        first, second = (
            target_key(content, self.height, self.width, mirrored, self.target)
            for content in (pair.content_0, pair.content_1)
        )
        return first, second

    def source_key(self, pair: Preference, mirrored: bool) -> str:
        assert pair.source_content is not None and self.source is not None
        return source_key(pair.source_content, self.height, self.width, FIT, self.source, mirrored)


class OfflinePairs(Protocol):
    """What ranks train from."""

    @property
    def block_sizes(self) -> tuple[int, ...]: ...

    def sides(self, visits: Sequence[Visit]) -> tuple[Tensor, Tensor]:
        """Latents of winners and losers, (B, C, h, w) fp32."""

    def condition(self, visits: Sequence[Visit]) -> Condition:
        """Encoded captions and sources, leading dimension B."""


class PicturePairs:
    """The rows of an index, encoded in a cache."""

    def __init__(self, index: PairIndex, cache: ConditionCache, keys: PairKeys, sides: Sides = "both"):
        self._index, self._cache, self._keys, self._sides = index, cache, keys, sides

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return tuple(self._index.block_sizes().tolist())

    def sides(self, visits: Sequence[Visit]) -> tuple[Tensor, Tensor]:
        winners, losers = [], []
        for visit in visits:
            pair = self._index[visit.row]
            keys = self._keys.target_keys(pair, visit.mirrored)
            winners.append(keys[pair.winner])
            losers.append(keys[1 - pair.winner if self._sides == "both" else pair.winner])
        winner, loser = (self._cache.stacked([(key,) for key in keys])["latents"].float() for keys in (winners, losers))
        return winner, loser

    def captions(self, visits: Sequence[Visit]) -> Condition:
        """Encoded captions alone."""
        texts = [BLANK if visit.blank else self._index[visit.row].caption for visit in visits]
        return self._cache.stacked([(self._keys.text_key(text),) for text in texts])

    def condition(self, visits: Sequence[Visit]) -> Condition:
        if self._keys.source is None:
            return self.captions(visits)
        keys = [self._keys.source_key(self._index[visit.row], visit.mirrored) for visit in visits]
        return self.captions(visits) | self._cache.stacked([(key,) for key in keys])


class HandedPairs:
    """`PicturePairs` whose latents come with each call, from an encoder that works beside the trainer."""

    def __init__(self, pairs: PicturePairs, handed: Mapping[Visit, Latents]):
        self._pairs, self._handed = pairs, handed

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return self._pairs.block_sizes

    def sides(self, visits: Sequence[Visit]) -> tuple[Tensor, Tensor]:
        winner = self._stack(visits, "winner")
        return winner, self._stack(visits, "loser") if "loser" in self._handed[visits[0]] else winner

    def condition(self, visits: Sequence[Visit]) -> Condition:
        names = [name for name in self._handed[visits[0]] if name not in ("winner", "loser")]
        return self._pairs.captions(visits) | {name: self._stack(visits, name) for name in names}

    def _stack(self, visits: Sequence[Visit], name: str) -> Tensor:
        return torch.stack([torch.from_numpy(np.array(self._handed[visit][name])) for visit in visits])


class StoredPairs:
    """The record of an online run, in the order trained."""

    def __init__(self, folder: Path, cache: ConditionCache):
        self._places: list[tuple[Path, int]] = []
        steps: list[tuple[int, int]] = []
        for file in sorted(folder.glob("*.parquet")):
            table = record.read_file(file, columns=["step", "index"])
            places = zip(table["step"].to_pylist(), table["index"].to_pylist(), strict=True)
            for row, place in enumerate(places):
                self._places.append((file, row))
                steps.append(place)
        self._places = [self._places[i] for i in sorted(range(len(steps)), key=steps.__getitem__)]
        self._cache = cache
        self._rows = lru_cache(maxsize=64)(lambda file: record.read_file(file).to_pylist())

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return (len(self._places),)

    def _row(self, visit: Visit) -> dict:
        file, row = self._places[visit.row]
        return self._rows(file)[row]

    def sides(self, visits: Sequence[Visit]) -> tuple[Tensor, Tensor]:
        rows = [self._row(visit) for visit in visits]
        winner, loser = (torch.stack([_latents(row, side) for row in rows]) for side in ("winner", "loser"))
        return winner, loser

    def condition(self, visits: Sequence[Visit]) -> Condition:
        rows = [self._row(visit) for visit in visits]
        return self._cache.stacked([(row["text_key"], row["source_key"]) for row in rows])


@dataclass(frozen=True, kw_only=True)
class PairsPlace:
    """Where a rank finds pairs: an index with the keys of its pictures, or the folder of a record."""

    path: Path
    keys: PairKeys | None = None
    """None: `path` is a record."""
    sides: Sides = "both"

    def open(self, cache: ConditionCache) -> OfflinePairs:
        return (
            PicturePairs(read_index(self.path), cache, self.keys, self.sides)
            if self.keys
            else StoredPairs(self.path, cache)
        )


def _latents(row: Mapping, side: str) -> Tensor:
    return latents_from_array(np.frombuffer(row[f"{side}_latents"], np.int16).reshape(row["latents_shape"]))


def is_record(path: Path) -> bool:
    """Whether a folder holds the pairs of an online run."""
    first = next(iter(sorted(path.glob("*.parquet"))), None) if path.is_dir() else None
    return first is not None and "winner_latents" in pq.read_schema(first).names


def record_size(folder: Path) -> int:
    """Pairs in a record."""
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def check_record(
    folder: Path, manifest: Manifest, cache: str, keys: PairKeys, latent_shape: tuple[int, int, int]
) -> None:
    """Raise BadInput with every stored pair that cannot be trained on again by the model of `keys`."""
    problems = []
    for file in sorted(folder.glob("*.parquet")):
        without = _without_latents(file)
        columns = ["instruction", "text_key", "source_key", "height", "width", "latents_shape"]
        for number, row in enumerate(record.read_file(file, columns=columns).to_pylist(), start=1):

            def problem(field: str, what: str, remedy: str) -> None:
                problems.append(Problem(file=str(file), line=number, field=field, what=what, remedy=remedy))  # noqa: B023

            if without:
                problem("latents", "are missing", "only a run with run.save_latents = true can be replayed")
            if (row["height"], row["width"]) != (keys.height, keys.width):
                what = f"are {row['height']} × {row['width']}, but model.height × width is {keys.height} × {keys.width}"
                problem("height, width", what, "give the run's own size")
            elif tuple(row["latents_shape"]) != latent_shape or row["text_key"] != keys.text_key(row["instruction"]):
                problem(
                    "text_key", "was made by another model", "set model.* and trainer.mixed_precision to the run's own"
                )
            for field in ("text_key", "source_key"):
                if row[field] not in manifest.places:
                    problem(field, f"is not in data.cache = {cache}", "give the cache of that run")
    if problems:
        raise BadInput(problems)


def _without_latents(file: Path) -> bool:
    """Whether a file of a record has no latents, from its statistics alone: they are a megabyte a pair."""
    groups = pq.ParquetFile(file)
    column = groups.schema_arrow.get_field_index("winner_latents")
    names = [groups.metadata.row_group(0).column(i).path_in_schema for i in range(groups.metadata.num_columns)]
    place = names.index("winner_latents") if column >= 0 else -1
    statistics = [groups.metadata.row_group(i).column(place).statistics for i in range(groups.num_row_groups)]
    return any(found is not None and found.null_count for found in statistics)


def batch_of(
    pairs: OfflinePairs, visits: Sequence[Visit], process: Process, *, seed: int, step: int, first_index: int
) -> PairBatch:
    """Tensors of some pairs of a step. (t, noise) are drawn as online: from (run seed, step, index within the step)."""
    winner, loser = pairs.sides(visits)
    indices = range(first_index, first_index + len(visits))
    t, noise = draws(process, seed=seed, step=step, indices=indices, shape=winner.shape[1:])
    return PairBatch(winner=winner, loser=loser, condition=pairs.condition(visits), t=t, noise=noise)
