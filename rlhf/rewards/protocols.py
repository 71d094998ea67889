"""What a reward and a filter are: the two protocols that the judges speak, and the checks every score goes through.

A reward turns media into scalars (higher is better); a filter turns a picture into a verdict and is never a reward.
A judge that fails raises: there is no default score, no NaN, and no verdict without an answer.

Shapes: F frames (a picture has one), H W pixels.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from rlhf.errors import Refused
from rlhf.types import Item, Verdict

Sources = tuple[np.ndarray, ...]
"""What one medium was made from: uint8 (F, H, W, 3) each, as the model saw them; empty where the judge reads none."""
Media = Sequence[np.ndarray]
"""uint8 (F, H, W, 3) each; sizes may differ."""
Items = Sequence[Item]


class JudgeError(RuntimeError):
    """A judge gave no usable answer (not finite, wrong count, not a verdict). Its candidate is never scored."""


class JudgeUnreachable(JudgeError):
    """A judge elsewhere gave no answer at all: asking again picture by picture would only wait longer."""


@runtime_checkable
class Reward(Protocol):
    """Scores media in one batch. Implementations: `rlhf.rewards.REWARDS`, called with (name, table, device).

    Its config class declares how many frames it reads and whether it reads sources (`JudgeConfig.frames`, `reads_sources`).
    Where that depends on the recipe (a function of the user's, a service), the reward has an attribute `reads_sources`.
    """

    name: str
    """As reward.weights has it: "hps", "ctr", …"""
    version: str
    """Model name and a fingerprint of its weights, as /health reports them."""
    device: str

    @classmethod
    def check(cls, key: str, judge: Any) -> None:
        """Raise Refused where a judge's table, the recipe's `key`, names what is not what it should be. Reads no weights."""

    def score(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """One finite scalar per medium, higher is better.

        media: RGB with at most the config's `frames`; prompts, sources and items: one per medium, an item is empty where
        nothing is known.
        Raises: Refused for inputs a caller can mend, JudgeError where the model gives no usable number.
        """
        check_batch(media, prompts, sources, items)
        scores = self._scores(media, prompts, sources, items) if media else []
        if len(scores) != len(media):
            raise JudgeError(f"reward {self.name!r} gave {len(scores)} scores for {len(media)} media")
        for index, score in enumerate(scores):
            if not abs(score) <= sys.float_info.max:  # NaN neither
                raise JudgeError(f"reward {self.name!r} gave {score} for medium {index} of {len(media)}")
        return [float(score) for score in scores]

    def _scores(
        self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items
    ) -> Sequence[float]:
        """What `score` gives, before it is checked. Its arguments are checked, and there is at least one medium."""


@runtime_checkable
class Filter(Protocol):
    """Judges pictures one at a time; concurrent calls are how an engine fills its batches."""

    version: str
    device: str

    async def judge(self, image: np.ndarray, sources: Sources, prompt: str) -> Verdict:
        """The verdict on one edit. Raises: Refused for bad inputs, JudgeError where the model's answer is not a verdict.

        image: uint8 (H, W, 3) RGB; sources: pictures of that kind, what was edited, empty where the filter is not to see
        them; prompt: the edit instruction, may be empty.
        """

    async def close(self) -> None:
        """Free the engine or the connections."""


def as_media(array: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) of a picture (H, W, 3) or of media, as a view. Raises: ValueError for anything that is no uint8 RGB."""
    if not isinstance(array, np.ndarray):  # ValueError on purpose: it is a caller's mistake like the next one
        raise ValueError(f"media must be a numpy array uint8 (F, H, W, 3), not {type(array).__name__}")
    media = array[None] if array.ndim == 3 else array
    if media.dtype != np.uint8 or media.ndim != 4 or media.shape[3] != 3 or 0 in media.shape:
        raise ValueError(f"media are uint8 (F, H, W, 3), a picture uint8 (H, W, 3), not {array.dtype} {array.shape}")
    return media


def frames_of(medium: np.ndarray, count: int) -> np.ndarray:
    """At most `count` frames (F, H, W, 3) of a medium, evenly spread over it; one frame is the one in its middle."""
    length = len(medium)
    return medium if length <= count else medium[[(2 * i + 1) * length // (2 * count) for i in range(count)]]


def picture_of(medium: np.ndarray) -> np.ndarray:
    """(H, W, 3), the one frame of a medium. Raises: ValueError where it has more."""
    if len(medium) != 1:
        raise ValueError(f"a reward of pictures was given {len(medium)} frames; choose one with `frames_of`")
    return medium[0]


def check_batch(media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> None:
    """ValueError unless all are media, with one prompt, one tuple of sources and one item for each."""
    counts = len(media), len(prompts), len(sources), len(items)
    if len(set(counts)) > 1:
        raise ValueError("{} media, {} prompts, {} sources and {} items: counts must agree".format(*counts))
    for medium in itertools.chain(media, *sources):
        as_media(medium)
        if medium.ndim != 4:
            raise ValueError(f"each medium must be uint8 (F, H, W, 3), not a picture {medium.shape}")


def check_columns(judge: str, columns: Sequence[str], item: Item) -> None:
    """Refused, naming what is missing, unless the item has all `columns` that the judge reads."""
    if missing := [column for column in columns if column not in item]:
        there = ", ".join(item) or "none"
        reads = f"the judge {judge!r} reads the item columns {', '.join(columns)}"
        raise Refused(f"{reads}; missing: {', '.join(missing)} (there: {there})")


def quick_fingerprint(path: Path) -> str:
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
