"""Prompts, encodings and conditions of pictures that are in memory, for tests of families."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf.data.batches import ReadRow
from rlhf.data.batches import condition_of as condition_of_prompts
from rlhf.data.encoding import encode_media
from rlhf.data.media import fit_image
from rlhf.data.sources import open_source
from rlhf.types import Condition, Encoded, Encoding, Geometry, Prompt, Source


def prompts_of(texts: Sequence[str], geometry: Geometry, sources: int = 0) -> list[Prompt]:
    """Prompts whose sources are named after their place, "i.j"."""
    return [
        Prompt(
            key=str(i),
            instruction=text,
            sources=tuple(Source(path="", content=f"{i}.{j}", height=48, width=32) for j in range(sources)),
            geometry=geometry,
        )
        for i, text in enumerate(texts)
    ]


def encode_all(
    codec, encodings: Iterable[Encoding], pictures: Mapping[str, Tensor], batch: int = 4
) -> dict[Encoding, Encoded]:
    """Rows of encodings whose media are `pictures`, uint8 (F, H, W, 3) by the content of their source, stretched to size."""
    media = {
        encoding: [
            at(geometry, pictures[s.content]) for s, geometry in zip(encoding.sources, encoding.geometries, strict=True)
        ]
        for encoding in encodings
    }
    return encode_media(codec, media, batch)


def media_of(encoding: Encoding) -> list[Tensor]:
    """An encoding's sources, opened."""
    places = zip(encoding.sources, encoding.geometries, strict=True)
    return [torch.from_numpy(open_source(source, geometry)) for source, geometry in places]


def at(geometry: Geometry, medium: Tensor) -> Tensor:
    """A medium with as many frames as the geometry asks for, at its size."""
    assert len(medium) == geometry.frames
    frames = [fit_image(frame, geometry.height, geometry.width, "stretch") for frame in medium.numpy()]
    return torch.from_numpy(np.stack(frames))


def encode(codec, texts: Sequence[str]) -> list[Encoded]:
    """Rows of kind "text", in one batch."""
    return codec.encode([Encoding(kind="text", text=text) for text in texts], [[]] * len(texts))


def latents_of(family, codec, pictures: Tensor) -> Tensor:
    """x0 (B, C, …) of uint8 pictures (B, H, W, 3)."""
    geometry = Geometry(height=pictures.shape[1], width=pictures.shape[2])
    targets = [
        family.target(Source(path="", content=str(i), height=48, width=32), geometry) for i in range(len(pictures))
    ]
    rows = codec.encode(targets, [[picture[None]] for picture in pictures])
    return torch.stack([row.tensors["latents"] for row in rows])


def tensors_of(rows: Mapping[Encoding, Encoded]) -> ReadRow:
    """Rows that were encoded, for whoever makes conditions of them."""
    return {encoding: row.tensors for encoding, row in rows.items()}.__getitem__


def through_the_vae(vae, pictures: Tensor) -> Tensor:
    """What a VAE of diffusers makes of uint8 pictures (B, H, W, 3), 0 … 255."""
    with torch.no_grad():
        decoded = vae(pictures.permute(0, 3, 1, 2) / 127.5 - 1, sample_posterior=False).sample
    return ((decoded + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)


def condition_of(family, codec, texts: Sequence[str], pictures: Tensor | None = None) -> Condition:
    """The condition of texts and, where the family sees one, a source each of uint8 pictures (B, H, W, 3)."""
    if pictures is None or not max(family.source_counts):
        prompts, media = prompts_of(texts, Geometry(height=48, width=32)), {}
    else:
        prompts = prompts_of(texts, Geometry(height=pictures.shape[1], width=pictures.shape[2]), sources=1)
        media = {f"{i}.0": picture[None] for i, picture in enumerate(pictures)}
    rows = encode_all(codec, (e for prompt in prompts for e in family.encodings(prompt)), media, len(texts))
    return condition_of_prompts(family, tensors_of(rows), prompts)
