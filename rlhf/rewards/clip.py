"""CLIP score (arXiv 2104.08718) and PickScore (arXiv 2305.01569) over a CLIPModel folder of transformers.

Both compare a picture with its prompt: CLIP score is the cosine of the two features, PickScore the same cosine of a CLIP
fine-tuned on people's choices, times the model's logit scale. The paper's CLIPScore is 2.5·max(cosine, 0); the weight
and the clamp are left out, since a reward below zero still ranks, and so is the ×100 of many tables.

Pictures go through the processor of the model, as in the published scorers: shortest side to 224, then a centre crop.
That cuts the ends off a 1312×784 picture, 40 % of it (HPSv2 pads instead). It runs on torchvision, the default of
transformers 5; Pillow's resize differs from it by one step of 255 in a few pixels. Texts are cut after 77 tokens.

Left out: downloading. `judges.NAME.path` and `.processor` are folders on every node that runs a replica.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from rlhf.data.media import check_array
from rlhf.errors import Refused
from rlhf.rewards.config import AestheticJudgeConfig, CLIPJudgeConfig
from rlhf.rewards.features import TextFeatures, existing, forward_rows
from rlhf.rewards.protocols import Sources, check_batch, checked_scores, fingerprint, picture_of
from rlhf.types import Item

FOLDER = "a CLIPModel folder of transformers: config.json, model.safetensors and its processor's files"
_MAX_ASPECT = 16
_PROCESSOR_FILES = {
    "image processor": ("processor_config.json", "preprocessor_config.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
}


class CLIPFeatures:
    """A CLIP and its processor: unit features of pictures and of prompts."""

    def __init__(
        self,
        path: Path | str | None,
        *,
        name: str,
        processor: Path | str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_rows: int | None = None,
    ) -> None:
        """path, processor: folders, the second where the first holds no processor; name: the judge, for messages.

        batch_rows: see `forward_rows`. Raises: Refused, naming the key of the recipe.
        """
        folder = existing(f"judges.{name}.path", path, FOLDER)
        self.device = device
        self.dtype = dtype
        self.batch_rows = batch_rows
        model = load_model(f"judges.{name}.path", folder)
        self.processor = load_processor(f"judges.{name}.processor", processor or folder, model.config)
        # Read before the cast: ln 100 in bfloat16 is 4.594, a scale of 98.9.
        self.scale = model.logit_scale.exp().item()
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.texts = TextFeatures(self._encode_text)
        self.version = f"{folder.name}@{fingerprint(folder)}"
        if processor is not None:
            self.version += f"+{fingerprint(Path(processor))}"

    @classmethod
    def from_config(cls, name: str, judge: CLIPJudgeConfig | AestheticJudgeConfig, device: str) -> Self:
        """The CLIP of `judges.NAME` on `device`."""
        return cls(
            judge.path,
            name=name,
            processor=judge.processor,
            device=device,
            dtype=getattr(torch, judge.dtype),
            batch_rows=judge.max_batch_size if judge.pad_batches else None,
        )

    @torch.inference_mode()
    def images(self, media: Sequence[np.ndarray], head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, D) fp32 unit features of pictures (1, H, W, 3) on the CPU; with `head`, what it makes of them. B ≥ 1.

        Raises: ValueError for anything else than such pictures.
        """

        def forward(pixels: Tensor) -> Tensor:
            output = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype))
            features = F.normalize(output.pooler_output.float(), dim=-1)
            return features if head is None else head(features)

        # As Pillow images, whose channels cannot be mistaken: an array of 3 rows looks like one of 3 channels.
        pictures = [Image.fromarray(_middle(picture_of(medium))) for medium in media]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        return forward_rows(forward, pixels, self.batch_rows)

    @torch.inference_mode()
    def cosines(self, media: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """(B,) fp32: of each picture with its prompt."""
        return (self.images(media) * self.texts(prompts)).sum(dim=-1)

    def _encode_text(self, prompt: str) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings  # 77 in every published CLIP
        tokens = self.processor.tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output


class CLIPReward:
    """The `Reward` "clip": image feature · text feature, in [−1, 1], around 0.2–0.35 for real weights."""

    name = "clip"

    def __init__(self, features: CLIPFeatures) -> None:
        self.features = features
        self.version = features.version
        self.device = features.device

    @classmethod
    def from_config(cls, name: str, judge: CLIPJudgeConfig, device: str) -> Self:
        """`judges.clip` on `device`."""
        return cls(CLIPFeatures.from_config(name, judge, device))

    def score(
        self, media: Sequence[np.ndarray], prompts: Sequence[str], sources: Sequence[Sources], items: Sequence[Item]
    ) -> list[float]:
        """Cosine of each picture with its prompt; sources and items are not read. See `Reward.score`."""
        check_batch(media, prompts, sources, items)
        if not media:
            return []
        return checked_scores(self.name, self.features.cosines(media, prompts).tolist(), len(media))


class PickScoreReward:
    """The `Reward` "pickscore": exp(logit scale) · cosine, around 20 for the published PickScore_v1."""

    name = "pickscore"

    def __init__(self, features: CLIPFeatures) -> None:
        self.features = features
        self.version = features.version
        self.device = features.device

    @classmethod
    def from_config(cls, name: str, judge: CLIPJudgeConfig, device: str) -> Self:
        """`judges.pickscore` on `device`."""
        return cls(CLIPFeatures.from_config(name, judge, device))

    def score(
        self, media: Sequence[np.ndarray], prompts: Sequence[str], sources: Sequence[Sources], items: Sequence[Item]
    ) -> list[float]:
        """Scaled cosine of each picture with its prompt; sources and items are not read. See `Reward.score`."""
        check_batch(media, prompts, sources, items)
        if not media:
            return []
        scores = self.features.scale * self.features.cosines(media, prompts)
        return checked_scores(self.name, scores.tolist(), len(media))


def _middle(image: np.ndarray) -> np.ndarray:
    """A uint8 (H, W, 3) picture without what the centre crop would drop anyway: resized, a 1×10000 strip is 1.5 GB."""
    check_array(image)
    height, width = image.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[top : top + longest, left : left + longest]


def load_model(key: str, folder: Path) -> CLIPModel:
    """The CLIPModel at `folder`, fp32 on the CPU. Raises: Refused, naming `key`."""
    if not (folder / "config.json").is_file():
        raise Refused(f"{key} = '{folder}' has no config.json; give {FOLDER}")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise Refused(f"{key} = '{folder}' is a model of type {kind!r}, not 'clip'; give {FOLDER}")
    try:
        model, report = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise Refused(f"{key} = '{folder}' does not load: {error}") from error
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random, with a warning
        raise Refused(f"{key} = '{folder}': the weights lack {len(missing)} tensors, the first is {missing[0]}")
    return model


def load_processor(key: str, path: Path | str, config: CLIPConfig) -> CLIPProcessor:
    """The CLIP processor at `path`. Raises: Refused, naming `key`, also if it does not fit."""
    folder = existing(key, path, "the folder of a CLIP processor")
    # Looked for by name: without its files, transformers makes a tokenizer of two tokens and no error.
    absent = [kind for kind, files in _PROCESSOR_FILES.items() if not any((folder / file).is_file() for file in files)]
    if absent:
        raise Refused(
            f"{key}: '{folder}' holds no {' and no '.join(absent)}; set {key} to the folder of the processor that the "
            "model was trained with (PickScore: that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
        )
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    crop, size = processor.image_processor.crop_size["height"], config.vision_config.image_size
    if crop != size:
        raise Refused(f"{key}: '{folder}' crops pictures to {crop}, but the model reads {size}; give its own")
    tokens, known = len(processor.tokenizer), config.text_config.vocab_size
    if tokens > known:
        raise Refused(f"{key}: '{folder}' has {tokens} tokens, but the model knows {known}; give its own")
    return processor
