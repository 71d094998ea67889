"""Encoders: actors with a frozen codec, as a stage of Ray Data that fills the cache, or beside the trainer on call.

A row of the data set is one piece of work: up to a few batches of encodings of one kind and size, which become one file. The
driver only sees where the rows landed, commits the manifest now and then, and shows progress. Every batch is padded to the same
size, so that no cached bit depends on what a row was encoded with, only on its place among them. Between the processes work is
pickled, and a fault is a text in the row: an exception would lose its cause on the way.

Every operator asks for its CPUs explicitly: with Ray Data's default of one CPU per task it waits for ever on a machine
whose CPUs are taken. One deadline holds for the whole thing. Left out: retrying a row that cannot be encoded.
"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from time import monotonic
from typing import Any, cast

import numpy as np
import ray
import ray.data
import torch

from actors import streaming
from rlhf.data.cache import Part, commit, read_manifest, write_part
from rlhf.data.encoding import encode_all, encode_group, grouped
from rlhf.data.sources import media_of, read_column
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.tables import ModelTable, PreprocessConfig
from rlhf.types import Encoded, Encoding

LOADER_CPUS = 0.1
LOADERS_PER_ENCODER = 2
BATCHES_PER_FILE = 4
PROGRESS_EVERY_S = 2.0
COMMIT_EVERY_S = 20.0

Work = list[tuple[str, Encoding]]
"""(cache key, encoding) of encodings of one kind and size."""


def load_codec(model: ModelTable, preprocess: PreprocessConfig) -> Any:
    """The codec of a recipe's model on an encoder's device."""
    return load_family(model).load_codec("cuda" if preprocess.num_gpus > 0 else "cpu")


# --- before training ---------------------------------------------------------------------------------------------------


def encode(
    model: ModelTable,
    preprocess: PreprocessConfig,
    cache: str,
    wanted: Mapping[str, Encoding],
    log: Callable[[str], None],
) -> None:
    """Encode what is `wanted`, by key, into the cache folder. What is done is committed as it comes, so a stop loses little.

    Raises: StreamBroken; PreprocessFailed, also where files that were written are not seen here: on several nodes the folder
    is shared.
    """
    work = plan(wanted, preprocess.batch_size, preprocess.encoders)
    streaming.prepare()
    dataset: ray.data.Dataset = ray.data.from_items(
        [{"work": pickle.dumps(part)} for part in work], override_num_blocks=len(work)
    )
    loaders = ray.data.TaskPoolStrategy(size=min(LOADERS_PER_ENCODER * preprocess.encoders, len(work)))
    dataset = dataset.map(load, compute=loaders, num_cpus=LOADER_CPUS).map(
        cast(Any, Encoder),  # Ray Data makes one per actor from fn_constructor_args
        fn_constructor_args=(model, preprocess, cache),
        compute=ray.data.ActorPoolStrategy(size=min(preprocess.encoders, len(work))),
        num_cpus=preprocess.num_cpus,
        num_gpus=preprocess.num_gpus,
    )
    texts = sum(not encoding.sources for encoding in wanted.values())
    log(f"preprocess: encoding {texts} texts and {len(wanted) - texts} pictures")
    progress = _Progress(len(wanted), log)
    parts: list[Part] = []
    committed = monotonic()
    try:
        for row in streaming.stream(dataset, "preprocess", preprocess.timeout_s):
            parts.append(pickle.loads(row["part"]))
            progress.add(len(parts[-1].places))
            if monotonic() - committed >= COMMIT_EVERY_S:
                commit(cache, parts)
                committed, parts = monotonic(), []
    finally:
        if parts:
            commit(cache, parts)
    if lost := len(wanted.keys() - read_manifest(cache).places.keys()):
        raise streaming.PreprocessFailed(
            f"{lost} encoded rows are not in data.cache = {cache}; on several nodes it must be a shared folder"
        )


class _Progress:
    """A line with the rate now and then. Start-up does not count for the rate."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self._total, self._log = total, log
        self._done = 0
        self._first: tuple[float, int] | None = None
        self._shown = monotonic()

    def add(self, count: int) -> None:
        self._done += count
        now, total, done = monotonic(), self._total, self._done
        self._first = self._first or (now, done)
        if now - self._shown >= PROGRESS_EVERY_S or done == total:
            self._shown, rate = now, (done - self._first[1]) / max(now - self._first[0], 1e-9)
            pace = f", {rate:.1f}/s, {(total - done) / rate:.0f} s to go" if rate else ""
            self._log(f"preprocess: {done}/{total} rows{pace}")


def plan(wanted: Mapping[str, Encoding], batch_size: int, encoders: int) -> list[Work]:
    """Pieces of work, each of one kind and size; enough of them to keep every encoder busy."""
    keys = {encoding: key for key, encoding in wanted.items()}
    batches = math.ceil(len(wanted) / batch_size)
    count = batch_size * min(BATCHES_PER_FILE, max(1, batches // (2 * encoders)))
    return [
        [(keys[encoding], encoding) for encoding in group[start : start + count]]
        for group in grouped(wanted.values())
        for start in range(0, len(group), count)
    ]


def load(row: dict[str, Any]) -> dict[str, Any]:
    """Add `media` to a piece of work: the bytes of its sources, uint8 (F, H, W, 3) each, in order."""
    work: Work = pickle.loads(row["work"])
    try:
        media = b"".join(medium.numpy().tobytes() for _, encoding in work for medium in media_of(encoding))
        return {"work": row["work"], "media": media, "error": ""}
    except (OSError, Refused) as error:
        return {"work": row["work"], "media": b"", "error": str(error)}


class Encoder:
    """A stage of Ray Data: work with its media → a file of the cache, as a pickled `Part`."""

    def __init__(self, model: ModelTable, preprocess: PreprocessConfig, cache: str):
        self.codec = load_codec(model, preprocess)
        self._cache, self._batch_size = cache, preprocess.batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return {"part": b"", "error": row["error"]}
        work: Work = pickle.loads(row["work"])
        encodings, keys = [encoding for _, encoding in work], {encoding: key for key, encoding in work}
        media = _media_from_bytes(encodings, row["media"])
        rows = {keys[e]: encoded for e, encoded in encode_group(self.codec, encodings, media, self._batch_size)}
        return {"part": pickle.dumps(write_part(self._cache, rows)), "error": ""}


def _media_from_bytes(encodings: Sequence[Encoding], data: bytes) -> dict[Encoding, list[torch.Tensor]]:
    pixels, place = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)), 0
    media: dict[Encoding, list[torch.Tensor]] = {}
    for encoding in encodings:
        media[encoding] = []
        for geometry in encoding.geometries:
            shape = (geometry.frames, geometry.height, geometry.width, 3)
            size = math.prod(shape)
            media[encoding].append(pixels[place : place + size].view(shape))
            place += size
    return media


# --- beside the trainer ------------------------------------------------------------------------------------------------


class CallEncoder:
    """Encodes what it is asked for and hands the rows over, for data that is not cached."""

    def __init__(self, model: ModelTable, preprocess: PreprocessConfig, blocks_held: int):
        """blocks_held: row groups of a table, two columns of pictures each, that stay in memory."""
        self._codec, self._batch_size = load_codec(model, preprocess), preprocess.batch_size
        self._read = lru_cache(maxsize=2 * blocks_held)(read_column)

    def encode(self, encodings: Sequence[Encoding]) -> tuple[int, dict[Encoding, dict[str, np.ndarray]]]:
        """(count, rows as arrays, fp32 or of whole numbers): the count tells the driver that all went well.

        Raises: OSError, Refused for a medium that has changed.
        """
        rows = encode_all(self._codec, encodings, self._batch_size, self._read)
        return len(rows), {encoding: _arrays(row) for encoding, row in rows.items()}


def _arrays(row: Encoded) -> dict[str, np.ndarray]:
    """numpy has no bf16."""
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy().copy()
        for name, tensor in row.tensors.items()
    }
