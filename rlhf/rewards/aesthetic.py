"""LAION aesthetic predictor: how much people like a picture on average, from its CLIP ViT-L/14 feature alone.

Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`. Five linear layers
without activations on the unit feature, trained on ratings from 1 to 10; the prompt is not read.

Left out: the other heads of that repository, which have activations or one layer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.errors import Refused
from rlhf.rewards.clip import CLIPFeatures
from rlhf.rewards.config import AestheticJudgeConfig
from rlhf.rewards.features import existing
from rlhf.rewards.protocols import Sources, check_batch, checked_scores, fingerprint
from rlhf.types import Item

HEAD = "sac+logos+ava1-l14-linearMSE.pth or a .safetensors of it"


class AestheticHead(nn.Module):
    """Unit features (B, D) → ratings (B,). `layers` numbers the linear ones 0, 2, 4, 6, 7, as the published file does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


class AestheticReward:
    """The `Reward` "aesthetic": a rating, around 4–7 for real weights. Prompts, sources and items are not read."""

    name = "aesthetic"

    def __init__(self, features: CLIPFeatures, head: Path | str | None) -> None:
        """head: the predictor's file. Raises: Refused, naming judges.aesthetic.head."""
        file = existing("judges.aesthetic.head", head, HEAD)
        self.features = features
        # Always fp32: its work is nothing beside the CLIP's, and each of its five products would round.
        self.head = load_head(file, features.model.config.projection_dim).to(features.device)
        self.version = f"{file.stem}@{fingerprint(file)}+{features.version}"
        self.device = features.device

    @classmethod
    def from_config(cls, name: str, judge: AestheticJudgeConfig, device: str) -> Self:
        """`judges.aesthetic` on `device`."""
        return cls(CLIPFeatures.from_config(name, judge, device), judge.head)

    @torch.inference_mode()
    def score(
        self, media: Sequence[np.ndarray], prompts: Sequence[str], sources: Sequence[Sources], items: Sequence[Item]
    ) -> list[float]:
        """The predicted rating of each picture. See `Reward.score`."""
        check_batch(media, prompts, sources, items)
        if not media:
            return []
        return checked_scores(self.name, self.features.images(media, self.head).tolist(), len(media))


def load_head(file: Path, width: int) -> AestheticHead:
    """The predictor of `file` for features of `width`, fp32 on the CPU in eval mode.

    Raises: Refused if the file is not in the published layout or reads features of another width.
    """
    key = f"judges.aesthetic.head = '{file}'"
    state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    first = state.get("layers.0.weight") if isinstance(state, dict) else None
    if not isinstance(first, Tensor) or first.ndim != 2:
        raise Refused(f"{key} is no aesthetic predictor: it has no matrix `layers.0.weight`; give {HEAD}")
    if first.shape[1] != width:
        raise Refused(
            f"{key} reads features of width {first.shape[1]}, but judges.aesthetic.path is a CLIP of width {width}; "
            "give the CLIP that the head was trained on (the published one: ViT-L/14, width 768)"
        )
    head = AestheticHead(width)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise Refused(f"{key} does not fit 768→1024→128→64→16→1: {error}; give {HEAD}") from error
    return head.float().eval().requires_grad_(False)
