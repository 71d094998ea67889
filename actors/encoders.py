"""Prompts into the condition cache by Ray Data: load pictures in tasks, encode and write in a pool of encoder actors.

A dataset row is one work item: up to a few batches of rows of one kind and size, which become one file. The driver
only sees where the rows landed, commits the manifest now and then, and shows progress. Every batch is padded to the
same size, so that the cached bytes do not depend on what else was missing.

Every operator asks for its CPUs explicitly: with Ray Data's default of one CPU per task it waits for ever on a machine
whose CPUs are taken. One deadline holds for the whole thing. Left out: retrying a row that cannot be encoded.
"""

import json
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
import ray
import ray.data
import torch

from actors import stopping
from actors.loading import Source, Text, load
from rlhf.config import OnlineDPOConfig
from rlhf.data.cache import Part, Place, commit, write_part
from rlhf.models import FAMILIES

LOADER_CPUS = 0.1
LOADERS_PER_ENCODER = 2
T = TypeVar("T")

STOP_TIMEOUT_S = 30.0
COMMIT_EVERY_S = 20.0
PROGRESS_EVERY_S = 2.0
BATCHES_PER_FILE = 4


class EncodingFailed(RuntimeError):
    """Preprocessing stopped; what was encoded before is in the cache."""


def compute_dtype(config: OnlineDPOConfig) -> torch.dtype:
    """The dtype in which the frozen encoders run and in which the cache keeps their output."""
    return torch.bfloat16 if config.trainer.mixed_precision == "bf16" else torch.float32


def encode(
    config: OnlineDPOConfig,
    texts: Sequence[Text],
    sources: Sequence[Source],
    log: Callable[[str], None] = print,
) -> None:
    """Encode everything given and commit it to `config.data.cache`. Ray must be initialised.

    Raises: EncodingFailed with the cause, or at the deadline `preprocess.timeout_s`.
    """
    settings = config.preprocess
    items = plan(texts, sources, settings.batch_size, settings.encoders)
    _prepare_ray_data()
    dataset: ray.data.Dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    loaders = ray.data.TaskPoolStrategy(size=min(LOADERS_PER_ENCODER * settings.encoders, len(items)))
    dataset = dataset.map(load, compute=loaders, num_cpus=LOADER_CPUS).map(
        cast(Any, Encoder),  # Ray Data makes one per actor from fn_constructor_args
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(settings.encoders, len(items))),
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
    )
    total, done, parts = len(texts) + len(sources), 0, []
    shown = committed = monotonic()
    first: tuple[float, int] | None = None  # start-up does not count for the rate
    log(f"preprocess: encoding {len(texts)} instructions and {len(sources)} pictures")
    try:
        for row in _stream(dataset, settings.timeout_s):
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


def plan(texts: Sequence[Text], sources: Sequence[Source], batch_size: int, encoders: int) -> list[str]:
    """Work items as JSON, {"texts": […]} or {"sources": […] of one size}; enough of them to keep every encoder busy."""
    batches = math.ceil((len(texts) + len(sources)) / batch_size)
    count = batch_size * min(BATCHES_PER_FILE, max(1, batches // (2 * encoders)))
    sizes: dict[tuple[int, int], list[Source]] = {}
    for source in sources:
        sizes.setdefault((source.height, source.width), []).append(source)
    groups: list[tuple[str, Sequence[Text | Source]]] = [("texts", texts), *(("sources", s) for s in sizes.values())]
    return [
        json.dumps({kind: [asdict(row) for row in rows[start : start + count]]})
        for kind, rows in groups
        for start in range(0, len(rows), count)
    ]


class Encoder:
    """A frozen codec that turns work items into cache files."""

    def __init__(self, config: OnlineDPOConfig):
        family = FAMILIES[config.model.family](path=Path(config.model.path), dtype=compute_dtype(config))
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
            sources = [Source(**source) for source in item["sources"]]
            shape = (len(sources), sources[0].height, sources[0].width, 3)
            pixels = torch.from_numpy(np.frombuffer(bytearray(row["pixels"]), dtype=np.uint8).reshape(shape))
            for chosen, padded in self._batches(range(len(sources))):
                condition = self.codec.encode_source(pixels[list(padded)])
                rows += [
                    (sources[index].key, {name: tensor[i] for name, tensor in condition.items()}, None)
                    for i, index in enumerate(chosen)
                ]
        return {"part": json.dumps(asdict(write_part(self.folder, rows))), "error": ""}

    def _batches(self, rows: Sequence[T]) -> Iterator[tuple[Sequence[T], Sequence[T]]]:
        """(rows, the same padded with the last one to the constant batch size)."""
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            yield batch, [*batch, *[batch[-1]] * (self.batch_size - len(batch))]


def _stream(dataset: ray.data.Dataset, timeout_s: float) -> Iterator[dict[str, Any]]:
    """The dataset's rows as they come. Ray Data waits without a limit: it runs in a thread and the deadline is here."""
    results: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def consume() -> None:
        try:
            for row in dataset.iter_rows():
                results.put(row)
            results.put(None)
        except BaseException as error:
            results.put(error)

    stopping.requested.clear()
    thread = threading.Thread(target=consume, name="preprocess", daemon=True)
    thread.start()
    deadline = monotonic() + timeout_s
    try:
        while (result := results.get(timeout=max(0.0, deadline - monotonic()))) is not None:
            if isinstance(result, BaseException):
                raise EncodingFailed(f"encoding failed: {result}") from result
            if result["error"]:
                raise EncodingFailed(f"encoding failed: {result['error']}")
            yield result
    except queue.Empty:
        raise EncodingFailed(
            f"not finished after preprocess.timeout_s = {timeout_s:g} s; what is encoded is kept. The cluster has "
            f"{ray.available_resources().get('CPU', 0):g} CPUs free; start it again, or raise the limit"
        ) from None
    finally:
        stopping.requested.set()
        thread.join(timeout=STOP_TIMEOUT_S)


def _part_from_json(text: str) -> Part:
    document = json.loads(text)
    places = {key: Place(**{**place, "names": tuple(place["names"])}) for key, place in document["places"].items()}
    return Part(file=document["file"], size=document["size"], places=places)


def _prepare_ray_data() -> None:
    """One progress line of ours in place of Ray Data's bars and execution plans; and it stops when asked to."""
    context = ray.data.DataContext.get_current()
    if stopping.StopOnRequest not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(stopping.StopOnRequest)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # advises memory reservations for loaders that live for seconds
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off
