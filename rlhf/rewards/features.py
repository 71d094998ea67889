"""What the rewards on CLIP-like encoders share: forwards of one fixed shape, a cache of prompts, a look at their paths.

Both keep one promise: a score never depends on what it was computed with. Its place and the size of a forward may change
its last bits, by the order of sums; features come back to the CPU, where the last sums run row by row.

Left out: the models and their transforms, which differ (`rlhf.rewards.hpsv2`, `rlhf.rewards.clip`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.errors import Refused

_CACHED_PROMPTS = 4096


def forward_rows(forward: Callable[[Tensor], Tensor], pixels: Tensor, rows: int | None) -> Tensor:
    """`forward` of pixels (B, 3, S, S), B ≥ 1, in fp32 on the CPU: (B, …).

    rows: every forward gets exactly so many pictures, black ones after the last, so that no bit of a picture's result
    depends on its neighbours, only on its place among them. None: one forward of all.
    """
    outputs = []
    for chunk in pixels.split(rows or len(pixels)):
        short = (rows or len(chunk)) - len(chunk)
        padded = F.pad(chunk, (0, 0) * (chunk.ndim - 1) + (0, short))
        outputs.append(forward(padded)[: len(chunk)].float().cpu())
    return torch.cat(outputs)


class TextFeatures:
    """Unit text features of prompts, of which the last used are kept.

    Each prompt is encoded alone, so that neither the cache nor a longer neighbour changes a score.
    """

    def __init__(self, encode: Callable[[str], Tensor], *, limit: int = _CACHED_PROMPTS) -> None:
        """encode: a prompt → its feature (1, D), of any length and on any device; limit: prompts kept."""
        self._encode = encode
        self._limit = limit
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) in fp32 on the CPU, B ≥ 1."""
        for prompt in prompts:
            if prompt not in self._known:
                self._known[prompt] = F.normalize(self._encode(prompt).float(), dim=-1)[0].cpu()
            self._known.move_to_end(prompt)
        features = torch.stack([self._known[prompt] for prompt in prompts])
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return features


def existing(key: str, path: Path | str | None, needed: str) -> Path:
    """`path` of the recipe's `key`. Raises: Refused where it is unset or nothing is there."""
    if path is None:
        raise Refused(f"{key} is not set; give {needed}")
    if not Path(path).exists():
        raise Refused(f"{key} = {str(path)!r} does not exist on this node; give {needed}")
    return Path(path)
