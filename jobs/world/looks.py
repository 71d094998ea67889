"""What editing changes in a photo of the miniature world: its light, colours, sharpness and background, and the instructions.

A look is five numbers: exposure (log of a factor), warmth (−1 cold … 1 warm), saturation (factor), blur (deviation in pixels) and
background (0 as photographed … 1 plain). A source is a photo under a dull look; an edit moves the look as the instruction says,
by an amount that is drawn, and jitters the rest, so that a model that learns the edits has candidates that differ.

B photos, H, W size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

EXPOSURE, WARMTH, SATURATION, BLUR, BACKGROUND = range(5)
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
REACH = 4
"""Pixels to each side that a blur reads."""

Kind = Literal["brighter", "warmer", "vivid", "sharper", "background", "improve"]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Instructions of one kind."""

    trained: tuple[str, ...]
    rephrased: tuple[str, ...] = ()
    """Never trained on."""


INSTRUCTIONS: dict[Kind, Words] = {
    "brighter": Words(
        trained=("Make the photo brighter.", "Brighten the picture.", "Give it more light."),
        rephrased=("A brighter picture, please.", "Make it lighter and brighter."),
    ),
    "warmer": Words(
        trained=("Make the light warmer.", "Give the picture a warm light.", "Use warm, sunny light."),
        rephrased=("Make it look warm and sunny.", "A warmer light, please."),
    ),
    "vivid": Words(
        trained=("Make the colours more vivid.", "Give it vivid colours.", "Raise the saturation of the colours."),
        rephrased=("More vivid colours, please.", "Raise the colours of the picture."),
    ),
    "sharper": Words(
        trained=("Make the photo sharper.", "Sharpen the details.", "Take the blur away."),
        rephrased=("A sharper picture, please.", "Sharpen the photo."),
    ),
    "background": Words(
        trained=("Clean up the background.", "Use a plain background.", "Take away what is behind the product."),
        rephrased=("A plain and clean background, please.", "Make the background plain."),
    ),
    "improve": Words(trained=("", "让照片更好看。", "让颜色更鲜艳。")),
}
"""T5 knows no Chinese, so Chinese says nothing more than an empty instruction: the model improves the photo as it likes."""
EMPTY_PROMPT = "A beautiful photo"
"""What rewards read in place of an empty instruction, in the demo's recipe too."""
KINDS: tuple[Kind, ...] = tuple(INSTRUCTIONS)


def draw_source(count: int, random: torch.Generator) -> Tensor:
    """Looks (B, 5) of dull, dark and blurred photos, of any warmth."""
    low, high = torch.tensor([[-0.65, -0.8, 0.35, 0.3, 0.0], [0.15, 0.6, 1.05, 1.4, 0.0]])
    return low + torch.rand(count, 5, generator=random) * (high - low)


def edit(look: Tensor, kinds: Tensor, random: torch.Generator) -> Tensor:
    """Looks (B, 5) after edits. kinds: (B,) indices into KINDS."""
    normal, uniform = (make(len(look), 5, generator=random) for make in (torch.randn, torch.rand))
    moved = look + normal * torch.tensor([0.10, 0.14, 0.10, 0.0, 0.0])
    least, most = torch.tensor([[0.15, 0.3, 0.25, 0.0, 0.7], [0.6, 1.0, 0.85, 0.0, 1.0]])
    strength = least + uniform * (most - least)
    for column in (EXPOSURE, WARMTH, SATURATION, BACKGROUND):
        asked = kinds == (KINDS.index("background") if column == BACKGROUND else column)
        moved[asked, column] = look[asked, column] + strength[asked, column]
    sharper, improve = (kinds == KINDS.index(kind) for kind in ("sharper", "improve"))
    moved[sharper, BLUR] = look[sharper, BLUR] * 0.4 * uniform[sharper, BLUR]
    free = normal * torch.tensor([0.22, 0.32, 0.24, 0.0, 0.0]) + torch.tensor([0.12, 0.15, 0.12, 0.0, 0.0])
    moved[improve] = look[improve] + free[improve]
    moved[improve, BLUR] = look[improve, BLUR] * (0.3 + 0.7 * uniform[improve, BLUR])
    low, high = torch.tensor([[-0.8, -1.0, 0.2, 0.0, 0.0], [0.6, 1.2, 1.8, 2.0, 1.0]])
    return moved.clamp(low, high)


def render(photos: Tensor, look: Tensor) -> Tensor:
    """Photos under looks. photos: uint8 (B, 2, H, W, 3) of `photos.photo`; look: (B, 5). Returns fp32 (B, 3, H, W) in 0 … 1."""
    photographed, plain = (photos[:, side].permute(0, 3, 1, 2).float() / 255 for side in (0, 1))
    exposure, warmth, saturation, _, background = (column.view(-1, 1, 1, 1) for column in look.unbind(1))
    picture = blurred(photographed + background * (plain - photographed), look[:, BLUR])
    grey = (picture * LUMA).sum(1, keepdim=True)
    gains = 1 + warmth * torch.tensor([0.22, 0.04, -0.26]).view(3, 1, 1)
    return ((grey + saturation * (picture - grey)) * gains * exposure.exp()).clamp(0, 1)


def blurred(pictures: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur of (B, C, H, W), each by its own deviation (B,) in pixels; 0: as it is."""
    batch, channels, height, width = pictures.shape
    places = torch.arange(-REACH, REACH + 1.0)
    weights = torch.exp(-0.5 * (places / deviation.clamp_min(0.05)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    rows = F.pad(pictures, (REACH,) * 4, mode="replicate").reshape(
        1, batch * channels, *(n + 2 * REACH for n in (height, width))
    )
    for kernel in (weights[:, :, :, None], weights[:, :, None, :]):
        rows = F.conv2d(rows, kernel, groups=batch * channels)
    return rows.reshape(pictures.shape)


def to_uint8(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in 0 … 1 to uint8 (B, H, W, 3)."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
