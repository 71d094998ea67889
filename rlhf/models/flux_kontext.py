"""FLUX.1 Kontext: an instruction-edit rectified flow with the source image on the token sequence.

Any folder in the diffusers layout works, the real 12B checkpoint and a tiny random one alike. Conventions follow diffusers'
`FluxKontextPipeline` (see its documentation) and are tested against it up to rounding. Left out: IP adapters, true CFG.

Text ids are zeros of a shape that the embeddings give, so they are made in `predict` and not stored.

Shapes: B batch, C latent channels (16), h w latents (H/8, W/8), L text tokens (512), S image tokens (h·w/4).
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from rlhf.diffusion.process import RectifiedFlow
from rlhf.errors import Refused
from rlhf.models.family import NUMBER, Kind, Need, Rows, index, stacked, tokenizer
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
    token_ids,
    token_shares,
    vae_factor,
)
from rlhf.models.packing import pack, unpack
from rlhf.models.quantised import Base, quantise_layers
from rlhf.shards.files import read_json
from rlhf.types import Condition, Encoded, Encoding, Geometry, Prompt, Source


def position_ids(h: int, w: int, image: int, device: torch.device) -> Tensor:
    """(h·w/4, 3) of (image, row, column): image 0 is the target, 1 the source."""
    rows = torch.arange(h // 2, device=device, dtype=torch.float32).repeat_interleave(w // 2)
    columns = torch.arange(w // 2, device=device, dtype=torch.float32).repeat(h // 2)
    return torch.stack([torch.full_like(rows, image), rows, columns], dim=1)


@dataclass(frozen=True, kw_only=True)
class FluxKontext:
    """The family of a folder. The network embeds the guidance scale: training and sampling tell it the same one."""

    path: Path
    denoiser: Path | None = None
    """A trained folder in place of `path`/transformer."""
    guidance_scale: float = 3.5
    dtype: torch.dtype = torch.bfloat16
    base: Base = "bf16"

    blocks: ClassVar[tuple[type[torch.nn.Module], ...]] = (FluxTransformerBlock, FluxSingleTransformerBlock)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    )
    denoiser_folder: ClassVar[str] = "transformer"
    takes_negative_prompt: ClassVar[bool] = False
    source_counts: ClassVar[range] = range(1, 2)

    @property
    def denoiser_path(self) -> Path:
        return self.denoiser or Path(self.path) / self.denoiser_folder

    @cached_property
    def process(self) -> RectifiedFlow:
        return flow_of(self.path)

    @cached_property
    def _vae(self) -> dict:
        return read_json(self.path / "vae" / "config.json")

    def needs(self) -> Iterator[tuple[str, Need]]:
        yield "", index("FluxKontextPipeline")
        yield "scheduler", SCHEDULER
        scale = {"shift_factor": (NUMBER,), "scaling_factor": (NUMBER,)}
        yield "vae", Need(network=AutoencoderKL, values=scale | {"latents_mean": (None,)})
        for folder, network in (("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)):
            yield folder, Need(network=network)
        yield "tokenizer", tokenizer("CLIPTokenizer")
        yield "tokenizer_2", tokenizer("T5Tokenizer")
        read = partial(read_value, self.path)
        tokens = 4 * read("vae/config.json", "latent_channels")
        values = {
            "in_channels": (tokens,),  # FLUX.1 Fill has more
            "out_channels": (None, tokens),
            "joint_attention_dim": (read("text_encoder_2/config.json", "d_model"),),
            "pooled_projection_dim": (read("text_encoder/config.json", "hidden_size"),),
        }
        yield self.denoiser_folder, Need(network=FluxTransformer2DModel, values=values)
        check_axes(self.path / self.denoiser_folder / "config.json")

    def empty_denoiser(self, dtype: torch.dtype) -> FluxTransformer2DModel:
        with torch.device("meta"):
            denoiser = FluxTransformer2DModel.from_config(read_json(self.path / self.denoiser_folder / "config.json"))
        # diffusers' own `to` warns about parts to keep in fp32: Flux has none.
        return quantise_layers(torch.nn.Module.to(denoiser, dtype), self.blocks, self.base)

    def finish(self, denoiser: torch.nn.Module, device: str) -> None:
        """Nothing: the network has neither buffers nor tables."""

    def load_denoiser(
        self, device: str, folder: Path | None = None, lora: Path | None = None
    ) -> FluxTransformer2DModel:
        return load_trained(self, FluxTransformer2DModel, folder, lora, device)

    def load_codec(self, device: str, parts: LoadParts = Parts) -> "KontextCodec":
        return KontextCodec(parts(self.path, device), self.dtype)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """One of Kontext's own sizes, chosen as `FluxKontextPipeline` does."""
        aspect = width / height
        _, W, H = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return H, W

    def latent_shape(self, geometry: Geometry) -> tuple[int, int, int]:
        return latent_shape(self._vae["latent_channels"], vae_factor(self._vae), geometry, patch=2)

    def tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1] // 4

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {
            "text": Kind(folders=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), dtype=self.dtype),
            "picture": Kind(folders=("vae",), dtype=self.dtype),
        }

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]:
        """The instruction, and each source at the target's own size."""
        pictures = (self.target(source, prompt.geometry) for source in prompt.sources)
        return (Encoding(kind="text", text=prompt.instruction), *pictures)

    def target(self, source: Source, geometry: Geometry) -> Encoding:
        return Encoding(kind="picture", sources=(source,), geometries=(geometry,))

    def empty_row(self, encoding: Encoding) -> Condition:
        if encoding.kind == "picture":
            return {"latents": torch.empty(self.latent_shape(encoding.geometries[0]), dtype=self.dtype, device="meta")}
        read, transformer = partial(read_value, self.path), f"{self.denoiser_folder}/config.json"
        length = read("tokenizer_2/tokenizer_config.json", "model_max_length")
        shapes = {
            "prompt_embeds": (length, read(transformer, "joint_attention_dim")),
            "pooled_prompt_embeds": (read(transformer, "pooled_projection_dim"),),
        }
        return {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in shapes.items()}

    def unguided(self, prompt: Prompt) -> Prompt:
        return replace(prompt, instruction="")

    def bucket(self, prompt: Prompt) -> Hashable:
        if len(prompt.sources) != 1:
            raise Refused(f"prompt {prompt.key!r} has {len(prompt.sources)} sources; FLUX.1 Kontext edits exactly one")
        return prompt.geometry

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """`prompt_embeds` (B, L, 4096), `pooled_prompt_embeds` (B, 768), `source_latents` (B, C, h, w)."""
        texts, pictures = zip(*rows, strict=True)
        return stacked(texts) | {"source_latents": stacked(pictures)["latents"]}

    def needs_unguided(self, guidance_scale: float | None) -> bool:
        return False

    def predict(self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._velocity(denoiser, x_t, t, condition, self.guidance_scale)

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
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self._velocity(denoiser, x_t, t, condition, scale)

    def _velocity(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, condition: Condition, guidance_scale: float
    ) -> Tensor:
        """(B, C, h, w) fp32. Casts its inputs itself: FSDP's own casting would also round the fp32 RoPE."""
        h, w = x_t.shape[-2:]
        device, source = x_t.device, condition["source_latents"]
        source_h, source_w = source.shape[-2:]
        target_tokens, source_tokens = pack(x_t.to(self.dtype)), pack(source.to(device, self.dtype))
        embeds = condition["prompt_embeds"].to(device, self.dtype)
        guidance = torch.full_like(t, guidance_scale) if denoiser.config.guidance_embeds else None
        prediction = denoiser(
            hidden_states=torch.cat([target_tokens, source_tokens], dim=1),
            timestep=t,
            guidance=guidance,
            pooled_projections=condition["pooled_prompt_embeds"].to(device, self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
            img_ids=torch.cat([position_ids(h, w, 0, device), position_ids(source_h, source_w, 1, device)]),
            return_dict=False,
        )[0]
        return unpack(prediction[:, : target_tokens.shape[1]], h, w).float()


class KontextCodec:
    """T5, CLIP and the VAE of a Kontext folder, frozen."""

    def __init__(self, parts: Parts, dtype: torch.dtype):
        self.parts, self.device, self.dtype = parts, parts.device, dtype
        self.vae = parts.module(AutoencoderKL, "vae", dtype)

    @cached_property
    def _text(self):
        """Tokenizers and encoders, loaded at first use: a sampler with cached conditions only decodes."""
        return (
            self.parts.tokenizer("tokenizer"),
            self.parts.module(CLIPTextModel, "text_encoder", self.dtype),
            self.parts.tokenizer("tokenizer_2"),
            self.parts.module(T5EncoderModel, "text_encoder_2", self.dtype),
        )

    @torch.no_grad()
    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """Rows of kind "text": `prompt_embeds` (L, 4096) of T5, `pooled_prompt_embeds` (768,) of CLIP; "picture": `latents`."""
        encode = {"text": self._encode_texts, "picture": self._encode_pictures}[encodings[0].kind]
        return encode(encodings, media)

    def _encode_texts(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        clip_tokenizer, clip, t5_tokenizer, t5 = self._text
        texts = [encoding.text or "" for encoding in encodings]
        embeds = t5(token_ids(t5_tokenizer, texts, self.device)).last_hidden_state.to(self.dtype)
        pooled = clip(token_ids(clip_tokenizer, texts, self.device)).pooler_output.to(self.dtype)
        return [
            Encoded(
                tensors={"prompt_embeds": embeds[i], "pooled_prompt_embeds": pooled[i]},
                # T5's vocabulary has no Chinese: such text becomes unknown tokens and the edit ignores it.
                **token_shares(t5_tokenizer, text, ignored="▁"),
            )
            for i, text in enumerate(texts)
        ]

    def _encode_pictures(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """The posterior's mode, not a sample, shifted and scaled by the VAE's own constants."""
        pictures = torch.cat([picture for (picture,) in media])
        mode = self.vae.encode(to_pixels(pictures, self.vae)).latent_dist.mode()
        latents = (mode - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return [Encoded(tensors={"latents": row}) for row in latents]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return to_images(self.vae.decode(z, return_dict=False)[0])
