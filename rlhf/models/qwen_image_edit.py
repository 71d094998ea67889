"""Qwen-Image-Edit (and -2509, -2511), and Qwen-Image, which paints from a text: a rectified flow told by a vision-language model.

Any folder in the diffusers layout works. Its model_index.json says how a prompt is put (`VERSIONS`) and its config.json what the
network does (2511: `zero_cond_t`). Conventions follow diffusers' `QwenImagePipeline`, `QwenImageEditPipeline` and
`QwenImageEditPlusPipeline` (see their documentation), against which they are tested, but for two:

- The encoder is given all that its processor makes. The pipelines leave out `mm_token_type_ids`, without which transformers 5
  numbers the tokens of a picture like words (diffusers issue 14194); the released weights were trained with M-RoPE.
- Sources are brought to the area of what is generated, each in its own aspect. The pipelines always take 1024².

Left out: Qwen-Image-Layered, ControlNet, inpainting, guidance distilled into the network.

Shapes: B batch, C latent channels (16), H W pixels, h w latents (H/8, W/8), L tokens read, D their width (3584).
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from rlhf.diffusion.process import RectifiedFlow
from rlhf.errors import Refused
from rlhf.models.family import Kind, Need, Rows, index, stacked, tokenizer
from rlhf.models.flow_scheduler import SCHEDULER, flow_of
from rlhf.models.folder import (
    LoadParts,
    Parts,
    check_axes,
    latent_shape,
    load_trained,
    read_value,
    to_images,
    to_pixels,
)
from rlhf.models.packing import pack, unpack
from rlhf.models.quantised import Base, quantise_layers
from rlhf.models.qwen_prompts import RESERVED, TEXT_TOKENS, VERSIONS, Version, padded, padded_text, put
from rlhf.shards.files import AGAIN, read_json
from rlhf.types import CENTRE, Condition, Encoded, Encoding, Geometry, Prompt, Source

STEP, PATCH = 32, 2
"""Pixels that a source's sides are multiples of; latents along one side of a token."""


class Bucket(NamedTuple):
    """What prompts of one batch share."""

    generated: Geometry
    sources: tuple[Geometry, ...]
    """As they are encoded, one after the other."""
    read: tuple[Geometry, ...]
    """As the vision-language model sees them."""
    text: int
    """Tokens that the text is padded to."""


def resized(source: Source, area: int) -> Geometry:
    """A source's size at about `area` pixels in its own aspect, as the pipelines' `calculate_dimensions`."""
    aspect = source.width / source.height
    width = math.sqrt(area * aspect)
    return Geometry(height=_stepped(width / aspect), width=_stepped(width))


def _stepped(side: float) -> int:
    return max(1, round(side / STEP)) * STEP


@dataclass(frozen=True, kw_only=True)
class QwenImageEdit:
    """The family of a folder. Training sees the conditional branch alone; a sampler is guided by both."""

    path: Path
    denoiser: Path | None = None
    """A trained folder in place of `path`/transformer."""
    guidance_scale: float = 4.0
    """1 or less runs the conditional branch only."""
    dtype: torch.dtype = torch.bfloat16
    base: Base = "bf16"

    blocks: ClassVar[tuple[type[torch.nn.Module], ...]] = (QwenImageTransformerBlock,)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    denoiser_folder: ClassVar[str] = "transformer"
    takes_negative_prompt: ClassVar[bool] = True

    @property
    def denoiser_path(self) -> Path:
        return self.denoiser or Path(self.path) / self.denoiser_folder

    @cached_property
    def version(self) -> Version:
        """model.accept_index takes other names: such a folder is read as the newest."""
        name = read_value(self.path, "model_index.json", "_class_name")
        return VERSIONS.get(name, VERSIONS["QwenImageEditPlusPipeline"])

    @property
    def source_counts(self) -> range:
        return range(self.version.most_sources + 1)

    @cached_property
    def process(self) -> RectifiedFlow:
        return flow_of(self.path)

    @cached_property
    def _vae(self) -> dict[str, Any]:
        return read_json(self.path / "vae" / "config.json")

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self.path / self.denoiser_folder / "config.json")

    @property
    def _vae_factor(self) -> int:
        return 2 ** len(self._vae["temperal_downsample"])

    def needs(self) -> Iterator[tuple[str, Need]]:
        yield "", index(*VERSIONS)
        yield "scheduler", SCHEDULER
        yield "vae", Need(network=AutoencoderKLQwenImage)
        channels = read_value(self.path, "vae/config.json", "z_dim")
        for name in ("latents_mean", "latents_std"):
            if len(found := read_value(self.path, "vae/config.json", name)) != channels:
                what = f"{name} has {len(found)} numbers, but z_dim = {channels}"
                raise Refused(f"{self.path / 'vae/config.json'}: {what}; {AGAIN}")
        yield "text_encoder", Need(network=Qwen2_5_VLForConditionalGeneration)
        yield "tokenizer", tokenizer("Qwen2Tokenizer")
        if self.version.most_sources:
            yield "processor", replace(tokenizer("Qwen2Tokenizer"), opens=AutoProcessor)
        width = Qwen2_5_VLConfig.from_pretrained(self.path / "text_encoder").text_config.hidden_size
        values = {
            "patch_size": (PATCH,),
            "in_channels": (PATCH**2 * channels,),
            "out_channels": (channels,),
            "joint_attention_dim": (width,),
            **dict.fromkeys(("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"), (None, False)),
        }
        yield self.denoiser_folder, Need(network=QwenImageTransformer2DModel, values=values)
        check_axes(self.path / self.denoiser_folder / "config.json")

    # --- the network

    def empty_denoiser(self, dtype: torch.dtype) -> QwenImageTransformer2DModel:
        with torch.device("meta"):
            denoiser = QwenImageTransformer2DModel.from_config(self._config)
        return quantise_layers(torch.nn.Module.to(denoiser, dtype), self.blocks, self.base)

    def finish(self, denoiser: torch.nn.Module, device: str) -> None:
        """The tables of RoPE, which are plain attributes."""
        for module in denoiser.modules():
            if isinstance(module, QwenEmbedRope):
                made = QwenEmbedRope(module.theta, module.axes_dim, module.scale_rope)
                module.pos_freqs, module.neg_freqs = made.pos_freqs, made.neg_freqs

    def load_denoiser(
        self, device: str, folder: Path | None = None, lora: Path | None = None
    ) -> QwenImageTransformer2DModel:
        return load_trained(self, QwenImageTransformer2DModel, folder, lora, device)

    def load_codec(self, device: str, parts: LoadParts = Parts) -> "QwenImageCodec":
        return QwenImageCodec(parts(self.path, device), self)

    # --- sizes

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """About 1024² pixels in the picture's own aspect, which the pipelines take by default."""
        found = resized(Source(path="", content="", height=height, width=width), 1024**2)
        return found.height, found.width

    def latent_shape(self, geometry: Geometry) -> tuple[int, int, int]:
        return latent_shape(self._vae["z_dim"], self._vae_factor, geometry, PATCH)

    def tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1] // PATCH**2

    def _read_size(self, source: Source, geometry: Geometry) -> Geometry:
        """Of a source as the vision-language model sees it."""
        area = geometry.height * geometry.width
        return resized(source, min(area, self.version.read_area or area))

    @cached_property
    def _image_processor(self) -> Qwen2VLImageProcessor:
        return Qwen2VLImageProcessor.from_pretrained(self.path, subfolder="processor")

    def tokens_read(self, geometries: Sequence[Geometry]) -> int:
        """Of sources of these sizes."""
        if not geometries:
            return 0
        patches = self._image_processor.get_number_of_image_patches
        return sum(patches(g.height, g.width, {}) for g in geometries) // self._image_processor.merge_size**2

    # --- conditions

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """ "prompt" is read from an instruction and all sources together."""
        reader = ("text_encoder", "tokenizer", *(("processor",) if self.version.most_sources else ()))
        return {
            "prompt": Kind(folders=reader, dtype=self.dtype, settings=(str(self.version), f"{TEXT_TOKENS[-1]} tokens")),
            "picture": Kind(folders=("vae",), dtype=self.dtype),
        }

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]:
        """The instruction with all sources, and each source; at the sizes that follow from its aspect."""
        count, most = len(prompt.sources), self.version.most_sources
        if count > most:
            raise Refused(f"prompt {prompt.key!r} has {count} sources; this model takes at most {most}")
        if found := RESERVED.search(prompt.instruction):
            what = f"holds {found[0]!r}, which the model takes for a mark and not for words"
            raise Refused(f"prompt {prompt.key!r}: the instruction {what}; leave it out")
        area = prompt.geometry.height * prompt.geometry.width
        sources = tuple(replace(source, fit="stretch", crop=CENTRE) for source in prompt.sources)
        read = tuple(self._read_size(source, prompt.geometry) for source in sources)
        return (
            Encoding(kind="prompt", text=prompt.instruction, sources=sources, geometries=read),
            *(self.target(source, resized(source, area)) for source in sources),
        )

    def target(self, source: Source, geometry: Geometry) -> Encoding:
        return Encoding(kind="picture", sources=(source,), geometries=(geometry,))

    def empty_row(self, encoding: Encoding) -> Condition:
        if encoding.kind == "picture":
            return {"latents": torch.empty(self.latent_shape(encoding.geometries[0]), dtype=self.dtype, device="meta")}
        length = self.tokens_read(encoding.geometries) + padded_text(encoding.text or "", len(encoding.sources))
        shape = length, self._config["joint_attention_dim"]
        return {"prompt_embeds": torch.empty(shape, dtype=self.dtype, device="meta")}

    def unguided(self, prompt: Prompt) -> Prompt:
        """Told a space, which is what the models' own examples give as negative prompt."""
        return replace(prompt, instruction=" ")

    def bucket(self, prompt: Prompt) -> Bucket:
        prompts, *pictures = (encoding.geometries for encoding in self.encodings(prompt))
        text = padded_text(prompt.instruction, len(prompt.sources))
        return Bucket(prompt.geometry, tuple(size for (size,) in pictures), prompts, text)

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """`prompt_embeds` (B, L, D), padded with zeros; `prompt_mask` bool (B, L), what of it is there; `source_i` (B, C, h, w).

        Only a negative prompt can be longer than the bucket says, and all of a batch are told the same.
        """
        assert isinstance(bucket, Bucket)
        read, longest = self.tokens_read(bucket.read), max(len(row[0]["prompt_embeds"]) for row in rows)
        length = read + max(bucket.text, padded(longest - read))

        def filled(embeds: Tensor) -> dict[str, Tensor]:
            there = torch.arange(length, device=embeds.device) < len(embeds)
            return {"prompt_embeds": pad(embeds, (0, 0, 0, length - len(embeds))), "prompt_mask": there}

        prompts, *sources = zip(*rows, strict=True)
        pictures = {f"source_{i}": stacked(some)["latents"] for i, some in enumerate(sources)}
        return stacked([filled(row["prompt_embeds"]) for row in prompts]) | pictures

    # --- predictions

    def predict(self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, h, w) fp32. Casts its inputs itself: FSDP's own casting would also round the fp32 RoPE."""
        device = x_t.device
        sources = [condition[name] for name in sorted(condition) if name.startswith("source_")]
        latents = [one.to(device, self.dtype) for one in (x_t, *sources)]
        shapes = [(1, one.shape[-2] // PATCH, one.shape[-1] // PATCH) for one in latents]
        prediction = denoiser(
            hidden_states=torch.cat([pack(one) for one in latents], dim=1),
            timestep=t,
            encoder_hidden_states=condition["prompt_embeds"].to(device, self.dtype),
            encoder_hidden_states_mask=condition["prompt_mask"].to(device),
            img_shapes=[shapes] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(prediction[:, : self.tokens(x_t)], *x_t.shape[-2:]).float()

    def _scale(self, guidance_scale: float | None) -> float:
        return self.guidance_scale if guidance_scale is None else guidance_scale

    def needs_unguided(self, guidance_scale: float | None) -> bool:
        return self._scale(guidance_scale) > 1

    def guided(
        self,
        denoiser: torch.nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        unguided: Condition | None,
        *,
        guidance_scale: float | None,
        step: int,
        state: dict[str, Any],
    ) -> Tensor:
        """u + s·(c − u) with u for the negative prompt and c for the prompt, as long as c in every token."""
        c = self.predict(denoiser, x_t, t, condition)
        if not self.needs_unguided(guidance_scale):
            return c
        assert unguided is not None, "guidance needs the condition of the negative prompt"
        u = self.predict(denoiser, x_t, t, unguided)
        both = pack(u + self._scale(guidance_scale) * (c - u))
        length = pack(c).norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)
        return unpack(both * length, *x_t.shape[-2:])


class QwenImageCodec:
    """The vision-language model and the VAE of a folder, frozen."""

    def __init__(self, parts: Parts, family: QwenImageEdit):
        self.parts, self.device, self.dtype, self.family = parts, parts.device, family.dtype, family
        self.vae = parts.module(AutoencoderKLQwenImage, "vae", self.dtype)
        shape, config = (-1, 1, 1, 1), self.vae.config
        self._mean, self._std = (torch.tensor(v).view(shape) for v in (config.latents_mean, config.latents_std))

    @cached_property
    def _reader(self) -> Any:
        """Loaded at first use: a sampler with cached conditions only decodes."""
        return self.parts.module(Qwen2_5_VLForConditionalGeneration, "text_encoder", self.dtype)

    @cached_property
    def _tokenizer(self) -> Any:
        return self.parts.tokenizer("tokenizer")

    @cached_property
    def _processor(self) -> Any:
        return self.parts.processor("processor")

    @torch.no_grad()
    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """Rows of kind "prompt": `prompt_embeds` (L, D) without padding; "picture": `latents` (C, h, w)."""
        if encodings[0].kind == "picture":
            return self._encode_pictures(media)
        # One by one, since their lengths differ; each once, since short batches are filled up with copies.
        seen = dict(zip(encodings, media, strict=True))
        rows = {encoding: self._encode_prompt(encoding, pictures) for encoding, pictures in seen.items()}
        return [rows[encoding] for encoding in encodings]

    def _encode_prompt(self, encoding: Encoding, media: Sequence[Tensor]) -> Encoded:
        images = [picture[0].movedim(-1, 0) for picture in media]
        before, text = put(encoding.text or "", len(images), self.family.version)
        if images:
            given = self._processor(text=[text], images=images, return_tensors="pt")
        else:
            given = self._tokenizer([text], return_tensors="pt")
        given = {name: tensor.to(self.device) for name, tensor in given.items() if name != "attention_mask"}
        skipped = len(self._tokenizer(before).input_ids)
        count = given["input_ids"].shape[1]
        read = self.family.tokens_read(encoding.geometries)
        limit = skipped + read + TEXT_TOKENS[-1]
        for name in ("input_ids", "mm_token_type_ids"):
            if name in given:
                given[name] = given[name][:, :limit]
        states = self._reader.model(**given, use_cache=False).last_hidden_state[0, skipped:]
        cut = max(0, count - limit) / (count - skipped - read)
        return Encoded(tensors={"prompt_embeds": states.to(self.dtype)}, unknown=0.0, cut=cut)

    def _encode_pictures(self, media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """The posterior's mode, not a sample, in the VAE's own mean and deviation per channel."""
        pictures = torch.cat([picture for (picture,) in media])
        mode = self.vae.encode(to_pixels(pictures, self.vae).unsqueeze(2)).latent_dist.mode()
        latents = ((mode - self._mean.to(mode)) / self._std.to(mode)).squeeze(2)
        return [Encoded(tensors={"latents": row}) for row in latents]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, self.dtype).unsqueeze(2)
        z = z * self._std.to(z) + self._mean.to(z)
        return to_images(self.vae.decode(z, return_dict=False)[0].squeeze(2))
