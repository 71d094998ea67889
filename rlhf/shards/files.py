"""Files of tensors that are spread by rows over ranks.

Because shards are contiguous rows, a safetensors file of the WHOLE tensors can be written by all ranks at once, each at its
own byte offsets, and read back by any number of ranks: no gather, no pickle, no resharding step.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import Refused

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
SAFETENSORS_NAMES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows [start, start + len(rows)) of the tensor `name` of global `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    rows: Tensor


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as flat uint8, on the CPU."""
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()


def write_sharded(
    file: Path,
    shards: Callable[[], Iterable[Shard]],
    *,
    rank: int,
    barrier: Callable[[], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file from every rank's `shards()`; rank 0 lays it out, each rank fills in its own rows.

    `shards` is called twice (shapes, then bytes) and should make its tensors one at a time: no more than one of them is in
    memory beside what the rank holds already. The folder must be shared by all nodes.
    """
    offsets: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for shard in shards():
        row_bytes = shard.rows.element_size() * math.prod(shard.shape[1:])
        size = shard.shape[0] * row_bytes
        header[shard.name] = {
            "dtype": SAFETENSORS_DTYPES[shard.rows.dtype],
            "shape": list(shard.shape),
            "data_offsets": [position, position + size],
        }
        offsets[shard.name] = position + shard.start * row_bytes
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if rank == 0:
        with open(file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + position)
    barrier()
    with open(file, "r+b") as out:
        for shard in shards():
            if shard.rows.numel():
                out.seek(8 + len(text) + offsets[shard.name])
                out.write(as_bytes(shard.rows).data)
        out.flush()
        os.fsync(out.fileno())
    barrier()


class SafetensorsFolder:
    """Rows of named tensors in one or many safetensors files (a file, or a folder of them).

    In a folder, variants of the weights (model.fp16.safetensors, model.non_ema.safetensors) are passed over.
    Rows are read with plain file reads: a memory map would keep every page that was touched in the reader's memory.
    """

    def __init__(self, path: Path):
        files = [f for f in sorted(path.glob("*.safetensors")) if "." not in f.stem] if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise Refused(f"no *.safetensors under {path}")
        self.path = path
        self.where: dict[str, tuple[Path, int, torch.dtype, list[int]]] = {}
        for file in files:
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                dtype = SAFETENSORS_NAMES.get(entry["dtype"])
                if dtype is None:
                    raise Refused(f"{file}: {name} is {entry['dtype']}; readable: {', '.join(SAFETENSORS_NAMES)}")
                self.where[name] = (file, 8 + length + entry["data_offsets"][0], dtype, entry["shape"])

    def rows(self, name: str, start: int, stop: int, shape: Sequence[int]) -> Tensor:
        """Rows [start, stop) of `name`. Raises Refused when it is missing, of another shape, or cut off."""
        if name not in self.where:
            raise Refused(f"{self.path} has no tensor {name!r}")
        file, offset, dtype, saved = self.where[name]
        if saved != list(shape):
            raise Refused(f"{file}: {name} has shape {saved}, the model wants {list(shape)}")
        row = math.prod(shape[1:]) * dtype.itemsize
        data = np.fromfile(file, np.uint8, count=(stop - start) * row, offset=offset + start * row)
        if data.size != (stop - start) * row:
            raise Refused(f"{file} is cut off: {name} ends early")
        return torch.from_numpy(data).view(dtype).view(stop - start, *shape[1:])
