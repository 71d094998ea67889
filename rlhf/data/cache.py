"""Content-addressed store of encodings: a key is what went in, so a changed picture, text, size or model misses.

Tensors lie as raw bytes (bf16 exactly as computed) in Arrow files of one fixed schema, one record batch per tensor,
that readers map into memory: any number of actors on a node share one copy in the page cache, and a read touches only
the rows asked for. Parquet would have to be decoded by each of them.

    cache/manifest.json      which row lies where, with checksums; replaced atomically, after the files it names
    cache/part-….arrow       named after their own content, never changed

What no manifest names does not exist: a crash before the manifest costs work, never correctness. Left out: eviction
(delete the folder), compression (latents do not compress), the device and batch size that encoded a row in its key.
"""

import fcntl
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from rlhf.errors import Refused
from rlhf.types import Encoded, Encoding

FORMAT = 2
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),
    ]
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int64": torch.int64}


class CacheError(Refused):
    """A row is not in the cache or its file is damaged; the message says which and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a row lies."""

    file: str
    first: int
    """Index of its first record batch."""
    names: tuple[str, ...]
    """Its tensors, one record batch each."""
    checksum: str
    """xxh3-128 over the tensors' names, dtypes, shapes and bytes."""
    unknown: float | None = None
    """See `Encoded`."""
    cut: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file that was written and what is in it, not yet in the manifest."""

    file: str
    size: int
    places: Mapping[str, Place]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The rows of a cache folder by key, and the size in bytes of each file."""

    files: Mapping[str, int]
    places: Mapping[str, Place]


def encoding_key(encoding: Encoding, fingerprint: str) -> str:
    """The key of an encoding's row: all that decides its values, and so not where a medium lies.

    fingerprint: of the encoders of its kind, see `rlhf.data.fingerprint`.
    """
    sources = [[s.content, s.fit, s.mirrored, s.crop] for s in encoding.sources]
    geometries = [[g.height, g.width, g.frames] for g in encoding.geometries]
    parts = [encoding.kind, encoding.text, sources, geometries, fingerprint]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def write_part(folder: str | Path, rows: Mapping[str, Encoded]) -> Part:
    """Write rows, by key, as one file and return where they lie.

    The file is complete and on disk when this returns; `commit` makes it visible.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, tuple[int, tuple[str, ...], str, float | None, float | None]] = {}
    whole = xxhash.xxh3_128()
    batches: list[pa.RecordBatch] = []
    for key, row in rows.items():
        checksum = xxhash.xxh3_128()
        first = len(batches)
        for name, tensor in row.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise ValueError(f"{name} of row {key} is {dtype}; the cache keeps {', '.join(DTYPES)}")
            data = _bytes(tensor)
            checksum.update(_head(name, dtype, tensor.shape))
            checksum.update(data)
            columns = [[key], [name], [dtype], [list(tensor.shape)], [data]]
            arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        whole.update(f"{key} {checksum.hexdigest()} {row.unknown} {row.cut}\n".encode())
        places[key] = first, tuple(row.tensors), checksum.hexdigest(), row.unknown, row.cut
    file = f"part-{whole.hexdigest()}.arrow"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as stream:
            with pa.ipc.new_file(stream, SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.chmod(temporary, 0o644)
        os.rename(temporary, folder / file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _fsync(folder)
    return Part(
        file=file,
        size=size,
        places={
            key: Place(file=file, first=first, names=names, checksum=checksum, unknown=unknown, cut=cut)
            for key, (first, names, checksum, unknown, cut) in places.items()
        },
    )


def commit(folder: str | Path, parts: Sequence[Part]) -> Manifest:
    """Add parts to the manifest, atomically and under a lock so that two writers lose nothing, and return it."""
    folder = Path(folder)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = read_manifest(folder)
        files = dict(manifest.files) | {part.file: part.size for part in parts}
        places = dict(manifest.places)
        for part in parts:
            places |= part.places
        document = {
            "format": FORMAT,
            "files": files,
            "rows": {k: [p.file, p.first, p.names, p.checksum, p.unknown, p.cut] for k, p in places.items()},
        }
        temporary = folder / f".manifest-{os.getpid()}"
        with open(temporary, "w") as stream:
            json.dump(document, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, folder / "manifest.json")
        _fsync(folder)
    return Manifest(files=files, places=places)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a cache folder, without the rows whose file is gone or was cut short; empty if there is none.

    Raises: CacheError if it is damaged or of another format.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT:
            raise CacheError(f"{path} has format {document['format']}, not {FORMAT}; use another data.cache")
        present = {file: size for file, size in document["files"].items() if _size(folder / file) == size}
        places = {
            key: Place(file=file, first=first, names=tuple(names), checksum=checksum, unknown=unknown, cut=cut)
            for key, (file, first, names, checksum, unknown, cut) in document["rows"].items()
            if file in present
        }
    except FileNotFoundError:
        return Manifest(files={}, places={})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error!r}); delete it and start again, to encode it anew") from error
    return Manifest(files=present, places=places)


class EncodingCache:
    """Reads rows; cheap to make, one per process. Files stay mapped, the least recently used are let go."""

    def __init__(self, folder: str | Path, *, open_files: int = 64):
        self.folder = Path(folder)
        self._open_files = open_files
        self._files: OrderedDict[str, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._verified: set[str] = set()
        self._manifest = Manifest(files={}, places={})

    def row(self, key: str) -> dict[str, Tensor]:
        """The tensors of a row by name, in the dtypes that they were computed in; copies, for the caller to keep.

        Raises: CacheError for a row that was not encoded or whose file is damaged.
        """
        return {
            name: torch.from_numpy(view.data.copy()).view(DTYPES[view.dtype]).view(view.shape)
            for name, view in self._views(key).items()
        }

    def _views(self, key: str) -> dict[str, "_View"]:
        place = self._place(key)
        reader = self._reader(place.file)
        views: dict[str, _View] = {}
        checksum = xxhash.xxh3_128()
        try:
            for index, name in enumerate(place.names, start=place.first):
                batch = reader.get_batch(index)
                batch.validate(full=key not in self._verified)
                if batch.num_rows != 1 or batch["key"][0].as_py() != key or batch["name"][0].as_py() != name:
                    raise ValueError(f"record batch {index} is not {name} of {key}")
                data = np.frombuffer(batch["data"][0].as_buffer(), dtype=np.uint8)
                views[name] = _View(dtype=batch["dtype"][0].as_py(), shape=tuple(batch["shape"][0].as_py()), data=data)
                if key not in self._verified:
                    checksum.update(_head(name, views[name].dtype, views[name].shape))
                    checksum.update(data.data)
            if key not in self._verified and checksum.hexdigest() != place.checksum:
                raise ValueError(f"checksum {checksum.hexdigest()}, expected {place.checksum}")
        except (pa.ArrowException, ValueError, TypeError, OSError) as error:
            path = self.folder / place.file
            raise CacheError(
                f"{path} is damaged at row {key} ({error}); delete it and start again, to encode it anew"
            ) from error
        self._verified.add(key)
        return views

    def _place(self, key: str) -> Place:
        if key not in self._manifest.places:
            self._manifest = read_manifest(self.folder)
        if key not in self._manifest.places:
            raise CacheError(f"row {key} is not in the cache {self.folder}; start again: what is missing is encoded")
        return self._manifest.places[key]

    def _reader(self, file: str) -> pa.ipc.RecordBatchFileReader:
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        path = self.folder / file
        size, expected = _size(path), self._manifest.files[file]
        if size != expected:
            raise CacheError(f"{path} has {size} bytes, not {expected}; delete it and start again, to encode it anew")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowException, OSError) as error:
            raise CacheError(f"{path} is damaged ({error}); delete it and start again, to encode it anew") from error
        if not reader.schema.equals(SCHEMA, check_metadata=True):
            raise CacheError(f"{path} does not have the cache's schema; delete it and start again, to encode it anew")
        self._files[file] = reader
        while len(self._files) > self._open_files:
            self._files.popitem(last=False)
        return reader


@dataclass(frozen=True, kw_only=True)
class _View:
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    """The tensor's bytes in the mapped file."""


def _head(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {list(shape)}\n".encode()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _size(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
