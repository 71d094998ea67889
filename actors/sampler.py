"""The sampler: a denoiser and a codec on one device, for rollouts, held-out prompts and evaluations.

Before it has weights it refuses to sample, so a restarted actor can never sample with old ones. Left out: queueing and health,
which are the driver's (`fleet.py`).

Shapes: B batch, C latent channels, F frames, H W pixels, h w latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf.data.batches import ReadRow, latents_from_array, latents_to_array
from rlhf.data.cache import EncodingCache
from rlhf.data.clips import write_mp4
from rlhf.data.instructions import Unread, unread
from rlhf.data.media import encode_png
from rlhf.data.sampler import encoded_now, sample_prompts
from rlhf.data.sources import open_source, seen_source
from rlhf.errors import NotFinite
from rlhf.models import load_family
from rlhf.models.trainable import Trainable, load_for_sampling
from rlhf.runs.sheets import contact_sheet, strip
from rlhf.shards import buffers
from rlhf.shards.buffers import BufferManifest
from rlhf.tables import ModelTable, SamplingTable, WeightsTable
from rlhf.types import Encoded, Encoding, Prompt


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One picture to sample: its prompt, the seed of its starting noise, and its place in a batch."""

    prompt: Prompt
    noise_seed: int
    slot: int


Painting = tuple[SampleRequest, Path, Path | None]
"""A request, where its picture goes and, where that is wanted, its prompt's first source as the model sees it."""


class Sampler:
    """`load(version, …)` or `use(weights)`, then `sample(requests)`. One call at a time: a load falls between two batches."""

    def __init__(
        self,
        model: ModelTable,
        sampling: SamplingTable,
        device: str,
        *,
        trainable: Trainable | None = None,
        cache: EncodingCache | None = None,
        codec_device: str | None = None,
    ):
        """trainable: what `load` takes weights of; cache: where `sample` finds conditions. `paint` encodes what it needs.

        codec_device: of the encoders and the VAE; None: where the denoiser is.
        """
        self._model, self._sampling, self._device, self._trainable = model, sampling, device, trainable
        self._family = load_family(model)
        self._codec = self._family.load_codec(codec_device or device)
        self._cache = cache
        self._version: int | None = None
        self._weights: WeightsTable | None = None
        self._denoiser: torch.nn.Module | None = None

    def load(
        self, version: int, manifests: Sequence[BufferManifest], *arrays: np.ndarray
    ) -> tuple[int, tuple[int, ...]]:
        """Copy a publication in; returns its version and the checksums of the bytes read back. Ray brings `arrays` here while
        the last batch is sampled. Raises ValueError when they do not cover every trained parameter completely.
        """
        self._version = None
        assert self._trainable is not None, "this sampler takes weights from files"
        if self._denoiser is None:
            self._denoiser = load_for_sampling(self._family, self._trainable, self._device)
        parameters = dict(self._trainable.trained(self._denoiser))
        rows = dict.fromkeys(parameters, 0)
        for manifest, array in zip(manifests, arrays, strict=True):
            buffers.load(parameters, array, manifest)
            for piece in manifest.slices:
                rows[piece.name] += piece.stop - piece.start
        if missing := [name for name, count in rows.items() if count != parameters[name].shape[0]]:
            raise ValueError(f"publication {version} leaves {len(missing)} parameters incomplete, first {missing[0]!r}")
        read_back = tuple(buffers.checksum(parameters, manifest) for manifest in manifests)
        self._version = version
        return version, read_back

    def use(self, weights: WeightsTable) -> None:
        """Take weights from files, the base's own where none are named."""
        if weights == self._weights:
            return
        self._weights, self._denoiser, self._version = None, None, None  # first: two are never in memory
        folder, lora = (Path(path) if path else None for path in (weights.denoiser, weights.lora))
        self._denoiser = self._family.load_denoiser(self._device, folder, lora)
        self._weights, self._version = weights, 0

    def sample(self, requests: Sequence[SampleRequest]) -> list[object]:
        """[version, medium 0, latents 0, medium 1, …]: uint8 (F, H, W, 3) and bf16-as-int16 (C, …) per request, which are all
        of one bucket and have different slots. Raises NotFinite.
        """
        row = self._cache.row if self._cache else _tensors(self._encoded(requests))
        with self._telling(requests):
            stored = [latents_to_array(latents) for latents in self._x0(requests, row)]
            # The medium shows exactly the latents that training will see: decode what was rounded to bf16.
            media = self._decode(torch.stack([latents_from_array(array) for array in stored]))
        shown = ((media[request.slot].copy(), stored[request.slot]) for request in requests)
        return [self._version, *chain(*shown)]

    def paint(self, weights: WeightsTable, paintings: Sequence[Painting]) -> Unread:
        """Sample with these weights into PNG files, videos into MP4 files with a PNG of references and frames beside each.

        Returns what the encoders do not read of the instructions.

        Raises NotFinite.
        """
        self.use(weights)
        requests = [request for request, _, _ in paintings]
        rows = self._encoded(requests)
        with self._telling(requests):
            media = self._decode(self._x0(requests, _tensors(rows)))
        for request, file, source in paintings:
            if len(media[request.slot]) > 1:
                write_mp4(file, media[request.slot])
                save(file.with_suffix(".png"), np.asarray(sheet_of(request.prompt, media[request.slot])))
            else:
                save(file, media[request.slot][0])
            if source:
                save(source, seen_source(request.prompt.sources[0], request.prompt.geometry)[0])
        found = Unread()
        for request in requests:
            found |= unread(request.prompt, map(rows.__getitem__, self._family.encodings(request.prompt)))
        return found

    def _encoded(self, requests: Sequence[SampleRequest]) -> Mapping[Encoding, Encoded]:
        return encoded_now(self._family, self._codec, [request.prompt for request in requests], self._sampling)

    @contextmanager
    def _telling(self, requests: Sequence[SampleRequest]) -> Iterator[None]:
        """A NotFinite says which prompts and weights gave it."""
        try:
            yield
        except NotFinite as error:
            keys = ", ".join(repr(request.prompt.key) for request in requests if request.slot in error.rows)
            raise NotFinite(f"no picture of {keys or 'the batch'} with {self._named_weights()}: {error}") from error

    def _named_weights(self) -> str:
        """For people, by the key that they come from."""
        if self._weights is None:
            return f"published version {self._version} of the trained weights"
        base = {"model.denoiser": self._model.denoiser} if self._model.denoiser else {"model.path": self._model.path}
        tuned = {f"tuned.{key}": path for key, path in self._weights.model_dump(exclude_none=True).items()}
        return ", ".join(f"{key} = {path!r}" for key, path in (tuned or base).items())

    def _x0(self, requests: Sequence[SampleRequest], row: ReadRow) -> Tensor:
        """(batch_size, C, …) fp32, each request at its slot."""
        if self._version is None or self._denoiser is None:
            raise RuntimeError("this sampler has loaded no weights yet")
        return sample_prompts(
            self._family,
            self._denoiser,
            row,
            self._sampling,
            self._device,
            prompts=[request.prompt for request in requests],
            noise_seeds=[request.noise_seed for request in requests],
            slots=[request.slot for request in requests],
        )

    def _decode(self, x0: Tensor) -> np.ndarray:
        """uint8 (B, F, H, W, 3)."""
        return self._codec.decode(x0.to(self._device)).numpy()


def _tensors(rows: Mapping[Encoding, Encoded]) -> ReadRow:
    return lambda encoding: rows[encoding].tensors


def sheet_of(prompt: Prompt, frames: np.ndarray) -> Image.Image:
    """A prompt's references and some frames, uint8 (F, H, W, 3), of what was made of it."""
    shown = [(open_source(source)[0], "reference") for source in prompt.sources]
    return contact_sheet([[*shown, (strip(frames), prompt.instruction)]])


def save(file: Path, picture: np.ndarray) -> None:
    """A PNG of uint8 (H, W, 3) that is either whole or absent."""
    partial = file.with_name(f".{file.name}.{uuid4().hex}")  # several samplers may save one source
    partial.write_bytes(encode_png(picture))
    partial.replace(file)
