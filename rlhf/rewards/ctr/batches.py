"""Rows of a click log as batches of tensors: decoded once, shuffled by a seed, shared out to the ranks.

Left out: augmentation other than mirroring. Brightness, colour and sharpness are what clicks depend on.

Shapes: B rows, S pixels, L tokens.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.media import decode_image
from rlhf.errors import Refused
from rlhf.rewards.ctr.clicks import Click
from rlhf.rewards.ctr.config import CTRTrainConfig
from rlhf.rewards.ctr.model import CTRModelConfig, encode_items, transform


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's rows of a batch: pixels (B, 3, S, S), ids and mask (B, L), as long as the longest text, the others (B,)."""

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    rate: Tensor
    impressions: Tensor
    """0: unknown"""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer update is made of."""

    batches: Iterable[Batch]
    """This rank's shares, `count` of them."""
    count: int
    impressions: float
    """Of all these batches on all ranks."""


class Batches:
    """Reads rows for one of `config.ranks` ranks; every rank gets the same number of updates, batches and rows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: CTRModelConfig, config: CTRTrainConfig, rank: int = 0
    ) -> None:
        self.tokenizer, self.model, self.config, self.rank = tokenizer, model, config, rank
        self._pixels = lru_cache(2**30 // (12 * model.image_size**2))(  # as many as a GiB holds
            lambda path: transform(decode_image(path.read_bytes()), model.image_size)
        )

    def epoch(self, clicks: Sequence[Click], seed: int) -> Iterator[Update]:
        """The updates of an epoch in an order given by `seed`, pictures mirrored half of the time.

        A last batch that is not full is left out; a last update that is not full has fewer batches.
        """
        rng, size = np.random.default_rng(seed), self._size(len(clicks))
        shape = (len(clicks) // size, size)
        order = rng.permutation(len(clicks))[: math.prod(shape)].reshape(shape)
        mirrored = rng.random(shape) < 0.5
        mine = slice(self.rank, None, self.config.ranks)
        rows = ([clicks[i] for i in places] for places in order[:, mine].tolist())
        batches = self._prefetched(zip(rows, mirrored[:, mine], strict=True))
        for start in range(0, len(order), self.config.gradient_accumulation_steps):
            part = order[start : start + self.config.gradient_accumulation_steps]
            impressions = float(sum(clicks[i].impressions or 0 for i in part.ravel().tolist()))
            yield Update(batches=islice(batches, len(part)), count=len(part), impressions=impressions)

    def updates(self, rows: int) -> int:
        """Updates of an epoch over so many rows."""
        return -(-(rows // self._size(rows)) // self.config.gradient_accumulation_steps)

    def _size(self, rows: int) -> int:
        """Rows of a batch over all ranks: fewer than configured where the log has fewer."""
        size = min(self.config.batch_size, rows // self.config.ranks * self.config.ranks)
        if not size:
            raise Refused(f"{rows} training rows cannot be shared by train.ranks = {self.config.ranks}; lower it")
        return size

    def ordered(self, clicks: Sequence[Click]) -> Iterator[Batch]:
        """These rows in order, as they are; nothing is shared out."""
        size = self.config.batch_size // self.config.ranks
        groups = (clicks[start : start + size] for start in range(0, len(clicks), size))
        return self._prefetched((group, np.zeros(len(group), dtype=bool)) for group in groups)

    def _prefetched(self, rows: Iterable[tuple[Sequence[Click], np.ndarray]]) -> Iterator[Batch]:
        """The batches of (rows, which of them are mirrored), each made while the one before is used."""
        made = (self._batch(*both) for both in rows)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, made, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, made, None)
                yield Batch(**{name: tensor.to(self.config.device) for name, tensor in vars(batch).items()})

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
