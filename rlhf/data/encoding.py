"""Encodings in batches: of one kind and one set of geometries each, and always of one size, so that a row's bits do not
depend on how many others there are to encode."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rlhf.data.sources import ReadColumn, open_source, read_held
from rlhf.models.family import Codec
from rlhf.types import Encoded, Encoding


def encode_media(codec: Codec, media: Mapping[Encoding, Sequence[Tensor]], batch_size: int) -> dict[Encoding, Encoded]:
    """The rows of encodings, given with their sources, uint8 (F, H, W, 3) each; short batches are padded with their last."""
    groups: dict[Hashable, list[Encoding]] = {}
    for encoding in media:
        groups.setdefault((encoding.kind, encoding.geometries), []).append(encoding)
    rows: dict[Encoding, Encoded] = {}
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]
            rows |= zip(batch, codec.encode(padded, [media[encoding] for encoding in padded]), strict=False)
    return rows


def encode_all(
    codec: Codec, encodings: Iterable[Encoding], batch_size: int, read: ReadColumn = read_held
) -> dict[Encoding, Mapping[str, Tensor]]:
    """The tensors of `encode_rows`."""
    return {encoding: row.tensors for encoding, row in encode_rows(codec, encodings, batch_size, read).items()}


def encode_rows(
    codec: Codec, encodings: Iterable[Encoding], batch_size: int, read: ReadColumn = read_held
) -> dict[Encoding, Encoded]:
    """The rows of any encodings, their media opened here. Raises: OSError, Refused for a medium that has changed."""
    media = {
        encoding: [
            torch.from_numpy(open_source(source, geometry, read))
            for source, geometry in zip(encoding.sources, encoding.geometries, strict=True)
        ]
        for encoding in dict.fromkeys(encodings)
    }
    return encode_media(codec, media, batch_size)
