"""What the rewards with an encoder share: the frame of a picture, forwards of one fixed shape, a cache of prompts, a path.

All keep one promise: a score never depends on what it was computed with. Its place and the size of a forward may change
its last bits, by the order of sums; features come back to the CPU, where the last sums run row by row.

Left out: the models, which differ (`rlhf.rewards.hpsv2`, `rlhf.rewards.clip`, `rlhf.rewards.ctr.model`).
"""

import pickle
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from rlhf.errors import Refused, last_line
from rlhf.shards.files import AGAIN, refuse_pointer

Channels = tuple[float, float, float]


def letterbox(
    image: np.ndarray, size: int, interpolation: InterpolationMode, *, fill: float, mean: Channels, std: Channels
) -> Tensor:
    """A uint8 (H, W, 3) picture whole in a square: fp32 (3, size, size), its longest side `size`, normalised.

    fill: value around its centre, from 0 (black) to 1 (white).
    """
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    height, width = tensor.shape[1:]
    scale = size / max(height, width)
    if scale != 1.0:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        tensor = resize(tensor, [height, width], interpolation, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    tensor = F.pad(tensor, [left, size - width - left, top, size - height - top], value=fill)
    return (tensor - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def forward_rows(forward: Callable[..., Tensor], rows: int | None, *inputs: Tensor) -> Tensor:
    """`forward` of the inputs (B, …), B ≥ 1, in fp32 on the CPU: (B, …).

    rows: every forward gets exactly so many, copies of the last row at the end, so that no bit of a row's result depends on
    its neighbours, only on its place among them. None: one forward of all.
    """
    count = len(inputs[0])
    rows = rows or count
    places = torch.arange(-(-count // rows) * rows).clamp(max=count - 1).split(rows)
    outputs = [forward(*(values[chosen] for values in inputs)).float().cpu() for chosen in places]
    return torch.cat(outputs)[:count]


def cached_texts(encode: Callable[[str], Tensor], limit: int = 4096) -> Callable[[Sequence[str]], Tensor]:
    """From B ≥ 1 prompts to their unit features (B, D) in fp32 on the CPU; those of the `limit` last used are kept.

    encode: a prompt → its feature (1, D), of any length and on any device. Each prompt is encoded alone, so that neither
    the cache nor a longer neighbour changes a score.
    """

    @lru_cache(limit)
    def unit(prompt: str) -> Tensor:
        return F.normalize(encode(prompt).float(), dim=-1)[0].cpu()

    return lambda prompts: torch.stack([unit(prompt) for prompt in prompts])


def read_torch(file: Path, device: str = "cpu") -> Any:
    """What a .pt or .pth file holds, without running code of its own; on "meta" no tensor is read. Raises: Refused."""
    refuse_pointer(file)
    try:
        return torch.load(file, device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        raise Refused(f"{file} holds no weights of PyTorch: {last_line(error)}; {AGAIN}") from error


def existing(key: str, path: Path | str | None, needed: str) -> Path:
    """`path` of the recipe's `key`. Raises: Refused where it is unset or nothing is there."""
    if path is None:
        raise Refused(f"{key} is not set; give {needed}")
    if not Path(path).exists():
        raise Refused(f"{key} = {str(path)!r} does not exist on this node; give {needed}")
    return Path(path)
