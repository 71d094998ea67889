"""Stable Diffusion 1.x, 2.x and XL: text to picture by a UNet that predicts epsilon or v at one of N timesteps.

Any folder in the diffusers layout works; its unet/config.json says which kind it is (`addition_embed_type`: XL also takes
pooled text and picture sizes). Conventions follow diffusers' `StableDiffusionPipeline` and `StableDiffusionXLPipeline`
(see their documentation) and are tested against them.

Time ids are the size of the picture itself, uncropped, so they are made in `predict` and not stored.
Left out: guidance_rescale, XL's refiner, inpainting and distilled UNets, VAEs with latents_mean, negative prompts.

Shapes: B batch, C latent channels (4), h w latents (H/8, W/8), L text tokens (77), D text width (768; 2.x 1024; XL 768 + 1280).
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from rlhf.diffusion.ddpm import DDPM
from rlhf.models.family import Kind, Need, Rows, index, stacked, tokenizer
from rlhf.models.folder import (
    LoadParts,
    Parts,
    latent_shape,
    load_trained,
    read_value,
    to_images,
    to_pixels,
    token_ids,
    token_shares,
    vae_factor,
)
from rlhf.models.quantised import Base, quantise_layers
from rlhf.shards.files import read_json
from rlhf.types import Condition, Encoded, Encoding, Geometry, Prompt, Source

UNET_LIMITS = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
}
XL_SIDES = (
    *((16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (21, 11), (22, 11)),
    *((23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8)),
)
"""Long and short side, in sixteenths of the base size (1024), that XL was trained on (arXiv 2307.01952, appendix I)."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """The family of a folder. Training sees the conditional branch alone; a sampler is guided by both (CFG)."""

    path: Path
    denoiser: Path | None = None
    """A trained folder in place of `path`/unet."""
    guidance_scale: float | None = None
    """1 or less runs the conditional branch only; None: as in the pipelines, 7.5, XL 5."""
    dtype: torch.dtype = torch.bfloat16
    base: Base = "bf16"

    # What diffusers recomputes one by one. Its down and up blocks hold up to thirty of these: a billion parameters in XL.
    blocks: ClassVar[tuple[type[torch.nn.Module], ...]] = (ResnetBlock2D, BasicTransformerBlock)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    denoiser_folder: ClassVar[str] = "unet"
    source_counts: ClassVar[range] = range(1)

    @property
    def takes_negative_prompt(self) -> bool:
        """Not where the other branch sees zeros."""
        return not self._zeros_for_empty

    @property
    def denoiser_path(self) -> Path:
        return self.denoiser or Path(self.path) / self.denoiser_folder

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name)

    @cached_property
    def _unet(self) -> dict[str, Any]:
        return self._json("unet/config.json")

    @cached_property
    def _vae(self) -> dict[str, Any]:
        return self._json("vae/config.json")

    @property
    def xl(self) -> bool:
        return self._unet.get("addition_embed_type") == "text_time"

    @property
    def kinds(self) -> Mapping[str, Kind]:
        second = ("tokenizer_2", "text_encoder_2") if self.xl else ()
        return {
            "text": Kind(folders=("tokenizer", "text_encoder", *second), dtype=self.dtype),
            "picture": Kind(folders=("vae",), dtype=self._vae_dtype),
        }

    @property
    def _vae_dtype(self) -> torch.dtype:
        """force_upcast: XL's VAE overflows fp16 and bands in bf16. It is small beside the UNet, so fp32 costs little."""
        return torch.float32 if self._vae.get("force_upcast") else self.dtype

    @cached_property
    def process(self) -> DDPM:
        name = "scheduler/scheduler_config.json"
        return DDPM(config=self._json(name), file=str(Path(self.path) / name))

    @cached_property
    def _zeros_for_empty(self) -> bool:
        """Whether the unguided branch sees zeros in place of the encoded empty text."""
        return self.xl and self._json("model_index.json").get("force_zeros_for_empty_prompt", True)

    def needs(self) -> Iterator[tuple[str, Need]]:
        yield "", index("StableDiffusionPipeline", "StableDiffusionXLPipeline")
        yield "scheduler", Need(file="scheduler_config.json")
        yield "vae", Need(network=AutoencoderKL, values={"latents_mean": (None,), "shift_factor": (None, 0)})
        encoders = {"text_encoder": CLIPTextModel} | (
            {"text_encoder_2": CLIPTextModelWithProjection} if self.xl else {}
        )
        for folder, network in encoders.items():
            yield folder, Need(network=network)
            yield folder.replace("text_encoder", "tokenizer"), tokenizer("CLIPTokenizer")
        widths = [read_value(self.path, f"{folder}/config.json", "hidden_size") for folder in encoders]
        latents = read_value(self.path, "vae/config.json", "latent_channels")
        values = {"in_channels": (latents,), "out_channels": (latents,), "cross_attention_dim": (sum(widths),)}
        yield self.denoiser_folder, Need(network=UNet2DConditionModel, values=UNET_LIMITS | values)

    def empty_denoiser(self, dtype: torch.dtype) -> UNet2DConditionModel:
        with torch.device("meta"):
            denoiser = UNet2DConditionModel.from_config(self._unet)
        return quantise_layers(torch.nn.Module.to(denoiser, dtype), self.blocks, self.base)

    def finish(self, denoiser: torch.nn.Module, device: str) -> None:
        """Nothing: the network has neither buffers nor tables."""

    def load_denoiser(self, device: str, folder: Path | None = None, lora: Path | None = None) -> UNet2DConditionModel:
        return load_trained(self, UNet2DConditionModel, folder, lora, device)

    def load_codec(self, device: str, parts: LoadParts = Parts) -> "StableDiffusionCodec":
        found = parts(self.path, device)
        return StableDiffusionCodec(found, self.dtype, found.module(AutoencoderKL, "vae", self._vae_dtype), self.xl)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Square, the UNet's sample_size; XL: one of the sizes of its paper."""
        side = self._unet["sample_size"] * vae_factor(self._vae)
        if not self.xl:
            return side, side
        sizes = [(a * side // 16, b * side // 16) for pair in XL_SIDES for a, b in (pair, pair[::-1])]
        return min(sizes, key=lambda size: abs(size[0] / size[1] - height / width))

    def latent_shape(self, geometry: Geometry) -> tuple[int, int, int]:
        return latent_shape(self._vae["latent_channels"], vae_factor(self._vae), geometry)

    def tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1]

    def predict(self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Epsilon or v (B, C, h, w) fp32 of the conditional branch."""
        added = None
        if self.xl:
            H, W = (side * vae_factor(self._vae) for side in x_t.shape[-2:])
            added = {  # (original height and width, top and left of the crop, target height and width)
                "time_ids": torch.tensor([[H, W, 0, 0, H, W]], dtype=torch.float32, device=x_t.device).repeat(
                    len(x_t), 1
                ),
                "text_embeds": condition["pooled_prompt_embeds"].to(x_t.device, self.dtype),
            }
        prediction = denoiser(
            x_t.to(self.dtype),
            self.process.timestep(t),
            encoder_hidden_states=condition["prompt_embeds"].to(x_t.device, self.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction.float()

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]:
        """The text alone: the model never sees a source."""
        return (Encoding(kind="text", text=prompt.instruction),)

    def target(self, source: Source, geometry: Geometry) -> Encoding:
        return Encoding(kind="picture", sources=(source,), geometries=(geometry,))

    def empty_row(self, encoding: Encoding) -> Condition:
        if encoding.kind == "picture":
            shape = self.latent_shape(encoding.geometries[0])
            return {"latents": torch.empty(shape, dtype=self._vae_dtype, device="meta")}
        unet, length = self._unet, read_value(self.path, "tokenizer/tokenizer_config.json", "model_max_length")
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (length, unet["cross_attention_dim"])}
        if self.xl:  # beside six numbers about sizes, each embedded
            of_sizes = 6 * unet["addition_time_embed_dim"]
            shapes["pooled_prompt_embeds"] = (unet["projection_class_embeddings_input_dim"] - of_sizes,)
        return {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in shapes.items()}

    def unguided(self, prompt: Prompt) -> Prompt:
        return replace(prompt, instruction="")

    def bucket(self, prompt: Prompt) -> Hashable:
        return prompt.geometry

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """`prompt_embeds` (B, L, D) and XL's `pooled_prompt_embeds` (B, 1280)."""
        return stacked([text for (text,) in rows])

    def _scale(self, guidance_scale: float | None) -> float:
        given = self.guidance_scale if guidance_scale is None else guidance_scale
        return given if given is not None else 5.0 if self.xl else 7.5

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
        """u + s·(c − u) with u for empty text and c for the prompt (Ho and Salimans, arXiv 2207.12598; s = 1 + their w)."""
        scale = self._scale(guidance_scale)
        if scale <= 1:
            return self.predict(denoiser, x_t, t, condition)
        assert unguided is not None, "guidance needs the condition of the empty text"
        if self._zeros_for_empty:
            unguided = {name: torch.zeros_like(tensor) for name, tensor in unguided.items()}
        both = {name: torch.cat([unguided[name], tensor]) for name, tensor in condition.items()}
        u, c = self.predict(denoiser, torch.cat([x_t] * 2), torch.cat([t] * 2), both).chunk(2)
        return u + scale * (c - u)


class StableDiffusionCodec:
    """The CLIP text encoders (one, XL two) and the VAE of a Stable Diffusion folder, frozen."""

    def __init__(self, parts: Parts, dtype: torch.dtype, vae: AutoencoderKL, xl: bool):
        self.parts, self.device, self.dtype, self.vae, self.xl = parts, parts.device, dtype, vae, xl

    @cached_property
    def _text(self) -> list[tuple[Any, Any]]:
        """Tokenizers with their encoders, loaded at first use: a sampler with cached conditions only decodes."""
        classes = [CLIPTextModel, CLIPTextModelWithProjection][: 2 if self.xl else 1]
        return [
            (
                self.parts.tokenizer(f"tokenizer{ending}"),
                self.parts.module(cls, f"text_encoder{ending}", self.dtype),
            )
            for cls, ending in zip(classes, ("", "_2"), strict=False)
        ]

    @torch.no_grad()
    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """Rows of kind "text": `prompt_embeds` (L, D), XL's `pooled_prompt_embeds` (1280,); "picture": `latents` (C, h, w)."""
        encode = {"text": self._encode_texts, "picture": self._encode_pictures}[encodings[0].kind]
        return encode(encodings, media)

    def _encode_texts(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        texts = [encoding.text or "" for encoding in encodings]
        outputs = [
            encoder(token_ids(tokenizer, texts, self.device), output_hidden_states=self.xl)
            for tokenizer, encoder in self._text
        ]
        if self.xl:
            tensors = {
                "prompt_embeds": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
                "pooled_prompt_embeds": outputs[1].text_embeds,
            }
        else:
            tensors = {"prompt_embeds": outputs[0].last_hidden_state}
        return [
            Encoded(
                tensors={name: tensor[i] for name, tensor in tensors.items()},
                # None is unknown to real checkpoints: CLIP's vocabulary has every byte, which is not to understand Chinese.
                **token_shares(self._text[0][0], text),
            )
            for i, text in enumerate(texts)
        ]

    def _encode_pictures(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """The posterior's mode, not a sample, times the VAE's scaling_factor."""
        pictures = torch.cat([picture for (picture,) in media])
        latents = self.vae.encode(to_pixels(pictures, self.vae)).latent_dist.mode() * self.vae.config.scaling_factor
        return [Encoded(tensors={"latents": row}) for row in latents]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        return to_images(self.vae.decode(z, return_dict=False)[0])
