"""Wan 2.1 that shows subjects of reference pictures: text and references to video, by a rectified flow over video latents.

The folder is a Wan text-to-video one in the diffusers layout, with the image_encoder/ and image_processor/ of Wan's
image-to-video model (CLIP), and with a transformer/ that `jobs.add_references` has given its new layers (`wan_network`).
Without references at their start it computes what diffusers' `WanPipeline` does (see its documentation), against which it is
tested; solvers are Euler's, where that uses UniPC. Sampled times are shifted as the scheduler says (3 at 480p, 5 at 720p).

A reference is shown whole on white: to CLIP as a square, to the VAE at the video's size. Both branches of guidance see it.
Left out: Wan 2.2's two networks and times by token, image to video.

Shapes: B batch, C latent channels (16), F frames, f latent frames (1 + (F − 1)/4), H W pixels, h w latents (H/8, W/8), T text
tokens (512), D their width (4096).
"""

import html
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel

from rlhf.diffusion.process import RectifiedFlow
from rlhf.errors import Refused
from rlhf.models.family import Kind, Need, Rows, check_finite, index, stacked, tokenizer
from rlhf.models.folder import LoadParts, Parts, load_trained, read_value, token_shares
from rlhf.models.quantised import Base, quantise_layers
from rlhf.models.wan_network import PATCH, WanSubjectTransformer3DModel
from rlhf.shards.files import AGAIN, read_json
from rlhf.types import CENTRE, Condition, Encoded, Encoding, Geometry, Prompt, Source

READ_SIDE = 512
"""Pixels of the square in which CLIP's processor gets a reference."""
MOST = 3
"""References."""
SHIFTS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
"""By scheduler: the key of its configuration that shifts times."""


class Bucket(NamedTuple):
    """What prompts of one batch share."""

    generated: Geometry
    references: int


@dataclass(frozen=True, kw_only=True)
class WanSubject:
    """The family of a folder. Training sees the conditional branch alone; a sampler is guided by both."""

    path: Path
    denoiser: Path | None = None
    """A trained folder in place of `path`/transformer."""
    guidance_scale: float = 5.0
    """1 or less runs the conditional branch only."""
    dtype: torch.dtype = torch.bfloat16
    base: Base = "bf16"

    blocks: ClassVar[tuple[type[torch.nn.Module], ...]] = (WanTransformerBlock,)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ffn.net.0.proj", "ffn.net.2"),
    )
    denoiser_folder: ClassVar[str] = "transformer"
    source_counts: ClassVar[range] = range(1, MOST + 1)
    takes_negative_prompt: ClassVar[bool] = True

    @property
    def denoiser_path(self) -> Path:
        return self.denoiser or Path(self.path) / self.denoiser_folder

    @cached_property
    def process(self) -> RectifiedFlow:
        """Shifted alike at every size. Raises Refused for a scheduler of another kind."""
        file = self.path / "scheduler" / "scheduler_config.json"
        config = read_json(file)
        name = str(config.get("_class_name"))
        shift = config.get(SHIFTS.get(name, ""))
        if not isinstance(shift, float | int) or shift <= 0 or config.get("use_dynamic_shifting"):
            known = " or ".join(f"{known} with {key}" for known, key in SHIFTS.items())
            raise Refused(f"{file}: {name} with a shift of {shift!r}, but this family takes {known}, above 0; {AGAIN}")
        return RectifiedFlow(base_shift=math.log(shift), max_shift=math.log(shift))

    @cached_property
    def _vae(self) -> dict[str, Any]:
        return read_json(self.path / "vae" / "config.json")

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self.path / self.denoiser_folder / "config.json")

    @property
    def _factors(self) -> tuple[int, int]:
        """Frames per latent frame after the first, and pixels per latent along one side."""
        halved = self._vae["temperal_downsample"]
        return 2 ** sum(halved), 2 ** len(halved)

    @cached_property
    def _clip_tokens(self) -> int:
        """Of one reference."""
        clip = read_json(self.path / "image_encoder" / "config.json")
        return (clip["image_size"] // clip["patch_size"]) ** 2 + 1

    def needs(self) -> Iterator[tuple[str, Need]]:
        yield "", index("WanPipeline")
        yield "scheduler", Need(file="scheduler_config.json")
        yield "vae", Need(network=AutoencoderKLWan)
        yield "text_encoder", Need(network=UMT5EncoderModel)
        yield "tokenizer", tokenizer("T5Tokenizer")
        yield "image_encoder", Need(network=CLIPVisionModel)
        yield "image_processor", Need(file="preprocessor_config.json")
        channels = read_value(self.path, "vae/config.json", "z_dim")
        values = {
            "patch_size": ([*PATCH],),
            "in_channels": (channels,),
            "out_channels": (channels,),
            "text_dim": (read_value(self.path, "text_encoder/config.json", "d_model"),),
            "clip_dim": (read_value(self.path, "image_encoder/config.json", "hidden_size"),),
        }
        yield self.denoiser_folder, Need(network=WanSubjectTransformer3DModel, values=values)

    # --- the network

    def empty_denoiser(self, dtype: torch.dtype) -> WanSubjectTransformer3DModel:
        with torch.device("meta"):
            denoiser = WanSubjectTransformer3DModel.from_config(self._config)
        return quantise_layers(torch.nn.Module.to(denoiser, dtype), self.blocks, self.base)

    def finish(self, denoiser: torch.nn.Module, device: str) -> None:
        """The tables of RoPE, which are no part of a checkpoint."""
        for module in denoiser.modules():
            if isinstance(module, WanRotaryPosEmbed):
                made = WanRotaryPosEmbed(module.attention_head_dim, module.patch_size, module.max_seq_len)
                module.freqs_cos, module.freqs_sin = made.freqs_cos.to(device), made.freqs_sin.to(device)

    def load_denoiser(
        self, device: str, folder: Path | None = None, lora: Path | None = None
    ) -> WanSubjectTransformer3DModel:
        found = load_trained(self, WanSubjectTransformer3DModel, folder, lora, device)
        self.finish(found, device)
        return found

    def load_codec(self, device: str, parts: LoadParts = Parts) -> "WanCodec":
        return WanCodec(parts(self.path, device), self)

    # --- sizes

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return (480, 832) if width >= height else (832, 480)

    def latent_shape(self, geometry: Geometry) -> tuple[int, int, int, int]:
        """(C, f, h, w). Raises Refused for sides that are no whole patches, and for frames that the VAE would drop."""
        per_frame, side = self._factors
        height, width, frames, step = geometry.height, geometry.width, geometry.frames, side * PATCH[1]
        if height % step or width % step:
            raise Refused(f"{height}×{width} pixels (model.height, model.width): this model needs multiples of {step}")
        if (frames - 1) % per_frame:
            low = (frames - 1) // per_frame * per_frame + 1
            near = " or ".join(str(count) for count in (low, low + per_frame))
            raise Refused(f"{frames} frames (model.frames): this model makes {per_frame}n + 1, so take {near}")
        return self._vae["z_dim"], (frames - 1) // per_frame + 1, height // side, width // side

    def tokens(self, latents: Tensor) -> int:
        return math.prod(latents.shape[2:]) // math.prod(PATCH)

    # --- conditions

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The VAE computes in fp32, as its documentation asks for."""
        return {
            "text": Kind(
                folders=("tokenizer", "text_encoder"), dtype=self.dtype, settings=(f"{self.text_len} tokens",)
            ),
            "seen": Kind(folders=("image_encoder", "image_processor"), dtype=self.dtype),
            "video": Kind(folders=("vae",), dtype=torch.float32),
        }

    @property
    def text_len(self) -> int:
        """T."""
        return self._config["text_len"]

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]:
        """The text, and each reference as CLIP sees it and as a video of one frame."""
        if not 1 <= len(prompt.sources) <= MOST:
            raise Refused(
                f"prompt {prompt.key!r} has {len(prompt.sources)} references; this model takes 1 to {MOST}; change it"
            )
        square, whole = Geometry(height=READ_SIDE, width=READ_SIDE), replace(prompt.geometry, frames=1)
        shown = [replace(source, fit="pad", crop=CENTRE) for source in prompt.sources]
        seen = (Encoding(kind="seen", sources=(source,), geometries=(square,)) for source in shown)
        return Encoding(kind="text", text=prompt.instruction), *seen, *(self.target(one, whole) for one in shown)

    def target(self, source: Source, geometry: Geometry) -> Encoding:
        return Encoding(kind="video", sources=(source,), geometries=(geometry,))

    def empty_row(self, encoding: Encoding) -> Condition:
        if encoding.kind == "video":
            return {"latents": torch.empty(self.latent_shape(encoding.geometries[0]), device="meta")}
        rows = {
            "text": ("prompt_embeds", (self.text_len, self._config["text_dim"])),
            "seen": ("clip", (self._clip_tokens, self._config["clip_dim"])),
        }
        name, shape = rows[encoding.kind]
        return {name: torch.empty(shape, dtype=self.dtype, device="meta")}

    def unguided(self, prompt: Prompt) -> Prompt:
        return replace(prompt, instruction="")

    def bucket(self, prompt: Prompt) -> Bucket:
        self.encodings(prompt)  # which refuses a number of references
        return Bucket(prompt.geometry, len(prompt.sources))

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """`prompt_embeds` (B, T, D), `clip` (B, tokens of all references, width), `references` (B, number, C, h, w)."""
        assert isinstance(bucket, Bucket)
        count = bucket.references

        def of_one(row: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            clip = torch.cat([seen["clip"] for seen in row[1 : 1 + count]])
            latents = torch.stack([one["latents"][:, 0] for one in row[1 + count :]])
            return {"prompt_embeds": row[0]["prompt_embeds"], "clip": clip, "references": latents}

        return stacked([of_one(row) for row in rows])

    # --- predictions

    def predict(self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, C, f, h, w) fp32. Casts its inputs itself: FSDP's own casting would also round the fp32 RoPE."""
        given = {name: tensor.to(x_t.device, self.dtype) for name, tensor in condition.items()}
        prediction = denoiser(
            hidden_states=x_t.to(self.dtype),
            timestep=1000 * t,
            encoder_hidden_states=given["prompt_embeds"],
            clip=given["clip"],
            references=given["references"],
            return_dict=False,
        )[0]
        return prediction.float()

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
        """u + s·(c − u) with u for the negative prompt and c for the prompt (arXiv 2207.12598; s = 1 + its w)."""
        c = self.predict(denoiser, x_t, t, condition)
        if not self.needs_unguided(guidance_scale):
            return c
        assert unguided is not None, "guidance needs the condition of the negative prompt"
        return torch.lerp(self.predict(denoiser, x_t, t, unguided), c, self._scale(guidance_scale))


class WanCodec:
    """UMT5, CLIP and the VAE of a folder, frozen."""

    def __init__(self, parts: Parts, family: WanSubject):
        self.parts, self.device, self.dtype, self.family = parts, parts.device, family.dtype, family
        self.vae = parts.module(AutoencoderKLWan, "vae", torch.float32)
        shape, config = (-1, 1, 1, 1), self.vae.config
        mean, std = (torch.tensor(v).view(shape) for v in (config.latents_mean, config.latents_std))
        self._mean, self._std = mean.to(self.device), std.to(self.device)

    @cached_property
    def _reader(self) -> tuple[Any, Any]:
        """Tokenizer and text encoder, loaded at first use: a sampler with cached conditions only decodes."""
        tokenizer = self.parts.tokenizer("tokenizer")
        tokenizer.model_max_length = self.family.text_len
        return tokenizer, self.parts.module(UMT5EncoderModel, "text_encoder", self.dtype)

    @cached_property
    def _seer(self) -> tuple[Any, Any]:
        """CLIP and its processor."""
        encoder = self.parts.module(CLIPVisionModel, "image_encoder", self.dtype)
        return self.parts.image_processor("image_processor"), encoder

    @torch.no_grad()
    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """Rows of kind "text": `prompt_embeds` (T, D), zeros after the text; "seen": `clip` (tokens, width) of the last layer but
        one; "video": `latents` (C, f, h, w).
        """
        kind = encodings[0].kind
        if kind == "text":
            return self._encode_texts([cleaned(encoding.text or "") for encoding in encodings])
        opened = torch.stack([medium for (medium,) in media])
        return self._encode_videos(opened) if kind == "video" else self._see(opened[:, 0])

    def _encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        tokenizer, encoder = self._reader
        settings: dict[str, Any] = dict(padding="max_length", max_length=self.family.text_len, truncation=True)
        given = tokenizer(list(texts), **settings, return_tensors="pt").to(self.device)
        states = encoder(given.input_ids, given.attention_mask).last_hidden_state * given.attention_mask[..., None]
        found = zip(states.to(self.dtype), texts, strict=True)
        return [Encoded(tensors={"prompt_embeds": row}, **token_shares(tokenizer, text)) for row, text in found]

    def _see(self, pictures: Tensor) -> list[Encoded]:
        """pictures: uint8 (B, H, W, 3)."""
        processor, encoder = self._seer
        given = processor(images=list(pictures.movedim(-1, 1)), return_tensors="pt").pixel_values
        states = encoder(given.to(self.device, self.dtype), output_hidden_states=True).hidden_states[-2]
        return [Encoded(tensors={"clip": row}) for row in states]

    def _encode_videos(self, videos: Tensor) -> list[Encoded]:
        """The posterior's mode, not a sample, in the VAE's own mean and deviation per channel, of uint8 (B, F, H, W, 3)."""
        pixels = videos.to(self.device).movedim(-1, 1).float().div(127.5).sub(1)
        latents = (self.vae.encode(pixels).latent_dist.mode() - self._mean) / self._std
        return [Encoded(tensors={"latents": row}) for row in latents]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device).float() * self._std + self._mean
        pixels = self.vae.decode(z, return_dict=False)[0]
        check_finite(pixels, "the VAE gives NaN or infinity: compare its files in model.path with their source")
        return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).movedim(1, -1).cpu()


def cleaned(text: str) -> str:
    """As the pipeline's `prompt_clean` without ftfy, which it uses where that is installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
