"""The aesthetic judge of the miniature world: a small model in HPSv2's format, trained on simulated preferences.

What is liked: contrast, fine detail, no burnt-out light, and what the instruction asked for; clicks have no part in it. Of two
edits of a photo one is chosen with P = σ(SURENESS × difference in liking). The loss is HPSv2's, cross entropy over the two
cosines (Wu et al., arXiv 2306.09341, eq. 2), at a fixed temperature.
"""

import json
import math
from functools import cache
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.world.data import Shots, random_of
from jobs.world.looks import EMPTY_PROMPT, INSTRUCTIONS, KINDS, LUMA, draw_source, edit, render, to_uint8
from jobs.world.truth import as_pixels, attributes
from rlhf.rewards.hpsv2 import transform
from rlhf.rewards.tiny import CLIP_CONFIG

BATCH, LEARNING_RATE, WARMUP = 24, 1e-3, 50
TEMPERATURE = 20.0
SURENESS = 3.0
"""Log-odds of a choice per unit of difference."""


def liking(pictures: Tensor, kinds: Tensor) -> Tensor:
    """How much uint8 (B, H, W, 3) pictures are liked as answers to instructions of kinds (B,), of deviation about 1."""
    shown, pixels = attributes(pictures), as_pixels(pictures)
    grey = (pixels * LUMA).sum(1)
    general = 6 * grey.std((1, 2)) + 0.3 * shown.sharpness - 4 * (pixels > 0.98).float().mean((1, 2, 3))
    asked = torch.stack(
        [
            (shown.brightness - 0.45) / 0.12,
            (shown.warmth - 0.1) / 0.25,
            (shown.vividness - 0.28) / 0.1,
            (shown.sharpness - 1.4) / 0.5,
            (0.07 - shown.clutter) / 0.03,
            torch.zeros(len(pixels)),
        ],
        dim=1,
    )
    return general + 1.5 * torch.tanh(asked.gather(1, kinds[:, None])[:, 0] / 2)


def choices(shots: Shots, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two edits of each of `count` photos, uint8 (2, count, H, W, 3), the kind that was asked for (count,), and by how much the
    first is liked more (count,). The second edit is of the same or another kind.
    """
    rows = torch.randint(len(shots), (count,), generator=random)
    look = draw_source(count, random)
    kinds, others = (torch.randint(len(KINDS), (count,), generator=random) for _ in range(2))
    others = torch.where(torch.rand(count, generator=random) < 0.5, kinds, others)
    pair = torch.stack([to_uint8(render(shots.photos[rows], edit(look, kind, random))) for kind in (kinds, others)])
    return pair, kinds, liking(pair[0], kinds) - liking(pair[1], kinds)


def train_hps(shots: Shots, *, steps: int, seed: int) -> open_clip.CLIP:
    """A model whose cosine of picture and instruction is higher for what is liked more."""
    torch.manual_seed(seed)
    model, random = open_clip.CLIP(**CLIP_CONFIG), random_of(seed, "hps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * cosine + 1e-5
        pair, kinds, ahead = choices(shots, BATCH, random)
        which = int(torch.randint(3, (), generator=random))
        first, second = (cosines(model, side, kinds, which) for side in pair)
        taken = torch.sigmoid(SURENESS * ahead)
        loss = F.binary_cross_entropy_with_logits(TEMPERATURE * (first - second), taken)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().requires_grad_(False)


def cosines(model: open_clip.CLIP, pictures: Tensor, kinds: Tensor, which: int = 0) -> Tensor:
    """Of uint8 (B, H, W, 3) pictures with the instructions of their kinds, (B,). which: of each kind's wordings."""
    text = F.normalize(model.encode_text(_tokens(model.context_length, which)), dim=-1)
    size = CLIP_CONFIG["vision_cfg"]["image_size"]
    pixels = torch.stack([transform(picture.numpy(), size) for picture in pictures])
    return (F.normalize(model.encode_image(pixels), dim=-1) * text[kinds]).sum(1)


@cache
def _tokens(length: int, which: int) -> Tensor:
    """(kinds, length) of a wording of each kind."""
    wordings = [words.trained[which % len(words.trained)] or EMPTY_PROMPT for words in INSTRUCTIONS.values()]
    return open_clip.SimpleTokenizer(context_length=length)(wordings)


def accuracy(model: open_clip.CLIP, shots: Shots, count: int, seed: int) -> float:
    """Share of pairs whose better picture has the higher cosine."""
    pair, kinds, ahead = choices(shots, count, random_of(seed, "hps test"))
    with torch.inference_mode():
        first, second = (cosines(model, side, kinds) for side in pair)
    return ((first > second) == (ahead > 0)).float().mean().item()


def save(model: open_clip.CLIP, file: Path) -> None:
    """In half precision: nine in ten weights are the token table that CLIP's vocabulary asks for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items() if name != "attn_mask"}, file
    )
    file.with_suffix(".json").write_text(json.dumps(CLIP_CONFIG, indent=2))
