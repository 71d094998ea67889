"""Peak memory of what samples and encodes, told before anything starts: real code on tensors that have shapes and no data.

torch's `MemTracker` counts what is alive while one step is sampled and decoded, or one batch encoded. Only JSON files of the
model's folder are read. Left out: CUDA's own context and fragmentation.

Shapes: B batch, C latent channels, H W pixels.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoImageProcessor, BatchEncoding

from rlhf.models.family import Codec, Family
from rlhf.models.folder import LONGEST, Parts, read_value
from rlhf.models.trainable import Trainable
from rlhf.tables import SamplingTable
from rlhf.types import Condition, Prompt, Source

DEVICE = "cpu"
"""Of the tensors without data: their sizes are those of any device."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Of a process at its peak."""

    kinds: Mapping[str, int]
    """Bytes by what they hold."""

    @property
    def nbytes(self) -> int:
        return sum(self.kinds.values())


def without_data(network: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Turn what lies on the meta device in a network into tensors of `fake`; returns the network."""
    made: dict[int, Any] = {}  # what is tied stays so

    def turned(tensor: Any) -> Any:
        if tensor is None or not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            faked = FakeTensor(fake, tensor.data, torch.device(DEVICE))
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(faked, requires_grad=tensor.requires_grad) if is_parameter else faked
        return made[id(tensor)]

    for owner in [*network.modules()]:
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in [*tensors.items()]:
                tensors[name] = turned(tensor)
    return network


class _BlankTokenizer:
    """Every text is as long as the encoder takes, by tokenizer_config.json; a byte is a token where it sets no limit."""

    unk_token_id = 0

    def __init__(self, limit: int):
        self.model_max_length = limit

    def __call__(self, texts: str | Sequence[str], **settings: Any) -> Any:
        if isinstance(texts, str):
            return _ids([0] * self._length(texts))
        return _ids(torch.zeros(len(texts), max(map(self._length, texts)), dtype=torch.int64))

    def _length(self, text: str) -> int:
        return self.model_max_length if self.model_max_length <= LONGEST else len(text.encode())

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


class _BlankProcessor:
    """A text of as many tokens as its bytes and pictures have, and no pixels: what looks at them is smaller than what reads."""

    def __init__(self, image_processor: Any):
        self._image_processor = image_processor

    def __call__(self, text: Sequence[str], images: Sequence[Tensor], **settings: Any) -> Any:
        patches = sum(self._image_processor.get_number_of_image_patches(*image.shape[-2:], {}) for image in images)
        length = max(len(one.encode()) for one in text) + patches // self._image_processor.merge_size**2
        return _ids(torch.zeros(len(text), length, dtype=torch.int64))


def _ids(ids: Any) -> BatchEncoding:
    return BatchEncoding({"input_ids": ids, "attention_mask": ids})


class _BlankImageProcessor:
    """Pictures of the size that it cuts them to."""

    def __init__(self, cut: Mapping[str, int]):
        self._size = cut["height"], cut["width"]

    def __call__(self, images: Sequence[Tensor], **settings: Any) -> Any:
        return BatchEncoding({"pixel_values": torch.zeros(len(images), 3, *self._size)})


class EmptyParts(Parts):
    """The frozen parts of a folder with shapes and without data."""

    def __init__(self, path: Path, device: str, fake: FakeTensorMode):
        super().__init__(path, device)
        self._fake = fake

    def module(self, cls: Any, folder: str, dtype: torch.dtype) -> Any:
        with unset_fake_temporarily(), torch.device("meta"):  # codecs open some parts when first used
            if issubclass(cls, ModelMixin):
                empty = cls.from_config(cls.load_config(self.path, subfolder=folder))
            else:
                empty = cls(cls.config_class.from_pretrained(self.path, subfolder=folder))
            nn.Module.to(empty, dtype).eval()
        return without_data(empty, self._fake)

    def processor(self, folder: str) -> Any:
        return _BlankProcessor(AutoImageProcessor.from_pretrained(self.path, subfolder=folder))

    def image_processor(self, folder: str) -> Any:
        return _BlankImageProcessor(read_value(self.path, f"{folder}/preprocessor_config.json", "crop_size"))

    def tokenizer(self, folder: str) -> Any:
        return _BlankTokenizer(read_value(self.path, f"{folder}/tokenizer_config.json", "model_max_length"))


def empty_condition(family: Family, prompt: Prompt, size: int) -> Condition:
    """The condition of a prompt `size` times, all zeros."""
    rows = [
        {name: torch.zeros_like(tensor, device=DEVICE) for name, tensor in family.empty_row(encoding).items()}
        for encoding in family.encodings(prompt)
    ]
    return family.condition([rows] * size, family.bucket(prompt))


def _hookable(network: nn.Module) -> nn.Module:
    """With a gradient for every parameter, since the tracker puts hooks on them; those that can have none become buffers."""
    for owner in network.modules():
        for name, parameter in [*owner._parameters.items()]:
            if parameter is not None and not parameter.is_floating_point():
                del owner._parameters[name]
                owner.register_buffer(name, parameter.data)
    return network.requires_grad_(True)


def sampler_peak(family: Family, trainable: Trainable, sampling: SamplingTable, prompt: Prompt) -> Peak:
    """Of one batch of `prompt`: a step of the denoiser, then the decoder."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    denoiser = family.empty_denoiser(family.dtype)
    trainable.add(denoiser, (), family.dtype)
    without_data(_hookable(denoiser.eval()), fake)
    family.finish(denoiser, DEVICE)
    codec, size, scale = _codec(family, fake), sampling.batch_size, sampling.guidance_scale
    with fake, Tracing(denoiser, *modules_of(codec)) as tracing:
        x, t = torch.zeros(size, *family.latent_shape(prompt.geometry)), torch.ones(size)
        other = family.unguided(prompt) if family.needs_unguided(scale) else None
        condition = empty_condition(family, prompt, size)
        unguided = empty_condition(family, other, size) if other else None
        family.guided(denoiser, x, t, condition, unguided, guidance_scale=scale, step=0, state={})
        codec.decode(x)
    return tracing.peak(denoiser, *modules_of(codec))


def forward_flops(family: Family, prompt: Prompt) -> int:
    """Floating-point operations of one prediction for one prompt."""
    fake, aten = FakeTensorMode(allow_non_fake_inputs=True), torch.ops.aten
    denoiser = without_data(family.empty_denoiser(family.dtype).eval(), fake)
    family.finish(denoiser, DEVICE)
    # torch's counter does not know what attention is called on a CPU.
    of_attention = {aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}
    with fake, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=of_attention) as counter:
        x, t = torch.zeros(1, *family.latent_shape(prompt.geometry)), torch.ones(1)
        family.predict(denoiser, x, t, empty_condition(family, prompt, 1))
    return counter.get_total_flops()


def encoder_peak(family: Family, batch_size: int, prompt: Prompt) -> Peak:
    """Of a batch of each kind of encoding that `prompt` and what is made of it have."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    codec = _codec(family, fake)
    height, width = prompt.geometry.height, prompt.geometry.width
    target = family.target(Source(path="", content="", height=height, width=width), prompt.geometry)
    groups = {(e.kind, e.geometries): e for e in (*family.encodings(prompt), target)}  # what may share a batch

    def encode(count: int) -> None:
        for encoding in groups.values():
            media = [torch.zeros(g.frames, g.height, g.width, 3, dtype=torch.uint8) for g in encoding.geometries]
            codec.encode([encoding] * count, [media] * count)

    with fake:
        encode(1)  # opens the parts
        with Tracing(*modules_of(codec)) as tracing:
            encode(batch_size)
    return tracing.peak(*modules_of(codec))


def _codec(family: Family, fake: FakeTensorMode) -> Codec:
    return family.load_codec(DEVICE, partial(EmptyParts, fake=fake))


def modules_of(holder: object) -> list[nn.Module]:
    """The networks that an object holds itself, in lists and tuples too."""
    found, waiting = [], [*vars(holder).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            waiting += value
    return found


class _Tracker(MemTracker):
    """Keeps the peak of the whole alone: torch looks at every module after every operation, minutes for thousands of them."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        """torch's allows one call of a part that lies in no other; guidance calls two, a VAE one for every few frames."""
        if not set(self._mod_tracker.parents) - {self._mod_tracker.get_known_fqn(module), "Global"}:
            self.reset_mod_stats()
        super()._pre_fw_hook(module, inputs)


class Tracing(ExitStack):
    """Counts bytes inside the block, without gradients."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.tracker = _Tracker()
        self.tracker.track_external(*modules)
        for context in (torch.no_grad(), self.tracker):
            self.enter_context(context)

    def peak(self, *modules: nn.Module) -> Peak:
        """modules: all that were used."""
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        weights = sum(tensor.nbytes for tensor in tensors)
        whole = self.tracker.get_tracker_snapshot("peak")[torch.device(DEVICE)]["Total"]
        return Peak(kinds={"parameters": weights, "activations": whole - weights})
