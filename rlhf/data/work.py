"""What a trainer rank trains on: the worker's half of a source of work.

A source has two halves. The driver's (`rlhf.loops`, `actors`) hands every rank something for each step, or nothing; the worker's
half here turns that and the number of the step into micro-batches. `OnlineWork` is handed pairs and writes the record of them;
`OfflineWork` finds its examples itself, in an index with encodings in the cache, or in the record of an online run.

Shapes: B examples, C latent channels, h w latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.data import audit
from rlhf.data.batches import EncodedExample, ReadRow, batches_of, latents_from_array, t_seed
from rlhf.data.cache import EncodingCache, read_manifest
from rlhf.data.examples import read_index
from rlhf.data.records import BadInput, Problem
from rlhf.data.sources import open_source
from rlhf.data.stream import PairStream, Visit, held_out_visits
from rlhf.diffusion.process import with_times
from rlhf.models.family import Family
from rlhf.runs.folder import Fence
from rlhf.tables import HeldOutConfig, PairDataConfig
from rlhf.training_tables import TrainerConfig
from rlhf.types import Batch, Encoding, Example, Geometry, Pair, Prompt, Sized, Source

HELD_OUT_STEP = 0
"""The step whose noise the evaluation uses: training begins at 1."""
EncodedRows = Mapping[Encoding, Mapping[str, np.ndarray]]
"""Rows as encoders hand them over, fp32 or whole numbers."""


class Work(Protocol):
    """Made in the driver, opened in each rank."""

    def open(self, family: Family) -> None:
        """Open files. Called once, before anything else, in the process that calls the rest."""

    def batches(self, step: int, rank: int, handed: Any, values: Sequence[Any]) -> list[Batch]:
        """The rank's micro-batches of update `step` (from 1). `values` are what references in `handed` stood for."""

    def held_out(self, rank: int) -> list[Batch]:
        """The rank's micro-batches of the evaluation, always the same; none where nothing is held out."""


def _example(family: Family, row: ReadRow, prompt: Prompt, x0: Mapping[str, Tensor]) -> EncodedExample:
    """An example whose latents are there already."""
    rows = [row(encoding) for encoding in family.encodings(prompt)]
    return EncodedExample(rows=rows, bucket=family.bucket(prompt), x0=x0)


# --- online ------------------------------------------------------------------------------------------------------------


class OnlineWork:
    """Pairs that the driver hands out, with conditions from the cache."""

    def __init__(
        self, trainer: TrainerConfig, cache: EncodingCache, pairs: Path, fence: Fence, *, seed: int, save_latents: bool
    ):
        """pairs: folder of the record that is written before a pair trains."""
        self._trainer, self._cache, self._pairs, self._fence = trainer, cache, pairs, fence
        self._seed, self._save_latents = seed, save_latents

    def open(self, family: Family) -> None:
        self._family = family
        self._process = with_times(family.process, self._trainer.timesteps, self._trainer.timestep_shift)

    def batches(self, step: int, rank: int, handed: Sequence[Pair], values: Sequence[np.ndarray]) -> list[Batch]:
        """handed: the rank's pairs; values: the latents of each one's winner and loser, in order."""
        latents, family = iter(values), self._family  # with_candidates goes to the winner and then to the loser
        pairs = [pair.with_candidates(lambda side: replace(side, latents=next(latents))) for pair in handed]
        first = rank * self._trainer.pairs_per_rank
        self._fence.check()
        audit.write_pairs(
            self._pairs / f"step_{step:06d}.rank_{rank}.parquet",
            pairs,
            [[self._cache.key(encoding) for encoding in family.encodings(pair.prompt)] for pair in pairs],
            [
                self._process.draw_t(
                    t_seed(self._seed, step, index), family.tokens(torch.empty(1, *pair.winner.latents.shape))
                )
                for index, pair in enumerate(pairs, first)
            ],
            seed=self._seed,
            step=step,
            first_index=first,
            save_latents=self._save_latents,
        )
        examples = [
            _example(
                family,
                self._cache.row,
                pair.prompt,
                {"winner": latents_from_array(pair.winner.latents), "loser": latents_from_array(pair.loser.latents)},
            )
            for pair in pairs
        ]
        size, process = self._trainer.train_batch_size, self._process
        return batches_of(family, examples, size, seed=self._seed, step=step, first_index=first, process=process)

    def held_out(self, rank: int) -> list[Batch]:
        return []


# --- offline -----------------------------------------------------------------------------------------------------------


class IndexedExamples:
    """The rows of an index: texts and media that are encodings."""

    def __init__(self, family: Family, file: Path, sizes: Sequence[Sized], roles: Sequence[str]):
        """sizes: of every area that examples are trained at; the rows of each follow those of the one before. roles: those of
        the objective, the only media that are read.
        """
        self.index = read_index(file)
        self.block_sizes = self.index.sizes * len(sizes)
        self.blocks = np.tile(self.index.table["block"].to_numpy(), len(sizes))
        """The block that each row's media lie in."""
        self._family, self._sizes, self._roles = family, tuple(sizes), tuple(roles)

    def encodings(self, visit: Visit, example: Example | None = None) -> tuple[Encoding, ...]:
        """Everything that is encoded of a visit, cropped and mirrored as that says: of the prompt that the model is told, and
        then of each role. What is preferred is a target too. `example`: its row, for whoever has read it.
        """
        example = example or self._example(visit)
        shown = partial(replace, mirrored=visit.mirrored, crop=visit.crop)
        prompt = self._prompt(visit, example)
        prompt = replace(prompt, sources=tuple(map(shown, prompt.sources)))
        told = self._family.unguided(prompt) if visit.blank else prompt
        assert told is not None, "recipes refuse caption dropout for a family without an unguided prompt"
        media = [example.targets.get(role) or example.targets["winner"] for role in self._roles]
        targets = (self._family.target(shown(source), prompt.geometry) for source in media)
        return (*self._family.encodings(told), *targets)

    def encoded(self, visit: Visit, row: ReadRow) -> EncodedExample:
        """A visit as tensors."""
        example = self._example(visit)
        rows = [row(encoding) for encoding in self.encodings(visit, example)]
        told = rows[: len(rows) - len(self._roles)]
        x0 = {role: found["latents"].float() for role, found in zip(self._roles, rows[len(told) :], strict=True)}
        mask = None
        if example.mask:
            shown = replace(example.mask, mirrored=visit.mirrored, crop=visit.crop)
            mask = share_under(shown, example.prompt.geometry, x0[self._roles[0]].shape[-2:])
        return EncodedExample(rows=told, bucket=self._family.bucket(self._prompt(visit, example)), x0=x0, mask=mask)

    @staticmethod
    def _prompt(visit: Visit, example: Example) -> Prompt:
        return replace(example.prompt, sources=()) if visit.alone else example.prompt

    def _example(self, visit: Visit) -> Example:
        area, row = divmod(visit.row, len(self.index.table))
        (example,) = self.index.examples(range(row, row + 1), self._sizes[area])
        return example


def share_under(mask: Source, geometry: Geometry, latents: torch.Size) -> Tensor:
    """How white a mask is over each latent (h, w), 0 … 1. Raises: OSError, Refused for a file that has changed."""
    grey = torch.from_numpy(open_source(mask, replace(geometry, frames=1))).float().mean(-1) / 255
    return F.adaptive_avg_pool2d(grey, tuple(latents))[0]


class RecordedExamples:
    """The record of an online run, in the order trained, with the sampler's own latents."""

    SIDES: ClassVar[Mapping[str, str]] = {"winner": "winner", "loser": "loser", "target": "winner"}
    """Role → the side of a recorded pair."""

    def __init__(self, family: Family, folder: Path, roles: Sequence[str]):
        self._family, self._roles = family, tuple(roles)
        places: list[tuple[tuple[int, int], Path, int]] = []
        for file in sorted(folder.glob("*.parquet")):
            table = audit.read_file(file, columns=["step", "index"])
            trained = zip(table["step"].to_pylist(), table["index"].to_pylist(), strict=True)
            places += [(when, file, row) for row, when in enumerate(trained)]
        self._places = [(file, row) for _, file, row in sorted(places)]
        self.block_sizes = (len(self._places),)
        self._rows = lru_cache(maxsize=64)(lambda file: audit.read_file(file).to_pylist())

    def encoded(self, visit: Visit, row: ReadRow) -> EncodedExample:
        file, place = self._places[visit.row]
        pair = self._rows(file)[place]
        x0 = {role: audit.latents_of(pair, self.SIDES[role]) for role in self._roles}
        return _example(self._family, row, audit.recorded_prompt(pair), x0)


Examples = IndexedExamples | RecordedExamples


@dataclass(frozen=True, kw_only=True)
class ExamplesPlace:
    """Where examples are: the file of an index, or the folder of an online run's record."""

    path: Path
    sizes: tuple[Sized, ...] = ()
    """Of every area that the examples of an index are trained at."""
    buckets: np.ndarray | None = None
    shares: np.ndarray | None = None
    caption_dropout: np.ndarray | None = None
    """See `PairStream` of these three."""
    recorded: bool = False

    def drawn(self) -> np.ndarray:
        """bool (examples,): which examples a mixture draws at all."""
        assert self.shares is not None and self.buckets is not None
        return self.shares[self.buckets] > 0

    def open(self, family: Family, roles: Sequence[str]) -> Examples:
        if self.recorded:
            return RecordedExamples(family, self.path, roles)
        return IndexedExamples(family, self.path, self.sizes, roles)


class OfflineWork:
    """Examples that the rank finds itself: which ones follows from the number of the step."""

    def __init__(
        self,
        trainer: TrainerConfig,
        data: PairDataConfig,
        evaluation: HeldOutConfig,
        cache: EncodingCache,
        training: ExamplesPlace,
        held_out: ExamplesPlace | None,
        *,
        roles: Sequence[str],
        seed: int,
    ):
        self._trainer, self._data, self._evaluation, self._cache = trainer, data, evaluation, cache
        self._places, self._roles, self._seed = (training, held_out), tuple(roles), seed

    def open(self, family: Family) -> None:
        training, held_out = self._places
        self._family = family
        self._process = with_times(family.process, self._trainer.timesteps, self._trainer.timestep_shift)
        self._training = training.open(family, self._roles)
        self._held_out = held_out.open(family, self._roles) if held_out else None
        self._stream = PairStream(
            block_sizes=self._training.block_sizes,
            data=self._data,
            seed=self._seed,
            batch_size=self._trainer.train_batch_size,
            buckets=training.buckets,
            shares=training.shares,
            caption_dropout=training.caption_dropout,
        )

    def batches(self, step: int, rank: int, handed: None, values: Sequence[EncodedRows]) -> list[Batch]:
        """values: rows that encoders made beside the trainer; all others are in the cache."""
        trainer = self._trainer
        first = rank * trainer.pairs_per_rank
        visits = self._stream.of_rank(trainer, step, rank)
        # Copies: what comes out of the object store cannot be written to.
        rows = {
            encoding: {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
            for part in values
            for encoding, arrays in part.items()
        }

        def row(encoding: Encoding) -> Mapping[str, Tensor]:
            return rows[encoding] if encoding in rows else self._cache.row(encoding)

        encoded = [self._training.encoded(visit, row) for visit in visits]
        return self._batches(encoded, step, first, self._trainer.train_batch_size)

    def _batches(self, encoded: Sequence[EncodedExample], step: int, first_index: int, size: int) -> list[Batch]:
        return batches_of(
            self._family,
            encoded,
            size,
            seed=self._seed,
            step=step,
            first_index=first_index,
            process=self._process,
            mask_weight=self._data.mask_weight,
        )

    def held_out(self, rank: int) -> list[Batch]:
        """The first pairs as they are, `eval.draws` times, at noise that never changes; one by one where not all may share a
        batch.
        """
        place = self._places[1]
        if self._held_out is None or place is None:
            return []
        size = self._trainer.train_batch_size if place.buckets is None else 1
        visits = held_out_visits(self._evaluation, self._trainer, sum(self._held_out.block_sizes))
        mine = len(visits) // self._trainer.ranks
        first, batches = rank * mine, list[Batch]()
        for draw in range(self._evaluation.draws):
            index = draw * self._evaluation.max_pairs + first
            encoded = [self._held_out.encoded(visit, self._cache.row) for visit in visits[first : first + mine]]
            batches += self._batches(encoded, HELD_OUT_STEP, index, size)
        return batches


# --- records -----------------------------------------------------------------------------------------------------------


def is_record(path: Path) -> bool:
    """Whether a folder holds the pairs of an online run."""
    first = next(iter(sorted(path.glob("*.parquet"))), None) if path.is_dir() else None
    try:
        return first is not None and "winner_latents" in pq.read_schema(first).names
    except (pa.ArrowException, OSError):  # whoever reads it says what is wrong
        return False


def record_size(folder: Path) -> int:
    """Pairs in a record."""
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def recorded_prompts(folder: Path) -> Iterator[Prompt]:
    """The prompts of a record, in the order of its files' names."""
    for file in sorted(folder.glob("*.parquet")):
        columns = ["key", "instruction", "sources", "height", "width", "frames"]
        yield from map(audit.recorded_prompt, audit.read_file(file, columns=columns).to_pylist())


def check_record(folder: Path, family: Family, cache: EncodingCache, geometry: Geometry) -> None:
    """Raise BadInput with every recorded pair that this model cannot train on again."""
    problems: list[Problem] = []
    known = read_manifest(cache.folder).places
    latent_shape = list(family.latent_shape(geometry))
    for file in sorted(folder.glob("*.parquet")):
        without = _without_latents(file)
        columns = ["key", "instruction", "sources", "encoding_keys", "height", "width", "frames", "latents_shape"]
        for number, row in enumerate(audit.read_file(file, columns=columns).to_pylist(), start=1):

            def problem(field: str, what: str, remedy: str) -> None:
                problems.append(Problem(file=str(file), line=number, field=field, what=what, remedy=remedy))  # noqa: B023

            if without:
                problem("latents", "are missing", "only a run with run.save_latents = true can be replayed")
            prompt = audit.recorded_prompt(row)
            if prompt.geometry != geometry:
                given = f"model.height × width × frames is {geometry.height} × {geometry.width} × {geometry.frames}"
                what = f"are {row['height']} × {row['width']} × {row['frames']}, but {given}"
                problem("height, width, frames", what, "give the run's own size")
                continue
            keys = [cache.key(encoding) for encoding in family.encodings(prompt)]
            if keys != row["encoding_keys"] or row["latents_shape"] != latent_shape:
                problem("encoding_keys", "were made by another model", "set model.* to the run's own")
            elif not all(key in known for key in keys):
                problem("encoding_keys", f"are not all in data.cache = {cache.folder}", "give the cache of that run")
    if problems:
        raise BadInput(problems)


def _without_latents(file: Path) -> bool:
    """Whether a file of a record has no latents, from its statistics alone: they are a megabyte a pair."""
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    latents = [column.statistics for column in columns if column.path_in_schema == "winner_latents"]
    return any(found is not None and found.null_count for found in latents)
