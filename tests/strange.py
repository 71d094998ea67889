"""A family of video edits that is unlike those of `rlhf.models`, to see that nothing else knows a family's ways.

Recipes name it "tests.strange:Strange". A prompt has one or two sources. Text and sources are read together (kind "both"), to
rows of unequal lengths; each source is a kind "picture" too. A video of 1 + 2k frames has 1 + k latent frames. The network holds
a RoPE buffer and a table of turns per frame that is a plain attribute. Guidance has two branches and keeps momentum.

Shapes: B batch, C latent channels (4), F frames, f latent frames (1 + (F − 1)/2), H W pixels, h w latents (H/8, W/8), S sources,
L tokens read, D their width (12), N tokens of the network, E its width (32).
"""

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import xxhash
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.diffusion.process import RectifiedFlow
from rlhf.errors import Refused
from rlhf.models.family import Kind, Need, Rows, check_finite, index, stacked
from rlhf.models.folder import LoadParts, Parts, load_trained
from rlhf.models.quantised import Base, quantise_layers
from rlhf.shards.files import read_json
from rlhf.types import Condition, Encoded, Encoding, Geometry, Prompt, Source

CHANNELS, PIXELS, READ, WIDTH, HEADS = 4, 8, 12, 32, 2
HALF = WIDTH // HEADS // 2
WORDS, VOCABULARY = (4, 8, 16), 97
"""Words that a text is padded to: the first that holds it. Longer ones are cut."""
MAX_SOURCES, MAX_FRAMES = 2, 16
MOMENTUM = 0.5


# --- the network -------------------------------------------------------------------------------------------------------


def frequencies(device: Any = None) -> Tensor:
    """(HALF,) fp32."""
    return 100.0 ** -(torch.arange(HALF, device=device, dtype=torch.float32) / HALF)


def turns_of_frames(device: Any = None) -> Tensor:
    """(MAX_FRAMES, HALF) complex64: how far a frame turns the halves of a head."""
    angles = torch.arange(MAX_FRAMES, device=device, dtype=torch.float32)[:, None] * frequencies(device)
    return torch.polar(torch.ones_like(angles), 0.7 * angles)


class Turning(nn.Module):
    """RoPE by the place in a frame (a buffer) and by the frame (a plain attribute)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies(), persistent=False)
        self.turns = turns_of_frames()

    def forward(self, x: Tensor, places: Tensor, frames: Tensor) -> Tensor:
        """x (B, heads, N, E/heads) turned by places and frames, both int64 (N,)."""
        angles = places[:, None] * self.frequencies
        turn = torch.polar(torch.ones_like(angles), angles) * self.turns[frames]
        return (
            torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(x.dtype)
        )


class Looking(nn.Module):
    """Attention of all tokens to all that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.turning = Turning()

    def forward(self, x: Tensor, places: Tensor, frames: Tensor, there: Tensor) -> Tensor:
        """x (B, N, E); there: bool (B, N)."""
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.turning(q, places, frames), self.turning(k, places, frames)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        return self.to_out(seen.transpose(1, 2).flatten(2))


class StrangeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.looking = Looking()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.by_time = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, time: Tensor, places: Tensor, frames: Tensor, there: Tensor) -> Tensor:
        """x (B, N, E), time (B, E)."""
        scale, shift = self.by_time(time)[:, None].chunk(2, dim=-1)
        x = x + self.looking(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift, places, frames, there)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class StrangeTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, layers: int = 2, channels: int = CHANNELS):
        super().__init__()
        self.latents_in, self.source_in = nn.Linear(channels, WIDTH), nn.Linear(channels, WIDTH)
        self.read_in, self.origins = nn.Linear(READ, WIDTH), nn.Embedding(1 + MAX_SOURCES, WIDTH)
        self.time_in = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(StrangeBlock() for _ in range(layers))
        self.out = nn.Linear(WIDTH, channels)
        self.gradient_checkpointing = False

    def forward(
        self, latents: Tensor, time: Tensor, sources: Tensor, read: Tensor, origins: Tensor, there: Tensor
    ) -> Tensor:
        """(B, C, f, h, w) of latents of that shape.

        time (B, E), sources (B, S, C, 1, h, w), read (B, L, D), origins int64 (B, L), there bool (B, L).
        """
        B, _, f, h, w = latents.shape
        S, L, device = sources.shape[1], read.shape[1], latents.device
        target = self.latents_in(latents.flatten(2).mT)
        of_sources = self.source_in(sources.movedim(2, -1).flatten(2, 4))
        of_sources = of_sources + self.origins(torch.arange(1, 1 + S, device=device))[:, None]
        x = torch.cat([target, of_sources.flatten(1, 2), self.read_in(read) + self.origins(origins)], dim=1)
        frame = torch.arange(h * w, device=device)
        places = torch.cat([frame.repeat(f + S), torch.arange(L, device=device)])
        frames = torch.cat([torch.arange(f, device=device).repeat_interleave(h * w), frame.new_zeros(S * h * w + L)])
        there = torch.cat([there.new_ones(B, (f + S) * h * w), there], dim=1)
        time = F.silu(self.time_in(time))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, time, places, frames, there)
            else:
                x = block(x, time, places, frames, there)
        return self.out(x[:, : f * h * w]).mT.unflatten(2, (f, h, w))


def time_waves(t: Tensor) -> Tensor:
    """(B, E) fp32 of t (B,)."""
    angles = 100 * t[:, None] * torch.cat([frequencies(t.device)] * (WIDTH // 2 // HALF))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# --- the family --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Strange:
    """The family of a folder that `write` wrote."""

    path: Path
    denoiser: Path | None = None
    guidance_scale: float = 2.0
    """1: the conditional branch alone."""
    dtype: torch.dtype = torch.bfloat16
    base: Base = "bf16"

    blocks: ClassVar[tuple[type[nn.Module], ...]] = (StrangeBlock,)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out", "up", "down")
    denoiser_folder: ClassVar[str] = "net"
    source_counts: ClassVar[range] = range(1, 1 + MAX_SOURCES)

    @property
    def denoiser_path(self) -> Path:
        return self.denoiser or Path(self.path) / self.denoiser_folder

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self.path / self.denoiser_folder / "config.json")

    @property
    def process(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {
            "both": Kind(folders=("reader",), dtype=torch.float32, settings=(f"{WORDS[-1]} words",)),
            "picture": Kind(folders=("patches",), dtype=torch.float32),
        }

    def needs(self) -> Iterator[tuple[str, Need]]:
        yield "", index("Strange")
        yield self.denoiser_folder, Need(network=StrangeTransformer, values={"channels": (CHANNELS,)})

    def empty_denoiser(self, dtype: torch.dtype) -> StrangeTransformer:
        with torch.device("meta"):
            denoiser = StrangeTransformer.from_config(self._config)
        return quantise_layers(nn.Module.to(denoiser, dtype), self.blocks, self.base)

    def finish(self, denoiser: nn.Module, device: str) -> None:
        for module in denoiser.modules():
            if isinstance(module, Turning):
                module.frequencies, module.turns = frequencies(device), turns_of_frames(device)

    def load_denoiser(self, device: str, folder: Path | None = None, lora: Path | None = None) -> StrangeTransformer:
        found = load_trained(self, StrangeTransformer, folder, lora, device)
        self.finish(found, device)
        return found

    def load_codec(self, device: str, parts: LoadParts = Parts) -> "StrangeCodec":
        return StrangeCodec(self.path, device)

    # --- sizes

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return (32, 48) if width > height else (48, 32)

    def latent_shape(self, geometry: Geometry) -> tuple[int, int, int, int]:
        """(C, f, h, w)."""
        if geometry.height % 16 or geometry.width % 16 or geometry.frames % 2 == 0 or geometry.frames >= 2 * MAX_FRAMES:
            raise Refused(
                f"{geometry.height}×{geometry.width} pixels, {geometry.frames} frames: this model needs multiples of 16 and "
                f"an odd number of frames below {2 * MAX_FRAMES}"
            )
        return CHANNELS, (geometry.frames + 1) // 2, geometry.height // PIXELS, geometry.width // PIXELS

    def tokens(self, latents: Tensor) -> int:
        return math.prod(latents.shape[2:])

    # --- conditions

    def encodings(self, prompt: Prompt) -> tuple[Encoding, ...]:
        """Text and sources together, the sources at half their size, and each source as a picture of one frame."""
        whole = replace(prompt.geometry, frames=1)
        half = replace(whole, height=whole.height // 2, width=whole.width // 2)
        together = Encoding(
            kind="both",
            text=f"edit: {prompt.instruction}",
            sources=prompt.sources,
            geometries=(half,) * len(prompt.sources),
        )
        return together, *(self.target(source, whole) for source in prompt.sources)

    def target(self, source: Source, geometry: Geometry) -> Encoding:
        return Encoding(kind="picture", sources=(source,), geometries=(geometry,))

    def empty_row(self, encoding: Encoding) -> Condition:
        if encoding.kind == "picture":
            shape = self.latent_shape(encoding.geometries[0])
            return {"latents": torch.empty(shape, device="meta")}
        length = len(words_of(encoding.text)) + sum(map(patches_read, encoding.geometries))
        return {
            "read": torch.empty(length, READ, device="meta"),
            "origins": torch.empty(length, dtype=torch.int64, device="meta"),
        }

    def unguided(self, prompt: Prompt) -> Prompt:
        return replace(prompt, instruction="")

    def bucket(self, prompt: Prompt) -> Hashable:
        """(geometry, number of sources, words that the text is padded to)."""
        if not 1 <= len(prompt.sources) <= MAX_SOURCES:
            raise Refused(f"prompt {prompt.key!r} has {len(prompt.sources)} sources; Strange edits one or two")
        count = len(words_of(f"edit: {prompt.instruction}"))
        return prompt.geometry, len(prompt.sources), next((most for most in WORDS if count <= most), WORDS[-1])

    def condition(self, rows: Rows, bucket: Hashable) -> Condition:
        """`sources` (B, S, C, 1, h, w); padded with zeros to the bucket's L: `read` (B, L, D), `origins`, `there` (B, L)."""
        geometry, sources, words = bucket
        length = words + sources * patches_read(geometry)
        both = [row[0] for row in rows]
        assert all(len(row) == 1 + sources and len(row[0]["read"]) <= length for row in rows)

        def padded(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
            count = len(row["read"])
            return {
                "read": F.pad(row["read"], (0, 0, 0, length - count)),
                "origins": F.pad(row["origins"], (0, length - count)),
                "there": torch.arange(length) < count,
            }

        pictures = torch.stack([torch.stack([picture["latents"] for picture in row[1:]]) for row in rows])
        return stacked([padded(row) for row in both]) | {"sources": pictures}

    # --- predictions

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        device = x_t.device
        return denoiser(
            x_t.to(self.dtype),
            time_waves(t).to(self.dtype),
            condition["sources"].to(device, self.dtype),
            condition["read"].to(device, self.dtype),
            condition["origins"].to(device),
            condition["there"].to(device),
        ).float()

    def _scale(self, guidance_scale: float | None) -> float:
        return self.guidance_scale if guidance_scale is None else guidance_scale

    def needs_unguided(self, guidance_scale: float | None) -> bool:
        return self._scale(guidance_scale) != 1

    def guided(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        unguided: Condition | None,
        *,
        guidance_scale: float | None,
        step: int,
        state: dict[str, Any],
    ) -> Tensor:
        """u + s·d with d = c − u at the first step, then MOMENTUM of the one before and the rest of it."""
        c = self.predict(denoiser, x_t, t, condition)
        if not self.needs_unguided(guidance_scale):
            return c
        assert unguided is not None, "guidance needs the condition of the empty text"
        u = self.predict(denoiser, x_t, t, unguided)
        difference = c - u
        assert (step > 0) == ("difference" in state), "a state belongs to one sample"
        if step > 0:
            difference = torch.lerp(difference, state["difference"], MOMENTUM)
        state["difference"] = difference
        return u + self._scale(guidance_scale) * difference


def words_of(text: str) -> list[str]:
    """At most WORDS[-1] words."""
    return text.split()[: WORDS[-1]]


def patches_read(geometry: Geometry) -> int:
    """Tokens of one source at half its size."""
    return (geometry.height // 2 // PIXELS) * (geometry.width // 2 // PIXELS)


def patches(media: Tensor) -> Tensor:
    """(F, H/8, W/8, 192) in −1 … 1 of uint8 (F, H, W, 3)."""
    x = media.float() / 127.5 - 1
    return x.unflatten(1, (-1, PIXELS)).unflatten(3, (-1, PIXELS)).permute(0, 1, 3, 2, 4, 5).flatten(3)


class StrangeCodec:
    """`reader/` (a vocabulary and a look at patches) and `patches/` (the latents of patches), each read when first used."""

    def __init__(self, path: Path, device: str):
        self.path, self.device = Path(path), device

    @cached_property
    def _reader(self) -> dict[str, Tensor]:
        return load_file(self.path / "reader" / "model.safetensors", self.device)

    @cached_property
    def _basis(self) -> Tensor:
        """(C, 192), orthonormal rows."""
        return load_file(self.path / "patches" / "model.safetensors", self.device)["basis"]

    @torch.no_grad()
    def encode(self, encodings: Sequence[Encoding], media: Sequence[Sequence[Tensor]]) -> list[Encoded]:
        """Rows of kind "both": `read` (≤ L, D), `origins` int64 (≤ L,), 0 of the text; "picture": `latents` (C, f, h, w)."""
        one = {"both": self._read, "picture": self._picture}[encodings[0].kind]
        return [one(encoding, some) for encoding, some in zip(encodings, media, strict=True)]

    def _read(self, encoding: Encoding, media: Sequence[Tensor]) -> Encoded:
        """What a patch is read as depends on the text, and a word on the patches."""
        text = encoding.text or ""
        words = words_of(text)
        known = [word.isascii() for word in words]
        ids = [
            1 + xxhash.xxh3_64_intdigest(word.encode()) % (VOCABULARY - 1) if word.isascii() else 0 for word in words
        ]
        seen = [patches(medium.to(self.device)).flatten(0, 2) @ self._reader["look"] for medium in media]
        read = torch.cat([self._reader["words"][ids], *seen])
        read = read + torch.tanh(read.mean(0))
        origins = [0] * len(words) + [i for i, some in enumerate(seen, 1) for _ in some]
        return Encoded(
            tensors={"read": read, "origins": torch.tensor(origins)},
            unknown=1 - sum(known) / len(known),
            cut=1 - len(words) / len(text.split()),
        )

    def _picture(self, encoding: Encoding, media: Sequence[Tensor]) -> Encoded:
        """The first frame alone, then the mean of each two."""
        (medium,) = media
        latents = patches(medium.to(self.device)) @ self._basis.T
        latents = torch.cat([latents[:1], latents[1:].unflatten(0, (-1, 2)).mean(1)])
        return Encoded(tensors={"latents": latents.movedim(-1, 0)})

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        frames = latents.to(self.device).float().movedim(1, -1) @ self._basis
        check_finite(frames, "the patches of finite latents are NaN or infinite")
        frames = torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(2, dim=1)], dim=1)
        pixels = frames.unflatten(-1, (PIXELS, PIXELS, 3)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
        return ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu()


def write(folder: Path | str, seed: int = 0) -> Path:
    """Write a tiny checkpoint and return its folder."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StrangeTransformer()
        basis = torch.linalg.qr(torch.randn(3 * PIXELS * PIXELS, CHANNELS))[0].T.contiguous()
        reader = {"words": torch.randn(VOCABULARY, READ), "look": torch.randn(3 * PIXELS * PIXELS, READ) / 8}
    network.save_pretrained(folder / "net")
    for name, tensors in (("reader", reader), ("patches", {"basis": basis})):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Strange"}))
    return folder


def green(images: Sequence[Any], prompts: Sequence[str], sources: Sequence[Sequence[Any]], items: Any) -> list[float]:
    """A judge of its edits, for [judges.python]: greener than the first source, of which there are one or two."""
    assert all(1 <= len(some) <= MAX_SOURCES and len({one.shape for one in some}) == 1 for some in sources)
    return [float(image[..., 1].mean() - some[0][..., 1].mean()) for image, some in zip(images, sources, strict=True)]
