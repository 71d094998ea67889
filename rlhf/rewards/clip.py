"""CLIP score (arXiv 2104.08718), PickScore (arXiv 2305.01569) and LAION aesthetic over a CLIPModel folder of transformers.

Two compare a picture with its prompt: CLIP score is the cosine of the two features, PickScore the same cosine of a CLIP
fine-tuned on people's choices, times the model's logit scale. The paper's CLIPScore is 2.5·max(cosine, 0); the weight
and the clamp are left out, since a reward below zero still ranks, and so is the ×100 of many tables.

The aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor) tells how much people like a picture on
average, from its CLIP ViT-L/14 feature alone: five linear layers without activations on the unit feature, trained on ratings
from 1 to 10. The other heads of that repository are left out.

Pictures go through the processor of the model, as in the published scorers: shortest side to 224, then a centre crop.
That cuts the ends off a 1312×784 picture, 40 % of it (HPSv2 pads instead). It runs on torchvision, the default of
transformers 5; Pillow's resize differs from it by one step of 255 in a few pixels. Texts are cut after 77 tokens.

Left out: downloading. `judges.NAME.path` and `.processor` are folders on every node that runs a replica.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from rlhf.errors import Refused
from rlhf.models.checks import check_weights, on_meta
from rlhf.rewards.config import AestheticJudgeConfig, CLIPJudgeConfig
from rlhf.rewards.features import cached_texts, existing, forward_rows, read_torch
from rlhf.rewards.protocols import Items, Media, Reward, Sources, picture_of, quick_fingerprint
from rlhf.shards.files import read_header, read_json, refuse_broken

FOLDER = "a CLIPModel folder of transformers: config.json, model.safetensors and its processor's files"
_MAX_ASPECT = 16
_PROCESSOR_FILES = {
    "image processor": ("processor_config.json", "preprocessor_config.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
}


class CLIPFeatures:
    """A CLIP and its processor: unit features of pictures and of prompts."""

    def __init__(self, name: str, judge: CLIPJudgeConfig | AestheticJudgeConfig, device: str) -> None:
        """The CLIP of `judges.NAME`. Raises: Refused, naming the key of the recipe."""
        folder = existing(f"judges.{name}.path", judge.path, FOLDER)
        self.device, self.dtype, self.rows = device, getattr(torch, judge.dtype), judge.padded_rows
        model = load_model(f"judges.{name}.path", folder)
        self.processor = load_processor(f"judges.{name}.processor", judge.processor or folder, model.config)
        # Read before the cast: ln 100 in bfloat16 is 4.594, a scale of 98.9.
        self.scale = model.logit_scale.exp().item()
        self.model = model.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        self.texts = cached_texts(self._encode_text)
        self.version = f"{folder.name}@{quick_fingerprint(folder)}"
        if judge.processor is not None:
            self.version += f"+{quick_fingerprint(Path(judge.processor))}"

    @torch.inference_mode()
    def images(self, media: Media, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, D) fp32 unit features of pictures (1, H, W, 3) on the CPU; with `head`, what it makes of them. B ≥ 1."""

        def forward(pixels: Tensor) -> Tensor:
            output = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype))
            features = F.normalize(output.pooler_output.float(), dim=-1)
            return features if head is None else head(features)

        # As Pillow images, whose channels cannot be mistaken: an array of 3 rows looks like one of 3 channels.
        pictures = [Image.fromarray(_middle(picture_of(medium))) for medium in media]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        return forward_rows(forward, self.rows, pixels)

    def _encode_text(self, prompt: str) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings  # 77 in every published CLIP
        tokens = self.processor.tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output


def check_clip(key: str, judge: CLIPJudgeConfig | AestheticJudgeConfig) -> CLIPConfig:
    """The config of a judge's CLIP, whose files are all there. Raises: Refused. Reads no weights."""
    folder = existing(f"{key}.path", judge.path, FOLDER)
    refuse_other_kinds(f"{key}.path", folder)
    model = on_meta(CLIPModel, folder)
    try:
        check_weights(folder, model)
    except Refused as error:
        raise Refused(f"{key}.path = '{folder}': {error}") from error
    load_processor(f"{key}.processor", judge.processor or folder, model.config)
    return model.config


class CLIPReward(Reward):
    """The `Reward` "clip": image feature · text feature, in [−1, 1], around 0.2–0.35 for real weights.

    As "pickscore" it is exp(logit scale) times that, around 20 for the published PickScore_v1.
    """

    def __init__(self, name: str, judge: CLIPJudgeConfig, device: str) -> None:
        self.features = CLIPFeatures(name, judge, device)
        self.name, self.version, self.device = name, self.features.version, device
        self.scale = self.features.scale if name == "pickscore" else 1.0

    @classmethod
    def check(cls, key: str, judge: CLIPJudgeConfig) -> None:
        check_clip(key, judge)

    @torch.inference_mode()
    def _scores(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """(Scaled) cosine of each picture with its prompt; sources and items are not read."""
        cosines = (self.features.images(media) * self.features.texts(prompts)).sum(dim=-1)
        return (self.scale * cosines).tolist()


def _middle(image: np.ndarray) -> np.ndarray:
    """A uint8 (H, W, 3) picture without what the centre crop would drop anyway: resized, a 1×10000 strip is 1.5 GB."""
    height, width = image.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[top : top + longest, left : left + longest]


def refuse_other_kinds(key: str, folder: Path) -> None:
    """Raise Refused, naming `key`, where a folder is none of a CLIPModel."""
    if not (folder / "config.json").is_file():
        raise Refused(f"{key} = '{folder}' has no config.json; give {FOLDER}")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise Refused(f"{key} = '{folder}' is a model of type {kind!r}, not 'clip'; give {FOLDER}")


def load_model(key: str, folder: Path) -> CLIPModel:
    """The CLIPModel at `folder`, fp32 on the CPU. Raises: Refused, naming `key`."""
    refuse_other_kinds(key, folder)
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
    refuse_broken(folder)
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    crop, size = processor.image_processor.crop_size["height"], config.vision_config.image_size
    if crop != size:
        raise Refused(f"{key}: '{folder}' crops pictures to {crop}, but the model reads {size}; give its own")
    tokens, known = len(processor.tokenizer), config.text_config.vocab_size
    if tokens > known:
        raise Refused(f"{key}: '{folder}' has {tokens} tokens, but the model knows {known}; give its own")
    return processor


# --- aesthetic ----------------------------------------------------------------------------------------------------------

HEAD = "sac+logos+ava1-l14-linearMSE.pth or a .safetensors of it"


def aesthetic_head(width: int) -> nn.Sequential:
    """Unit features (B, width) → ratings (B,). The numbers between those of the layers are the published file's dropouts."""
    shapes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    layers = nn.Sequential(OrderedDict((number, nn.Linear(*shape)) for number, shape in shapes.items()))
    return nn.Sequential(OrderedDict(layers=layers, rating=nn.Flatten(0)))


class AestheticReward(Reward):
    """The `Reward` "aesthetic": a rating, around 4–7 for real weights. Prompts, sources and items are not read."""

    def __init__(self, name: str, judge: AestheticJudgeConfig, device: str) -> None:
        """Raises: Refused, naming the key of the recipe."""
        self.name, self.device = name, device
        self.features = CLIPFeatures(name, judge, device)
        file = existing("judges.aesthetic.head", judge.head, HEAD)
        # Always fp32: its work is nothing beside the CLIP's, and each of its five products would round.
        self.head = load_head(file, self.features.model.config.projection_dim).to(device)
        self.version = f"{file.stem}@{quick_fingerprint(file)}+{self.features.version}"

    @classmethod
    def check(cls, key: str, judge: AestheticJudgeConfig) -> None:
        load_head(existing("judges.aesthetic.head", judge.head, HEAD), check_clip(key, judge).projection_dim)

    @torch.inference_mode()
    def _scores(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """The predicted rating of each picture."""
        return self.features.images(media, self.head).tolist()


def load_head(file: Path, width: int) -> nn.Sequential:
    """The predictor of `file` for features of `width`, fp32 on the CPU in eval mode.

    Raises: Refused if the file is not in the published layout or reads features of another width.
    """
    key = f"judges.aesthetic.head = '{file}'"
    safe = file.suffix == ".safetensors" and read_header(file)
    state: Any = load_file(file) if safe else read_torch(file)
    first = state.get("layers.0.weight") if isinstance(state, dict) else None
    if not isinstance(first, Tensor) or first.ndim != 2:
        raise Refused(f"{key} is no aesthetic predictor: it has no matrix `layers.0.weight`; give {HEAD}")
    if first.shape[1] != width:
        raise Refused(
            f"{key} reads features of width {first.shape[1]}, but judges.aesthetic.path is a CLIP of width {width}; "
            "give the CLIP that the head was trained on (the published one: ViT-L/14, width 768)"
        )
    head = aesthetic_head(width)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise Refused(f"{key} does not fit 768→1024→128→64→16→1: {error}; give {HEAD}") from error
    return head.float().eval().requires_grad_(False)
