"""A sampler: the whole denoiser and the VAE on one device; it denoises batches of candidates with the published weights.

It starts empty: before its first `load` it refuses to sample, so a restarted actor can never sample with old weights.
Left out: queueing and health, which are the driver's (`rollouts.py`, `health.py`).

Shapes: B batch, C latent channels, H W pixels, h w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch

from rlhf.data.batches import latents_from_array, latents_to_array
from rlhf.data.cache import ConditionCache
from rlhf.models import load_family, lora
from rlhf.models.sampling import sample
from rlhf.shards import buffers
from rlhf.shards.buffers import BufferManifest
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Prompt, noise_from


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One candidate to sample: its prompt and the seed of its starting noise."""

    prompt: Prompt
    noise_seed: int


def load_sampler_model(config: OnlineDPOConfig, device: str):
    """(family, denoiser, codec) as a sampler has them: LoRA runs get the policy's adapter, in the compute dtype."""
    family = load_family(config.model, config.trainer.mixed_precision, config.rollout.guidance_scale)
    denoiser = family.load_denoiser(device)
    if config.trainer.lora:
        lora.add_adapters(denoiser, config.trainer.lora, family.lora_targets, (lora.POLICY,), family.dtype)
        denoiser.to(device).requires_grad_(False)
    return family, denoiser, family.load_codec(device)


class Sampler:
    """`load(version, …)` then `sample(requests)`. One at a time: a load falls between two batches."""

    def __init__(self, config: OnlineDPOConfig, device: str):
        self.config, self.device = config, device
        self.version: int | None = None
        self.family, self.denoiser, self.codec = load_sampler_model(config, device)
        names = dict(self.denoiser.named_parameters())
        self.parameters = {n: p for n, p in names.items() if lora.is_adapter(n)} if config.trainer.lora else names
        self.cache = ConditionCache(Path(config.data.cache))

    def ready(self) -> bool:
        return True

    def load(
        self, version: int, manifests: Sequence[BufferManifest], *arrays: np.ndarray
    ) -> tuple[int, tuple[int, ...], float]:
        """Copy a publication in; returns its version, the checksums of the bytes read back, and the seconds taken.

        Ray brings `arrays` to this node while the sampler still works on its last batch. Raises ValueError when the
        publication does not cover every trained parameter completely.
        """
        started = monotonic()
        self.version = None
        rows = {name: 0 for name in self.parameters}
        for manifest, array in zip(manifests, arrays, strict=True):
            buffers.load(self.parameters, array, manifest)
            for piece in manifest.slices:
                rows[piece.name] += piece.stop - piece.start
        missing = [name for name, count in rows.items() if count != self.parameters[name].shape[0]]
        if missing:
            raise ValueError(f"publication {version} leaves {len(missing)} parameters incomplete, first {missing[0]!r}")
        read_back = tuple(buffers.checksum(self.parameters, manifest) for manifest in manifests)
        self.version = version
        return version, read_back, monotonic() - started

    def sample(self, requests: Sequence[SampleRequest]) -> list[object]:
        """[version, image 0, latents 0, image 1, …]: uint8 (H, W, 3) and bf16-as-int16 (C, h, w) per request.

        All requests must be of one picture size. Short batches are padded to `rollout.batch_size` with copies of the
        last prompt and zero noise, so that a candidate never depends on its neighbours.
        """
        if self.version is None:
            raise RuntimeError("this sampler has loaded no weights yet")
        padding = self.config.rollout.batch_size - len(requests)
        prompts = [request.prompt for request in requests]
        shape = self.family.latent_shape(prompts[0].height, prompts[0].width)
        noise = torch.stack([noise_from(request.noise_seed, shape) for request in requests])
        noise = torch.cat([noise, noise.new_zeros(padding, *shape)]).to(self.device)
        condition = self.cache.condition([*prompts, *[prompts[-1]] * padding])
        condition = {name: tensor.to(self.device) for name, tensor in condition.items()}
        x0 = sample(self.family, self.denoiser, condition, noise, self.config.rollout.steps)
        stored = [latents_to_array(latents) for latents in x0]
        # The picture shows exactly the latents that training will see: decode what was rounded to bf16.
        rounded = torch.stack([latents_from_array(array) for array in stored]).to(self.device)
        images = self.codec.decode(rounded).numpy()
        results: list[object] = [self.version]
        for i in range(len(requests)):
            results += [images[i].copy(), stored[i]]
        return results
