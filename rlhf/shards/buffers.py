"""Shards in flat uint8 buffers, with a manifest and a checksum each: how weights go through the object store, uncompressed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from rlhf.shards.files import Shard, as_bytes


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows [start, stop) of the tensor `name` of global `shape`, at the byte `offset` of a buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class BufferManifest:
    """What lies in one flat buffer, and the xxh3-64 of its bytes."""

    slices: tuple[Slice, ...]
    checksum: int


def pack(shards: Iterable[Shard], capacity: int = 512 * 2**20) -> Iterator[tuple[np.ndarray, BufferManifest]]:
    """Lay shards out in flat uint8 buffers of about `capacity` bytes (a larger shard gets one of its own)."""
    waiting: list[Shard] = []
    size = 0
    for shard in shards:
        if waiting and size + shard.rows.nbytes > capacity:
            yield _pack_one(waiting, size)
            waiting, size = [], 0
        if shard.rows.nbytes:
            waiting.append(shard)
            size += shard.rows.nbytes
    if waiting:
        yield _pack_one(waiting, size)


def _pack_one(shards: Sequence[Shard], size: int) -> tuple[np.ndarray, BufferManifest]:
    buffer, slices, offset = np.empty(size, np.uint8), [], 0
    for shard in shards:
        data = as_bytes(shard.rows)
        buffer[offset : offset + data.size] = data
        start, stop, dtype = shard.start, shard.start + len(shard.rows), shard.rows.dtype
        slices.append(Slice(name=shard.name, dtype=dtype, shape=shard.shape, start=start, stop=stop, offset=offset))
        offset += data.size
    return buffer, BufferManifest(slices=tuple(slices), checksum=xxhash.xxh3_64_intdigest(buffer.data))


@torch.no_grad()
def load(parameters: Mapping[str, Tensor], buffer: np.ndarray, manifest: BufferManifest) -> None:
    """Copy a buffer's slices into whole tensors. Raises ValueError where one is unknown or differs in shape or dtype."""
    for piece in manifest.slices:
        target = parameters.get(piece.name)
        if target is None or (tuple(target.shape), target.dtype) != (piece.shape, piece.dtype):
            have = None if target is None else (tuple(target.shape), target.dtype)
            dtype = str(piece.dtype).removeprefix("torch.")
            raise ValueError(f"published {piece.name} is {piece.shape} {dtype}, this model has {have}")
        rows = target[piece.start : piece.stop]
        data = np.copy(buffer[piece.offset : piece.offset + rows.nbytes])
        rows.copy_(torch.from_numpy(data).view(target.dtype).view(rows.shape))


def checksum(parameters: Mapping[str, Tensor], manifest: BufferManifest) -> int:
    """xxh3-64 of the bytes READ BACK from the tensors, in the manifest's order: equal to `manifest.checksum` iff loaded."""
    digest = xxhash.xxh3_64()
    for piece in manifest.slices:
        digest.update(as_bytes(parameters[piece.name][piece.start : piece.stop]).data)
    return digest.intdigest()
