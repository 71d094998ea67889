"""Prompts into the condition cache by Ray Data: load pictures in tasks, encode and write in a pool of encoder actors.

A dataset row is one work item: up to a few batches of rows of one kind and size, which become one file. The driver
only sees where the rows landed, commits the manifest now and then, and shows progress. Every batch is padded to the
same size, so that the cached bytes do not depend on what else was missing.

Every operator asks for its CPUs explicitly: with Ray Data's default of one CPU per task it waits for ever on a machine
whose CPUs are taken. One deadline holds for the whole thing. Left out: retrying a row that cannot be encoded.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
import ray
import ray.data
import torch

from actors import streaming
from actors.loading import Picture, Text, load
from rlhf.data.cache import Part, Place, commit, read_manifest, write_part
from rlhf.models import load_family
from rlhf.models.family import Codec
from rlhf.offline_config import TrainingConfig

LOADER_CPUS = 0.1
LOADERS_PER_ENCODER = 2
T = TypeVar("T")

COMMIT_EVERY_S = 20.0
PROGRESS_EVERY_S = 2.0
BATCHES_PER_FILE = 4


def encode(
    config: TrainingConfig,
    texts: Sequence[Text],
    pictures: Sequence[Picture],
    log: Callable[[str], None] = print,
) -> None:
    """Encode everything given and commit it to `config.data.cache`. Ray must be initialised.

    Raises: PreprocessFailed with the cause, at the deadline `preprocess.timeout_s`, or where another node's files are missing.
    """
    settings = config.preprocess
    items = plan(texts, pictures, settings.batch_size, settings.encoders)
    streaming.prepare()
    dataset: ray.data.Dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    loaders = ray.data.TaskPoolStrategy(size=min(LOADERS_PER_ENCODER * settings.encoders, len(items)))
    dataset = dataset.map(load, compute=loaders, num_cpus=LOADER_CPUS).map(
        cast(Any, Encoder),  # Ray Data makes one per actor from fn_constructor_args
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(settings.encoders, len(items))),
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
    )
    total, done, parts = len(texts) + len(pictures), 0, []
    shown = committed = monotonic()
    first: tuple[float, int] | None = None  # start-up does not count for the rate
    log(f"preprocess: encoding {len(texts)} instructions and {len(pictures)} pictures")
    try:
        for row in streaming.stream(dataset, "preprocess", settings.timeout_s):
            parts.append(_part_from_json(row["part"]))
            done += len(parts[-1].places)
            now = monotonic()
            first = first or (now, done)
            if now - shown >= PROGRESS_EVERY_S or done == total:
                shown, rate = now, (done - first[1]) / max(now - first[0], 1e-9)
                pace = f", {rate:.1f}/s, {(total - done) / rate:.0f} s to go" if rate else ""
                log(f"preprocess: {done}/{total} rows{pace}")
            if now - committed >= COMMIT_EVERY_S:
                commit(config.data.cache, parts)
                committed, parts = now, []
    finally:
        if parts:
            commit(config.data.cache, parts)
    wanted = {text.key for text in texts} | {picture.key for picture in pictures}
    if lost := len(wanted - read_manifest(config.data.cache).places.keys()):
        raise streaming.PreprocessFailed(
            f"{lost} encoded rows are not in data.cache = {config.data.cache}; on several nodes it must be a shared folder"
        )


def plan(texts: Sequence[Text], pictures: Sequence[Picture], batch_size: int, encoders: int) -> list[str]:
    """Work items as JSON, {"texts": […]} or {"pictures": […] of one role and size}; enough to keep every encoder busy."""
    batches = math.ceil((len(texts) + len(pictures)) / batch_size)
    count = batch_size * min(BATCHES_PER_FILE, max(1, batches // (2 * encoders)))
    kinds: dict[tuple[str, int, int], list[Picture]] = {}
    for picture in pictures:
        kinds.setdefault((picture.role, picture.height, picture.width), []).append(picture)
    groups: list[tuple[str, Sequence[Text | Picture]]] = [("texts", texts), *(("pictures", p) for p in kinds.values())]
    return [
        json.dumps({kind: [asdict(row) for row in rows[start : start + count]]})
        for kind, rows in groups
        for start in range(0, len(rows), count)
    ]


def encode_pictures(codec: Codec, role: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the cache keeps of uint8 pictures (B, H, W, 3), leading dimension B."""
    return codec.encode_source(pixels) if role == "source" else {"latents": codec.encode_target(pixels)}


class Encoder:
    """A frozen codec that turns work items into cache files."""

    def __init__(self, config: TrainingConfig):
        family = load_family(config.model, config.trainer.mixed_precision)
        self.codec = family.load_codec("cuda" if config.preprocess.num_gpus > 0 else "cpu")
        self.folder, self.batch_size = config.data.cache, config.preprocess.batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"part": JSON of the file that was written, "error": what went wrong or ""}."""
        if row["error"]:
            return {"part": "", "error": row["error"]}
        item = json.loads(row["item"])
        rows: list[tuple[str, dict[str, torch.Tensor], float | None]] = []
        if "texts" in item:
            texts = [Text(**text) for text in item["texts"]]
            for batch, filled in self._batches(texts):
                condition = self.codec.encode_text([text.instruction for text in filled])
                shares = self.codec.unknown_tokens([text.instruction for text in batch])
                rows += [
                    (text.key, {name: tensor[i] for name, tensor in condition.items()}, shares[i])
                    for i, text in enumerate(batch)
                ]
        else:
            pictures = [Picture.from_json(values) for values in item["pictures"]]
            shape = (len(pictures), pictures[0].height, pictures[0].width, 3)
            pixels = torch.from_numpy(np.frombuffer(bytearray(row["pixels"]), dtype=np.uint8).reshape(shape))
            for chosen, padded in self._batches(range(len(pictures))):
                tensors = encode_pictures(self.codec, pictures[0].role, pixels[list(padded)])
                rows += [
                    (pictures[index].key, {name: tensor[i] for name, tensor in tensors.items()}, None)
                    for i, index in enumerate(chosen)
                ]
        return {"part": json.dumps(asdict(write_part(self.folder, rows))), "error": ""}

    def _batches(self, rows: Sequence[T]) -> Iterator[tuple[Sequence[T], Sequence[T]]]:
        """(rows, the same padded with the last one to the constant batch size)."""
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            yield batch, [*batch, *[batch[-1]] * (self.batch_size - len(batch))]


def _part_from_json(text: str) -> Part:
    document = json.loads(text)
    places = {key: Place(**{**place, "names": tuple(place["names"])}) for key, place in document["places"].items()}
    return Part(file=document["file"], size=document["size"], places=places)
