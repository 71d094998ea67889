"""Files of tensors: which of a folder are read, what is wrong with one, and tensors that are spread by rows over ranks.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import Refused

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
SAFETENSORS_NAMES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What the files of weights are called that each library writes and reads, without their endings."""
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack")
MAX_HEADER = 100_000_000
"""Bytes of the header of a safetensors file, by its library's own limit."""
AGAIN = "download it again"


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


def is_pointer(file: Path) -> bool:
    """Whether Git LFS left a pointer in place of a file's content."""
    with open(file, "rb") as stream:
        return stream.read(24).startswith(b"version https://git-lfs.")


def refuse_pointer(file: Path) -> None:
    """Raise Refused where a file `is_pointer`."""
    if is_pointer(file):
        raise Refused(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file of a model. Raises Refused, naming the file, for anything else."""
    if not file.is_file():
        raise Refused(f"{file} is missing; download the whole folder of the model")
    refuse_pointer(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))  # not bytes, of which a BOM would be taken
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file} is not JSON: {error}; {AGAIN}") from error
    if not isinstance(found, dict):
        raise Refused(f"{file} holds no JSON object; {AGAIN}")
    return found


def refuse_broken(folder: Path) -> None:
    """Raise Refused for a JSON file of a model's folder that is none, and for lists of words that Git LFS has not fetched."""
    for file in sorted(folder.glob("*")):
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix in (".txt", ".model"):
            refuse_pointer(file)


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    dtype: str
    """In the words of safetensors, e.g. BF16."""
    shape: list[int]


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, of which none is read. Raises Refused for what is none, or is not whole."""
    if not file.is_file():
        raise Refused(f"{file} is missing; {AGAIN}")
    refuse_pointer(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= min(size - 8, MAX_HEADER) else b""
    if not text:
        raise Refused(f"{file} is no safetensors file, or is cut off: {size:,} bytes without a header; {AGAIN}")
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        where, end = {}, 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (first, last), dtype = entry["data_offsets"], SAFETENSORS_NAMES.get(entry["dtype"])
            where[name] = Stored(file, 8 + length + first, entry["dtype"], [int(side) for side in entry["shape"]])
            if where[name].offset != end or (dtype and last - first != math.prod(entry["shape"]) * dtype.itemsize):
                raise ValueError(f"the place of {name}")
            end += last - first
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Refused(f"{file} is no safetensors file: its header makes no sense ({error}); {AGAIN}") from error
    if end != size:
        raise Refused(f"{file} is {'cut off' if size < end else 'too long'}: {size:,} bytes of {end:,}; {AGAIN}")
    return where


def weight_files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder's weights, which the library of `stem` reads, and what an index says: tensor → its file's name.

    Where a file and an index both lie in a folder, diffusers obeys the index and transformers takes the file. None: there is
    neither. Variants of the weights (model.fp16.safetensors) are passed over. Raises Refused for an index without sense.
    """
    file, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file() or (stem == TRANSFORMERS and file.is_file()):
        return [file] if file.is_file() else [], {}
    promised = read_json(index).get("weight_map")
    if not promised or not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
        raise Refused(f"{index} has no weight_map from tensors to files; {AGAIN}")
    shards = sorted(set(promised.values()))
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise Refused(f"{index} names {', '.join(absent)}, which {folder} lacks; download what is missing")
    return [folder / name for name in shards], promised


def no_weights(folder: Path, stem: str) -> str:
    """What lies in a folder in place of weights, and what to do."""
    wanted, found = f"{stem}.safetensors", sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHTS)
    others = f", but {', '.join(found[:3])}{', …' if found[3:] else ''}" if found else ""
    if wanted in found:
        remedy = f"that is a link to nothing: {AGAIN}"
    elif any(name.startswith(f"{stem}-") for name in found):
        remedy = f"those are shards without their index: download {wanted}.index.json"
    elif any(name.startswith(f"{stem}.") and name.endswith(".safetensors") for name in found):
        remedy = f"that is a variant alone: download {wanted} too, or load the model with its `variant` and save it"
    elif any(name.endswith(".safetensors") for name in found):
        remedy = f"that is another layout: download the folder of the diffusers layout, whose file is {wanted}"
    elif found:
        remedy = "only safetensors are read: download those, or write them with `from_pretrained` and `save_pretrained`"
    else:
        remedy = "download the weights"
    return f"{folder} has neither {wanted} nor its index{others}; {remedy}"


class SafetensorsFolder:
    """Rows of named tensors in a safetensors file, or in those of a folder that its library would read.

    Rows are read with plain file reads: a memory map would keep every page that was touched in the reader's memory.
    """

    def __init__(self, path: Path, stem: str = DIFFUSERS):
        """Reads headers. Raises Refused for files that are missing or broken, or of which an index says what is not so."""
        files, promised = weight_files(path, stem) if path.is_dir() else ([path], {})
        if not files:
            raise Refused(no_weights(path, stem))
        self.path = path
        self.where: dict[str, Stored] = {}
        for file in files:
            for name, stored in read_header(file).items():
                if name in self.where:
                    raise Refused(f"{name} is both in {self.where[name].file} and in {file}; {AGAIN}")
                self.where[name] = stored
        for name, shard in promised.items():
            if name not in self.where or self.where[name].file != path / shard:
                raise Refused(f"{path / shard} has no tensor {name!r}, though the index beside it says so; {AGAIN}")
        self.where = {name: self.where[name] for name in promised or self.where}

    def rows(self, name: str, start: int, stop: int, shape: Sequence[int]) -> Tensor:
        """Rows [start, stop) of `name`. Raises Refused when it is missing, of another shape or dtype, or cut off."""
        if name not in self.where:
            raise Refused(f"{self.path} has no tensor {name!r}")
        file, offset, stored, saved = self.where[name]
        if saved != list(shape):
            raise Refused(f"{file}: {name} has shape {saved}, the model wants {list(shape)}")
        dtype = SAFETENSORS_NAMES.get(stored)
        if dtype is None:
            raise Refused(f"{file}: {name} is {stored}; readable: {', '.join(SAFETENSORS_NAMES)}")
        row = math.prod(shape[1:]) * dtype.itemsize
        data = np.fromfile(file, np.uint8, count=(stop - start) * row, offset=offset + start * row)
        if data.size != (stop - start) * row:
            raise Refused(f"{file} is cut off: {name} ends early")
        return torch.from_numpy(data).view(dtype).view(stop - start, *shape[1:])
