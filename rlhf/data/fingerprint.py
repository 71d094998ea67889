"""What a set of encoder folders contains, as one hash: the model's part of every cache key.

Hashes the bytes of the files, so that a retrained or replaced encoder under an unchanged path is a miss and a copy of
the same encoder elsewhere is a hit. A file is read once per process while its size and modification time stay the same.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import xxhash

from rlhf.errors import Refused
from rlhf.models.family import Family

_CHUNK = 16 * 2**20


class IncompleteModel(Refused):
    """A folder of the model is missing or empty."""


def fingerprint(model: str | Path, folders: Sequence[str], *settings: str) -> str:
    """xxh3-128 of the names and bytes of all files in `model`/`folders`, and of `settings` such as the compute dtype.

    Raises: IncompleteModel.
    """
    digest = xxhash.xxh3_128()
    for setting in settings:
        digest.update(f"{setting}\n".encode())
    for folder in folders:
        root = Path(model) / folder
        files = sorted(file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise IncompleteModel(f"model.path = {str(model)!r}: {root} is missing or empty; give a whole model folder")
        for file in files:
            status = file.stat()
            content = _content(str(file.resolve()), status.st_size, status.st_mtime_ns)
            digest.update(f"{folder}/{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def fingerprints(family: Family) -> dict[str, str]:
    """Of every kind of encoding of a family: its encoders' content, dtype and settings. Reads their files once.

    Raises: IncompleteModel.
    """
    name = type(family).__qualname__
    return {
        kind: fingerprint(family.path, what.folders, name, str(what.dtype), *what.settings)
        for kind, what in family.kinds.items()
    }


@cache
def _content(path: str, size: int, mtime_ns: int) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
