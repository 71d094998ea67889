"""Two rewards from their checkpoints, and asking a reward about pictures, which are media of one frame."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.rewards import load_reward
from rlhf.rewards.config import CTRJudgeConfig, HPSJudgeConfig
from rlhf.rewards.protocols import Reward
from rlhf.types import Item


def score(
    reward: Reward, pictures: Sequence[np.ndarray], prompts: Sequence[str], items: Sequence[Item] = ()
) -> list[float]:
    """The scores of uint8 (H, W, 3) pictures without sources; no items: nothing is known of any."""
    count = len(pictures)
    return reward.score([picture[None] for picture in pictures], prompts, [()] * count, items or [{}] * count)


def hps_reward(path: Path | str, *, batch_rows: int | None = None, **keys: Any) -> Reward:
    """HPSv2 on the CPU. batch_rows: every forward is padded to so many."""
    return load_reward("hps", HPSJudgeConfig(path=str(path), **_padded(batch_rows), **keys), "cpu")


def ctr_reward(path: Path | str, *, batch_rows: int | None = None, **keys: Any) -> Reward:
    """The CTR model on the CPU. batch_rows: see `hps_reward`."""
    return load_reward("ctr", CTRJudgeConfig(path=str(path), **_padded(batch_rows), **keys), "cpu")


def _padded(rows: int | None) -> dict[str, Any]:
    return {} if rows is None else {"pad_batches": True, "max_batch_size": rows}
