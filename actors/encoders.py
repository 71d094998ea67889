"""Encoders: actors with a frozen codec, as a stage of Ray Data that fills the cache, or beside the trainer on call.

A row of the data set is one piece of work: up to a few batches of encodings of one kind and size, which become one file. Every
batch is padded to the same size, so that no cached bit depends on what a row was encoded with, only on its place among them.
Between the processes work is pickled, and a fault is a text in the row: an exception would lose its cause on the way.

Every operator asks for its CPUs explicitly: with Ray Data's default of one CPU per task it waits for ever on a machine whose
CPUs are taken. Left out: retrying a row that cannot be encoded.
"""

import math
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from time import monotonic
from typing import Any, cast

import numpy as np
import ray
import ray.data
import torch

from actors import streaming
from rlhf.data.cache import Manifest, commit, read_manifest, write_part
from rlhf.data.encoding import encode_all, encode_media
from rlhf.data.sources import open_source, read_column
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.tables import ModelTable, PreprocessConfig
from rlhf.types import Encoding

LOADER_CPUS = 0.1
LOADERS_PER_ENCODER = 2
BATCHES_PER_FILE = 4
PROGRESS_EVERY_S = 2.0
COMMIT_EVERY_S = 20.0
RESTARTS = 3
"""Times that encoding goes on after it lost an encoder."""
Piece = dict[Encoding, str]
"""Encodings of one kind and size, and their cache keys."""


def load_codec(model: ModelTable, preprocess: PreprocessConfig) -> Any:
    return load_family(model).load_codec("cuda" if preprocess.num_gpus > 0 else "cpu")


def encode(
    model: ModelTable,
    preprocess: PreprocessConfig,
    cache: str,
    wanted: Mapping[str, Encoding],
    log: Callable[[str], None],
) -> None:
    """Encode what is `wanted`, by key, into the cache folder. What is done is committed as it comes, so a stop loses little.

    Raises: StreamBroken; PreprocessFailed, also where files that were written are not seen here.
    """
    streaming.prepare()
    texts = sum(encoding.text is not None for encoding in wanted.values())
    log(f"preprocess: encoding {texts} texts and {len(wanted) - texts} pictures")
    left = wanted
    for lost in range(1, 2 + RESTARTS):
        try:
            _encode(model, preprocess, cache, left, log)
            break
        except streaming.StreamBroken as error:
            if lost > RESTARTS or not isinstance(error.__cause__, ray.exceptions.RayActorError):
                raise
            log(f"preprocess: an encoder was lost ({type(error.__cause__).__name__}); going on with what is missing")
            left = {key: wanted[key] for key in wanted.keys() - read_manifest(cache).places.keys()}
    if unseen := len(wanted.keys() - read_manifest(cache).places.keys()):
        raise streaming.PreprocessFailed(
            f"{unseen} encoded rows are not in data.cache = {cache}; on several nodes it must be a shared folder"
        )


def _encode(
    model: ModelTable,
    preprocess: PreprocessConfig,
    cache: str,
    wanted: Mapping[str, Encoding],
    log: Callable[[str], None],
) -> None:
    """Once through Ray Data. What came before a failure is committed."""
    work = [{"work": pickle.dumps(part)} for part in plan(wanted, preprocess.batch_size, preprocess.encoders)]
    dataset: ray.data.Dataset = ray.data.from_items(work, override_num_blocks=len(work))
    loaders = ray.data.TaskPoolStrategy(size=min(LOADERS_PER_ENCODER * preprocess.encoders, len(work)))
    dataset = dataset.map(load, compute=loaders, num_cpus=LOADER_CPUS).map(
        cast(Any, Encoder),  # Ray Data makes one per actor from fn_constructor_args
        fn_constructor_args=(model, preprocess, cache),
        compute=ray.data.ActorPoolStrategy(size=min(preprocess.encoders, len(work))),
        num_cpus=preprocess.num_cpus,
        num_gpus=preprocess.num_gpus,
        max_restarts=0,  # Ray logs an error where an actor that it may restart was made from an object, as Ray Data does
    )
    parts, committed = list[Manifest](), monotonic()
    try:
        for part in _told(log, len(wanted), streaming.stream(dataset, "preprocess", preprocess.timeout_s)):
            parts.append(part)
            if monotonic() - committed >= COMMIT_EVERY_S:
                commit(cache, parts)
                committed, parts = monotonic(), []
    finally:
        if parts:
            commit(cache, parts)


def _told(log: Callable[[str], None], total: int, rows: Iterable[dict[str, Any]]) -> Iterator[Manifest]:
    """The parts in `rows`, and a line with the rate now and then. Start-up does not count for the rate."""
    done, first, shown = 0, None, monotonic()
    for row in rows:
        part: Manifest = pickle.loads(row["part"])
        done, now = done + len(part.places), monotonic()
        first = first or (now, done)
        if now - shown >= PROGRESS_EVERY_S or done == total:
            shown, rate = now, (done - first[1]) / max(now - first[0], 1e-9)
            pace = f", {rate:.1f}/s, {(total - done) / rate:.0f} s to go" if rate else ""
            log(f"preprocess: {done}/{total} rows{pace}")
        yield part


def plan(wanted: Mapping[str, Encoding], batch_size: int, encoders: int) -> list[Piece]:
    """Pieces of work, each of one kind and size; enough of them to keep every encoder busy."""
    groups: dict[Hashable, list[tuple[Encoding, str]]] = {}
    for key, encoding in wanted.items():
        groups.setdefault((encoding.kind, encoding.geometries), []).append((encoding, key))
    batches = math.ceil(len(wanted) / batch_size)
    count = batch_size * min(BATCHES_PER_FILE, max(1, batches // (2 * encoders)))
    return [dict(group[i : i + count]) for group in groups.values() for i in range(0, len(group), count)]


def load(row: dict[str, Any]) -> dict[str, Any]:
    """Add `media` to a piece of work: of every encoding its sources, uint8 (F, H, W, 3) each, pickled."""
    try:
        media = [
            [open_source(source, geometry) for source, geometry in zip(e.sources, e.geometries, strict=True)]
            for e in pickle.loads(row["work"])
        ]
    except (OSError, Refused) as error:
        return row | {"media": b"", "error": str(error)}
    return row | {"media": pickle.dumps(media), "error": ""}


class Encoder:
    """A stage of Ray Data: work with its media → a file of the cache, as a pickled `Manifest`."""

    def __init__(self, model: ModelTable, preprocess: PreprocessConfig, cache: str):
        self.codec = load_codec(model, preprocess)
        self._cache, self._batch_size = cache, preprocess.batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return {"part": b"", "error": row["error"]}
        work: Piece = pickle.loads(row["work"])
        opened = [[torch.from_numpy(medium) for medium in media] for media in pickle.loads(row["media"])]
        encoded = encode_media(self.codec, dict(zip(work, opened, strict=True)), self._batch_size)
        rows = {work[encoding]: found for encoding, found in encoded.items()}
        return {"part": pickle.dumps(write_part(self._cache, rows)), "error": ""}


class CallEncoder:
    """Encodes what it is asked for and hands the rows over, for data that is not cached."""

    def __init__(self, model: ModelTable, preprocess: PreprocessConfig, blocks_held: int):
        """blocks_held: row groups of a table, two columns of pictures each, that stay in memory."""
        self._codec, self._batch_size = load_codec(model, preprocess), preprocess.batch_size
        self._read = lru_cache(maxsize=2 * blocks_held)(read_column)

    def encode(self, encodings: Sequence[Encoding]) -> tuple[int, dict[Encoding, dict[str, np.ndarray]]]:
        """(count, which tells the driver that all went well; rows, fp32 or of whole numbers). Raises: OSError, Refused."""
        rows = encode_all(self._codec, encodings, self._batch_size, self._read)
        return len(rows), {encoding: _arrays(row) for encoding, row in rows.items()}


def _arrays(row: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """numpy has no bf16."""
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in row.items()}
    return {name: tensor.cpu().numpy().copy() for name, tensor in floats.items()}
