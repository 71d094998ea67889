"""What a reward and a filter are: the two protocols that the judges speak, and the checks every score goes through.

A reward turns pictures into scalars (higher is better); a filter turns a picture into a verdict and is never a reward.
A judge that fails raises: there is no default score, no NaN, no "pass because the judge was silent".
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash

from rlhf.errors import Refused
from rlhf.types import Item, Verdict


class JudgeError(RuntimeError):
    """A judge gave no usable answer (not finite, wrong count, not a verdict). Its candidate is never scored."""


class JudgeUnreachable(JudgeError):
    """A judge elsewhere gave no answer at all: asking again picture by picture would only wait longer."""


@runtime_checkable
class Reward(Protocol):
    """Scores pictures in one batch. Implementations: `rlhf.rewards.REWARDS`, made by their `from_config`."""

    name: str
    """As reward.weights has it: "hps", "ctr", …"""
    version: str
    """Model name and a fingerprint of its weights, as /health reports them."""
    device: str

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str], items: Sequence[Item | None]) -> list[float]:
        """One finite scalar per picture, higher is better.

        images: uint8 (H, W, 3) RGB, sizes may differ; prompts and items: one per picture.
        Raises: Refused for inputs a caller can mend, JudgeError where the model gives no usable number.
        """
        ...


@runtime_checkable
class Filter(Protocol):
    """Judges pictures one at a time; concurrent calls are how an engine fills its batches."""

    name: str
    version: str
    device: str

    async def judge(self, image: np.ndarray, source: np.ndarray | None, prompt: str) -> Verdict:
        """The verdict on one edit. image, source: uint8 (H, W, 3) RGB; prompt: the edit instruction, may be empty.

        Raises: Refused for bad inputs, JudgeError where the model's answer is not a verdict.
        """
        ...

    async def close(self) -> None:
        """Free the engine or the connections."""
        ...


def checked_scores(name: str, scores: Sequence[float], count: int) -> list[float]:
    """`scores` as floats, or JudgeError if there are not `count` of them or one is not finite."""
    if len(scores) != count:
        raise JudgeError(f"reward {name!r} gave {len(scores)} scores for {count} images")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise JudgeError(f"reward {name!r} gave {score} for image {index} of {count}")
    return [float(score) for score in scores]


def check_batch(images: Sequence[np.ndarray], prompts: Sequence[str], items: Sequence[Item | None]) -> None:
    """ValueError unless there is one prompt and one item (or None) per picture."""
    if not len(images) == len(prompts) == len(items):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(items)} items: counts must agree")


def fingerprint(path: Path) -> str:
    """16 hex digits that name the weights at `path` (file or folder): names, sizes, first and last MiB of each file."""
    digest = xxhash.xxh3_64()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise Refused(f"{path}: no such file or empty folder")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read(2**20))
    return digest.hexdigest()
