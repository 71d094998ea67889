"""Rows of a click log as batches of tensors: decoded once, shuffled by a seed, shared out to the ranks.

Left out: augmentation other than mirroring. Brightness, colour and sharpness are what clicks depend on.

Shapes: B rows, S pixels, L tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.media import decode_image
from rlhf.errors import Refused
from rlhf.rewards.ctr.clicks import Click
from rlhf.rewards.ctr.config import CTRTrainConfig
from rlhf.rewards.ctr.model import CTRModelConfig, encode_items, transform

_CACHE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's rows of a batch."""

    pixels: Tensor
    """(B, 3, S, S)"""
    ids: Tensor
    """(B, L), as long as the longest text of the batch"""
    mask: Tensor
    """(B, L)"""
    rate: Tensor
    """(B,)"""
    impressions: Tensor
    """(B,); 0: unknown"""

    def to(self, device: str) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer update is made of."""

    batches: Iterable[Batch]
    """This rank's shares, `count` of them."""
    count: int
    impressions: float
    """Of all these batches on all ranks."""


class Batches:
    """Reads rows for one of `world` ranks; every rank gets the same number of updates, batches and rows."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: CTRModelConfig,
        config: CTRTrainConfig,
        device: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.tokenizer, self.model, self.config, self.device = tokenizer, model, config, device
        self.rank, self.world = rank, world
        self._pixels = lru_cache(_CACHE_BYTES // (12 * model.image_size**2))(self._load)

    def epoch(self, clicks: Sequence[Click], seed: int) -> Iterator[Update]:
        """The updates of an epoch in an order given by `seed`, pictures mirrored half of the time.

        A last batch that is not full is left out; a last update that is not full has fewer batches.
        """
        rng = np.random.default_rng(seed)
        order, size = rng.permutation(len(clicks)), self._size(len(clicks))
        groups = [[clicks[i] for i in order[start : start + size]] for start in range(0, len(clicks) - size + 1, size)]
        mirrored = [rng.random(size) < 0.5 for _ in groups]
        mine = slice(self.rank, None, self.world)
        batches = self._prefetched([group[mine] for group in groups], [flips[mine] for flips in mirrored])
        for start in range(0, len(groups), self.config.gradient_accumulation_steps):
            part = groups[start : start + self.config.gradient_accumulation_steps]
            impressions = float(sum(click.impressions or 0 for group in part for click in group))
            yield Update(batches=islice(batches, len(part)), count=len(part), impressions=impressions)

    def updates(self, rows: int) -> int:
        """Updates of an epoch over so many rows."""
        return -(-(rows // self._size(rows)) // self.config.gradient_accumulation_steps)

    def _size(self, rows: int) -> int:
        """Rows of a batch over all ranks: fewer than configured where the log has fewer."""
        size = min(self.config.batch_size, rows // self.world * self.world)
        if not size:
            raise Refused(f"{rows} training rows cannot be shared by train.ranks = {self.world}; lower it")
        return size

    def ordered(self, clicks: Sequence[Click]) -> Iterator[Batch]:
        """These rows in order, as they are; nothing is shared out."""
        size = max(1, self.config.batch_size // self.world)
        groups = [clicks[start : start + size] for start in range(0, len(clicks), size)]
        return self._prefetched(groups, [np.zeros(len(group), dtype=bool) for group in groups])

    def _prefetched(self, groups: Sequence[Sequence[Click]], mirrored: Sequence[np.ndarray]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._batch, *both) for both in zip(groups[:1], mirrored[:1], strict=True)]
            for index in range(len(groups)):
                if index + 1 < len(groups):
                    coming.append(pool.submit(self._batch, groups[index + 1], mirrored[index + 1]))
                yield coming.pop(0).result().to(self.device)

    def _batch(self, clicks: Sequence[Click], mirrored: np.ndarray) -> Batch:
        pixels = torch.stack([self._pixels(click.image) for click in clicks])
        ids, mask = encode_items(self.tokenizer, [click.item for click in clicks], self.model.max_tokens)
        length = int(mask.sum(1).max())  # padding is masked: without it the result is the same, sooner
        return Batch(
            pixels=torch.where(torch.from_numpy(mirrored)[:, None, None, None], pixels.flip(-1), pixels),
            ids=ids[:, :length],
            mask=mask[:, :length],
            rate=torch.tensor([click.rate for click in clicks]),
            impressions=torch.tensor([float(click.impressions or 0) for click in clicks]),
        )

    def _load(self, path: Path) -> Tensor:
        return transform(decode_image(path.read_bytes()), self.model.image_size)
