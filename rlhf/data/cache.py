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
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from rlhf.errors import Refused
from rlhf.runs.durable import durable
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
OPEN_FILES = 64
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
class Manifest:
    """The rows of a cache folder by key, and the size in bytes of each file; of some files, not yet committed, too."""

    files: Mapping[str, int]
    places: Mapping[str, Place]


def write_part(folder: str | Path, rows: Mapping[str, Encoded]) -> Manifest:
    """Write rows, by key, as one file, complete and on disk when this returns; `commit` makes it visible."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, Place] = {}
    whole = xxhash.xxh3_128()
    batches: list[pa.RecordBatch] = []
    for key, row in rows.items():
        checksum = xxhash.xxh3_128()
        first = len(batches)
        for name, tensor in row.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise ValueError(f"{name} of row {key} is {dtype}; the cache keeps {', '.join(DTYPES)}")
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            checksum.update(_head(name, dtype, tensor.shape))
            checksum.update(data)
            columns = {"key": key, "name": name, "dtype": dtype, "shape": list(tensor.shape), "data": data}
            batches.append(pa.RecordBatch.from_pylist([columns], schema=SCHEMA))
        whole.update(f"{key} {checksum.hexdigest()} {row.unknown} {row.cut}\n".encode())
        names, digest = tuple(row.tensors), checksum.hexdigest()
        places[key] = Place(file="", first=first, names=names, checksum=digest, unknown=row.unknown, cut=row.cut)
    file = folder / f"part-{whole.hexdigest()}.arrow"
    with durable(file) as beside, pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    found = {key: replace(place, file=file.name) for key, place in places.items()}
    return Manifest(files={file.name: file.stat().st_size}, places=found)


def commit(folder: str | Path, parts: Sequence[Manifest]) -> Manifest:
    """Add parts to the manifest, atomically and under a lock so that two writers lose nothing, and return it."""
    folder = Path(folder)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifests = [read_manifest(folder), *parts]
        files = {file: size for some in manifests for file, size in some.files.items()}
        places = {key: place for some in manifests for key, place in some.places.items()}
        document = {
            "format": FORMAT,
            "files": files,
            "rows": {k: [p.file, p.first, p.names, p.checksum, p.unknown, p.cut] for k, p in places.items()},
        }
        with durable(folder / "manifest.json") as manifest:
            manifest.write_text(json.dumps(document))
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
        raise _damaged(path, f"is damaged ({error!r})") from error
    return Manifest(files=present, places=places)


class EncodingCache:
    """The rows of one model in a folder; cheap to make, and to send to another process, which opens its own files.

    Files stay mapped; the least recently used are let go.
    """

    def __init__(self, folder: str | Path, fingerprints: Mapping[str, str]):
        """fingerprints: of the model's encoders by kind, see `rlhf.data.fingerprint`."""
        self.folder = Path(folder)
        self._fingerprints = fingerprints
        self._files: OrderedDict[str, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._verified: set[str] = set()
        self._manifest = Manifest(files={}, places={})

    def __reduce__(self):
        return EncodingCache, (self.folder, self._fingerprints)

    def key(self, encoding: Encoding) -> str:
        """Of an encoding's row: all that decides its values, and so not where a medium lies."""
        sources = [
            [s.content, s.fit, s.mirrored, s.crop, *([list(astuple(s.clip))] if s.clip else [])]
            for s in encoding.sources
        ]
        geometries = [[g.height, g.width, g.frames] for g in encoding.geometries]
        parts = [encoding.kind, encoding.text, sources, geometries, self._fingerprints[encoding.kind]]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def row(self, encoding: Encoding) -> dict[str, Tensor]:
        """The tensors of an encoding's row by name, in the dtypes that they were computed in; copies, for the caller to keep.

        Raises: CacheError for a row that was not encoded or whose file is damaged.
        """
        key = self.key(encoding)
        place = self._place(key)
        reader = self._reader(place.file)
        known = key in self._verified
        found: dict[str, tuple[np.ndarray, str, list[int]]] = {}  # bytes in the mapped file, dtype, shape
        checksum = xxhash.xxh3_128()
        try:
            for index, name in enumerate(place.names, start=place.first):
                batch = reader.get_batch(index)
                batch.validate(full=not known)
                if batch.num_rows != 1 or batch["key"][0].as_py() != key or batch["name"][0].as_py() != name:
                    raise ValueError(f"record batch {index} is not {name} of {key}")
                data = np.frombuffer(batch["data"][0].as_buffer(), dtype=np.uint8)
                dtype, shape = batch["dtype"][0].as_py(), batch["shape"][0].as_py()
                if not known:
                    checksum.update(_head(name, dtype, shape))
                    checksum.update(data.data)
                found[name] = data, dtype, shape
            if not known and checksum.hexdigest() != place.checksum:
                raise ValueError(f"checksum {checksum.hexdigest()}, expected {place.checksum}")
        except (pa.ArrowException, ValueError, TypeError, OSError) as error:
            raise _damaged(self.folder / place.file, f"is damaged at row {key} ({error})") from error
        self._verified.add(key)
        return {
            name: torch.from_numpy(data.copy()).view(DTYPES[dtype]).view(shape)
            for name, (data, dtype, shape) in found.items()
        }

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
            raise _damaged(path, f"has {size} bytes, not {expected}")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, f"is damaged ({error})") from error
        if not reader.schema.equals(SCHEMA, check_metadata=True):
            raise _damaged(path, "does not have the cache's schema")
        self._files[file] = reader
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return reader


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(f"{path} {what}; delete it and start again, to encode it anew")


def _head(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {list(shape)}\n".encode()


def _size(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
