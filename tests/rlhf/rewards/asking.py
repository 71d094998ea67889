"""Asking a reward about pictures, which are media of one frame."""

from collections.abc import Sequence

import numpy as np

from rlhf.rewards.protocols import Reward
from rlhf.types import Item


def score(
    reward: Reward, pictures: Sequence[np.ndarray], prompts: Sequence[str], items: Sequence[Item] = ()
) -> list[float]:
    """The scores of uint8 (H, W, 3) pictures without sources; no items: nothing is known of any."""
    count = len(pictures)
    return reward.score([picture[None] for picture in pictures], prompts, [()] * count, items or [{}] * count)
