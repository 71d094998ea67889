"""Encodings in batches: of one kind and one set of geometries each, and always of one size, so that a row's bits do not
depend on how many others there are to encode."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from rlhf.data.sources import ReadColumn, media_of, read_held
from rlhf.models.family import Codec
from rlhf.types import Encoded, Encoding


def grouped(encodings: Iterable[Encoding]) -> list[list[Encoding]]:
    """Each encoding once, those of one kind and one set of geometries, which may share a batch, together."""
    groups: dict[Hashable, dict[Encoding, None]] = {}
    for encoding in encodings:
        groups.setdefault((encoding.kind, encoding.geometries), {})[encoding] = None
    return [list(group) for group in groups.values()]


def encode_group(
    codec: Codec, encodings: Sequence[Encoding], media: Mapping[Encoding, Sequence[Tensor]], batch_size: int
) -> Iterator[tuple[Encoding, Encoded]]:
    """The rows of encodings that may share a batch; short batches are padded with the last of them."""
    for start in range(0, len(encodings), batch_size):
        batch = encodings[start : start + batch_size]
        padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        rows = codec.encode(padded, [media[encoding] for encoding in padded])
        yield from zip(batch, rows, strict=False)


def encode_all(
    codec: Codec, encodings: Iterable[Encoding], batch_size: int, read: ReadColumn = read_held
) -> dict[Encoding, Mapping[str, Tensor]]:
    """The tensors of `encode_rows`."""
    return {encoding: row.tensors for encoding, row in encode_rows(codec, encodings, batch_size, read).items()}


def encode_rows(
    codec: Codec, encodings: Iterable[Encoding], batch_size: int, read: ReadColumn = read_held
) -> dict[Encoding, Encoded]:
    """The rows of any encodings, their media opened here. Raises: OSError, Refused for a medium that has changed."""
    rows: dict[Encoding, Encoded] = {}
    for group in grouped(encodings):
        media = {encoding: media_of(encoding, read) for encoding in group}
        rows |= encode_group(codec, group, media, batch_size)
    return rows
