"""What is true in the miniature world and no reward is trained on: what a picture shows, how often it is clicked, what it kept.

B pictures, H, W size; pictures are uint8 (B, H, W, 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.world.looks import LUMA, blurred
from jobs.world.photos import Colour
from rlhf.types import Item

EPSILON = 0.05


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is sold. `taste`: what it adds to the logit of a click, whatever its photo; no model is given it."""

    name: str
    type: str
    scene: str
    colour: Colour

    @property
    def taste(self) -> float:
        """Added to the log-odds of a click, −0.4 … 0.4."""
        names = [product.name for product in PRODUCTS]
        return 0.4 * math.sin(2.4 * names.index(self.name)) if self.name in names else 0.0


PRODUCTS = tuple(
    Product(name=name, type=kind, scene=scene, colour=colour)
    for name, kind, scene, colour in (
        ("Red apples", "Fruit", "fruit", (0.78, 0.13, 0.12)),
        ("Oranges", "Fruit", "fruit", (0.95, 0.52, 0.1)),
        ("Limes", "Fruit", "fruit", (0.45, 0.68, 0.2)),
        ("Plums", "Fruit", "fruit", (0.42, 0.16, 0.36)),
        ("Lemons", "Fruit", "fruit", (0.95, 0.83, 0.2)),
        ("番茄汤", "Soup", "soup", (0.82, 0.28, 0.12)),
        ("Pumpkin soup", "Soup", "soup", (0.92, 0.58, 0.16)),
        ("Pea soup", "Soup", "soup", (0.5, 0.62, 0.25)),
        ("牛肉面", "Noodles", "soup", (0.62, 0.38, 0.18)),
        ("Oat milk", "Dairy", "boxes", (0.84, 0.78, 0.66)),
        ("Tea box", "Drinks", "boxes", (0.25, 0.46, 0.36)),
        ("Blue biscuits", "Snacks", "boxes", (0.2, 0.32, 0.7)),
        ("Rosé", "Drinks", "bottles", (0.85, 0.45, 0.48)),
        ("Olive oil", "Pantry", "bottles", (0.55, 0.55, 0.2)),
        ("Lemonade", "Drinks", "bottles", (0.9, 0.82, 0.3)),
        ("Water", "Drinks", "bottles", (0.3, 0.55, 0.75)),
        ("Chocolate cake", "Bakery", "cake", (0.36, 0.22, 0.14)),
        ("草莓蛋糕", "Bakery", "cake", (0.88, 0.5, 0.55)),
        ("Sponge cake", "Bakery", "cake", (0.9, 0.75, 0.45)),
        ("Coffee", "Drinks", "cup", (0.3, 0.18, 0.1)),
        ("Matcha", "Drinks", "cup", (0.5, 0.62, 0.3)),
        ("Tomato juice", "Drinks", "cup", (0.8, 0.25, 0.15)),
    )
)


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What pictures show, each (B,)."""

    brightness: Tensor
    """Mean of red, green and blue, 0 … 1."""
    warmth: Tensor
    """(mean red − mean blue) / brightness."""
    vividness: Tensor
    """Mean of (largest − smallest channel) / largest, 0 … 1."""
    sharpness: Tensor
    """Log of the second differences' size relative to the first ones'."""
    clutter: Tensor
    """Deviation over the upper quarter, where the background is."""


def as_pixels(pictures: np.ndarray | Tensor) -> Tensor:
    """fp32 (B, 3, H, W) in 0 … 1."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255


def attributes(pictures: np.ndarray | Tensor) -> Attributes:
    pixels = as_pixels(pictures)
    mean = pixels.mean((2, 3))
    brightness, grey = mean.mean(1), (pixels * LUMA).sum(1)
    first = (grey[..., 1:] - grey[..., :-1]).abs().mean((1, 2))
    middle, around = grey[:, 1:-1, 1:-1], (grey[:, :-2, 1:-1], grey[:, 2:, 1:-1], grey[:, 1:-1, :-2], grey[:, 1:-1, 2:])
    second = (4 * middle - sum(around)).square().mean((1, 2)).sqrt()
    upper = pixels[:, :, : pixels.shape[2] // 4]
    return Attributes(
        brightness=brightness,
        warmth=(mean[:, 0] - mean[:, 2]) / brightness.clamp_min(EPSILON),
        vividness=((pixels.amax(1) - pixels.amin(1)) / pixels.amax(1).clamp_min(EPSILON)).mean((1, 2)),
        sharpness=torch.log(second / first.clamp_min(1e-3) + 1e-3),
        clutter=upper.std((2, 3)).mean(1),
    )


def true_rate(pictures: np.ndarray | Tensor, products: Sequence[Product]) -> Tensor:
    """The probability of a click on each picture of its product, (B,).

    It has an optimum of brightness, warmth and vividness, rises with sharpness, falls with clutter, and falls where the middle of
    the picture has lost the product's own colour.
    """
    shown = attributes(pictures)
    logit = -0.9 + torch.tensor([product.taste for product in products])
    logit = (
        logit
        - 14 * (shown.brightness - 0.56) ** 2
        - 3.5 * (shown.warmth - 0.3) ** 2
        - 5 * (shown.vividness - 0.45) ** 2
    )
    logit = logit + 0.4 * (shown.sharpness - 1.3).clamp(-1, 1) - 6 * shown.clutter
    return torch.sigmoid(logit + 0.6 * _own_colour(pictures, products))


def _own_colour(pictures: np.ndarray | Tensor, products: Sequence[Product]) -> Tensor:
    """Cosine of the middle's colour, without its grey, and the product's, −1 … 1."""
    pixels = as_pixels(pictures)
    height, width = pixels.shape[2:]
    middle = pixels[:, :, height // 3 : -height // 5, width // 4 : -width // 4].mean((2, 3))
    own = torch.tensor(np.array([product.colour for product in products]), dtype=torch.float32)
    return F.cosine_similarity(*(colour - colour.mean(1, keepdim=True) for colour in (middle, own)))


def kept(sources: np.ndarray | Tensor, edits: np.ndarray | Tensor) -> Tensor:
    """How much of the subject an edit kept, (B,): the correlation of the fine brightness of both in the middle of the picture.

    Fine: the logarithm of the brightness, softened by one pixel, less its own blur by four. So light, colour and sharpness alone
    leave it near 1; pictures that have nothing to do with each other come to about 0.
    """
    fine = []
    for pictures in (sources, edits):
        grey = ((as_pixels(pictures) * LUMA).sum(1, keepdim=True) + EPSILON).log()
        one, four = (blurred(grey, torch.full((len(grey),), float(deviation))) for deviation in (1, 4))
        height, width = grey.shape[2:]
        middle = (one - four)[:, 0, height // 3 : -height // 8, width // 6 : -width // 6].flatten(1)
        fine.append(middle - middle.mean(1, keepdim=True))
    return F.cosine_similarity(*fine)


def product_of(item: Item) -> Product:
    """The product of a row of metadata; one that is not sold here, as in a probe, has neither taste nor colour."""
    other = Product(name=item["food_name"], type="", scene="", colour=(0.5, 0.5, 0.5))
    return next((product for product in PRODUCTS if product.name == other.name), other)


def true_rate_judge(images: Sequence[np.ndarray], prompts: Sequence[str], items: Sequence[Item]) -> list[float]:
    """`true_rate` as a function for [judges.python]: to be looked at, with weight 0, and never trained on."""
    return true_rate(np.stack(images), [product_of(item) for item in items]).tolist()


def kept_judge(
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    sources: Sequence[Sequence[np.ndarray]],
    items: Sequence[Item],
) -> list[float]:
    """`kept` of each edit and its source, likewise."""
    return kept(np.stack([source for source, *_ in sources]), np.stack(images)).tolist()
