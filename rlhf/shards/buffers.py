"""Shards in flat uint8 buffers, with a manifest and a checksum (xxh3-64) each: how weights go through the object store.

Left out: compression, delta updates.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from rlhf.shards.files import SAFETENSORS_DTYPES, Shard, as_bytes

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Where some rows of a tensor lie in a buffer: bytes [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class BufferManifest:
    """What lies in one flat buffer, and the xxh3-64 of its bytes."""

    slices: tuple[Slice, ...]
    nbytes: int
    checksum: int


def pack(shards: Iterable[Shard], capacity: int = 512 * 2**20) -> Iterator[tuple[np.ndarray, BufferManifest]]:
    """Lay shards out in flat uint8 buffers of about `capacity` bytes (a larger shard gets one of its own)."""
    waiting: list[Shard] = []
    size = 0
    for shard in shards:
        nbytes = shard.rows.numel() * shard.rows.element_size()
        if waiting and size + nbytes > capacity:
            yield _pack_one(waiting, size)
            waiting, size = [], 0
        if nbytes:
            waiting.append(shard)
            size += nbytes
    if waiting:
        yield _pack_one(waiting, size)


def _pack_one(shards: Sequence[Shard], size: int) -> tuple[np.ndarray, BufferManifest]:
    buffer, slices, offset = np.empty(size, np.uint8), [], 0
    for shard in shards:
        data = as_bytes(shard.rows)
        buffer[offset : offset + data.size] = data
        dtype = str(shard.rows.dtype).removeprefix("torch.")
        stop = shard.start + shard.rows.shape[0]
        slices.append(
            Slice(
                name=shard.name,
                dtype=dtype,
                shape=shard.shape,
                start=shard.start,
                stop=stop,
                offset=offset,
                nbytes=data.size,
            )
        )
        offset += data.size
    return buffer, BufferManifest(slices=tuple(slices), nbytes=size, checksum=xxhash.xxh3_64_intdigest(buffer.data))


@torch.no_grad()
def load(parameters: Mapping[str, Tensor], buffer: np.ndarray, manifest: BufferManifest) -> None:
    """Copy a buffer's slices into whole tensors of the same names, shapes and dtypes. The buffer is only read.

    Raises ValueError when a tensor is unknown or differs in shape or dtype.
    """
    for piece in manifest.slices:
        target = parameters.get(piece.name)
        if target is None or tuple(target.shape) != piece.shape or target.dtype != DTYPES[piece.dtype]:
            have = None if target is None else (tuple(target.shape), target.dtype)
            raise ValueError(f"published {piece.name} is {piece.shape} {piece.dtype}, this model has {have}")
        data = buffer[piece.offset : piece.offset + piece.nbytes]
        source = torch.from_numpy(np.copy(data)).view(target.dtype).view(piece.stop - piece.start, *piece.shape[1:])
        target[piece.start : piece.stop].copy_(source)


def checksum(parameters: Mapping[str, Tensor], manifest: BufferManifest) -> int:
    """xxh3-64 of the bytes READ BACK from the tensors, in the manifest's order: equal to `manifest.checksum` iff loaded."""
    digest = xxhash.xxh3_64()
    for piece in manifest.slices:
        digest.update(as_bytes(parameters[piece.name][piece.start : piece.stop]).data)
    return digest.intdigest()
