"""The sampler: a denoiser and a codec on one device, for rollouts, held-out prompts and evaluations.

In a run it starts empty and takes published weights: before its first `load` it refuses to sample, so a restarted actor can
never sample with old weights. In an evaluation it takes weights from files. Left out: queueing and health, which are the
driver's (`fleet.py`).

Shapes: B batch, C latent channels, F frames, H W pixels, h w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from rlhf.data.batches import CachePlace, latents_from_array, latents_to_array
from rlhf.data.media import encode_png
from rlhf.data.sampler import encoded_now, sample_prompts
from rlhf.data.sources import seen_source
from rlhf.models import load_family
from rlhf.models.trainable import Trainable, load_for_sampling
from rlhf.shards import buffers
from rlhf.shards.buffers import BufferManifest
from rlhf.tables import ModelTable, SamplingTable, WeightsTable
from rlhf.types import Prompt


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One picture to sample: its prompt, the seed of its starting noise, and its place in a batch."""

    prompt: Prompt
    noise_seed: int
    slot: int


class Sampler:
    """`load(version, …)` or `use(weights)`, then `sample(requests)`. One call at a time: a load falls between two batches."""

    def __init__(
        self,
        model: ModelTable,
        sampling: SamplingTable,
        device: str,
        *,
        trainable: Trainable | None = None,
        cache: CachePlace | None = None,
    ):
        """trainable: what `load` takes weights of; cache: where conditions are, else they are encoded here."""
        self._sampling, self._device, self._trainable = sampling, device, trainable
        self._family = load_family(model)
        self._codec = self._family.load_codec(device)
        self._cached = cache.open() if cache else None
        self._version: int | None = None
        self._weights: WeightsTable | None = None
        self._denoiser: torch.nn.Module | None = None

    def ready(self) -> bool:
        return True

    # --- weights -------------------------------------------------------------------------------------------------------

    def load(
        self, version: int, manifests: Sequence[BufferManifest], *arrays: np.ndarray
    ) -> tuple[int, tuple[int, ...], float]:
        """Copy a publication in; returns its version, the checksums of the bytes read back, and the seconds taken.

        Ray brings `arrays` to this node while the sampler still works on its last batch. Raises ValueError when the
        publication does not cover every trained parameter completely.
        """
        started = monotonic()
        self._version = None
        parameters = self._published()
        rows = dict.fromkeys(parameters, 0)
        for manifest, array in zip(manifests, arrays, strict=True):
            buffers.load(parameters, array, manifest)
            for piece in manifest.slices:
                rows[piece.name] += piece.stop - piece.start
        missing = [name for name, count in rows.items() if count != parameters[name].shape[0]]
        if missing:
            raise ValueError(f"publication {version} leaves {len(missing)} parameters incomplete, first {missing[0]!r}")
        read_back = tuple(buffers.checksum(parameters, manifest) for manifest in manifests)
        self._version = version
        return version, read_back, monotonic() - started

    def _published(self) -> dict[str, Tensor]:
        """The parameters that a publication fills, by their published names."""
        assert self._trainable is not None, "this sampler takes weights from files"
        if self._denoiser is None:
            self._denoiser = load_for_sampling(self._family, self._trainable, self._device)
        return dict(self._trainable.trained(self._denoiser))

    def use(self, weights: WeightsTable) -> None:
        """Take weights from files, the base's own where none are named."""
        if weights == self._weights:
            return
        self._weights, self._denoiser, self._version = None, None, None  # first: two are never in memory
        folder, lora = (Path(path) if path else None for path in (weights.denoiser, weights.lora))
        self._denoiser = self._family.load_denoiser(self._device, folder, lora)
        self._weights, self._version = weights, 0

    # --- pictures ------------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[SampleRequest]) -> list[object]:
        """[version, medium 0, latents 0, medium 1, …]: uint8 (F, H, W, 3) and bf16-as-int16 (C, …) per request.

        All requests are of one bucket and have different slots.
        """
        stored = [latents_to_array(latents) for latents in self._x0(requests)]
        # The medium shows exactly the latents that training will see: decode what was rounded to bf16.
        media = self._decode(torch.stack([latents_from_array(array) for array in stored]))
        results: list[object] = [self._version]
        for request in requests:
            results += [media[request.slot].copy(), stored[request.slot]]
        return results

    def paint(
        self, weights: WeightsTable, requests: Sequence[SampleRequest], files: Sequence[Path], sources: Sequence[Path]
    ) -> int:
        """Sample with these weights into PNG files, one per request; returns how many.

        sources: where each prompt's first source goes, as the model sees it; empty where there is none.
        """
        self.use(weights)
        media = self._decode(self._x0(requests))
        for request, file in zip(requests, files, strict=True):
            save(file, media[request.slot][0])
        for request, file in zip(requests, sources, strict=False):
            prompt = request.prompt
            save(file, seen_source(prompt.sources[0], prompt.geometry)[0])
        return len(requests)

    def _x0(self, requests: Sequence[SampleRequest]) -> Tensor:
        """(batch_size, C, …) fp32, each request at its slot."""
        if self._version is None or self._denoiser is None:
            raise RuntimeError("this sampler has loaded no weights yet")
        prompts = [request.prompt for request in requests]
        return sample_prompts(
            self._family,
            self._denoiser,
            self._cached or encoded_now(self._family, self._codec, prompts, self._sampling),
            self._sampling,
            self._device,
            prompts=prompts,
            noise_seeds=[request.noise_seed for request in requests],
            slots=[request.slot for request in requests],
        )

    def _decode(self, x0: Tensor) -> np.ndarray:
        """uint8 (B, F, H, W, 3)."""
        return self._codec.decode(x0.to(self._device)).numpy()


def save(file: Path, picture: np.ndarray) -> None:
    """A PNG of uint8 (H, W, 3) that is either whole or absent."""
    partial = file.with_name(f".{file.name}.{uuid4().hex}")  # several samplers may save one source
    partial.write_bytes(encode_png(picture))
    partial.replace(file)
