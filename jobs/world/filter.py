"""The quality filter of the miniature world: a small Qwen3-VL that answers PASS or FAIL, and after FAIL gives a reason.

The reason is one of five sentences. It is trained less than the verdict and often names another fault than the picture has.

From the whole prompt it learns nothing at first: its two layers do not find the picture among some two hundred tokens. So it
begins with the prompt from `<|vision_start|>` on, then with random parts of what comes before, and at last with the prompt as
vLLM gives it. Sound pictures must include what the VAE and the base model make, or the filter learns to tell those from
renderings.

B pictures, H, W size, uint8 (B, H, W, 3); L tokens.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.world.data import SIZE
from jobs.world.looks import INSTRUCTIONS
from rlhf.rewards.filters import FAIL, PASS, build_messages, reason_messages
from rlhf.rewards.tiny import write_qwen3_vl

BATCH, LEARNING_RATE, WARMUP, WIDTH = 16, 2e-3, 50, 0.05
LEAST_PIXELS = (2 * SIZE) ** 2
"""A visual token is 32×32 pixels: pictures are enlarged, or there would be four of them."""
SHORT, RANDOM = 0.5, 0.7
"""Until these shares of the steps the prompt begins at the picture, then anywhere before it."""


def noise(picture: Tensor, random: np.random.Generator) -> Tensor:
    return picture + float(random.uniform(25, 90)) * torch.from_numpy(random.standard_normal(picture.shape)).float()


def blocks(picture: Tensor, random: np.random.Generator) -> Tensor:
    """Squares of the picture in one wrong colour, where the grid of a codec would have them."""
    broken = picture.clone()
    for _ in range(int(random.integers(5, 12))):
        y, x = (8 * int(random.integers(0, SIZE // 8)) for _ in range(2))
        broken[y : y + 8, x : x + 8] = torch.from_numpy(random.uniform(0, 255, 3)).float()
    return broken


def torn(picture: Tensor, random: np.random.Generator) -> Tensor:
    """Strips that slid sideways."""
    broken = picture.clone()
    for start in range(0, SIZE, 8):
        broken[start : start + 8] = picture[start : start + 8].roll(int(random.integers(-20, 21)), 1)
    return broken


def doubled(picture: Tensor, random: np.random.Generator) -> Tensor:
    """Two narrow copies side by side, one perhaps lower."""
    narrow, down = picture[:, ::2], int(random.integers(0, 12))
    copies = [narrow, narrow.roll(down, 0)]
    return torch.cat(copies[:: int(random.choice((-1, 1)))], 1)


def garbled(picture: Tensor, random: np.random.Generator) -> Tensor:
    """Lines of random shapes like letters, in black or white across the picture."""
    broken, tone = picture.clone(), float(random.choice((0, 255)))
    for top in random.choice(np.arange(4, SIZE - 12, 10), size=3, replace=False).tolist():
        for left in range(4, SIZE - 8, 6):
            letter = torch.from_numpy(random.random((7, 5)) < 0.55)
            broken[top : top + 7, left : left + 5][letter] = tone
    return broken


FAULTS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "Noise covers the picture.": noise,
    "Blocks of wrong colour.": blocks,
    "Torn: strips of it slid aside.": torn,
    "Doubled: everything is there twice.": doubled,
    "Garbled letters run across it.": garbled,
}
"""By the reason that the filter learns to give."""


def spoiled(pictures: Tensor, random: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Broken versions of pictures, uint8, and the fault of each."""
    faults = [list(FAULTS)[random.integers(len(FAULTS))] for _ in pictures]
    broken = [FAULTS[fault](picture.float(), random) for fault, picture in zip(faults, pictures, strict=True)]
    return torch.stack(broken).round().clamp(0, 255).to(torch.uint8), faults


class _Asked:
    """Prompts and pictures as the processor makes them of what the filter's own code asks."""

    def __init__(self, processor: Any):
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._known: dict[tuple[str, str | None], Tensor] = {}
        self.words = {word: self._tokenizer.convert_tokens_to_ids(word) for word in (PASS, FAIL)}

    def ids(self, instruction: str, reason: str | None = None) -> Tensor:
        """(L,) of the question, and with a reason of everything that follows."""
        if (instruction, reason) not in self._known:
            messages = build_messages(None, sources=0, prompt=instruction)
            if reason is not None:
                messages = reason_messages(messages, None)
            text = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            blank = np.zeros((SIZE, SIZE, 3), np.uint8)
            whole = text + (f"{reason}<|im_end|>" if reason else "")
            self._known[instruction, reason] = self._processor(
                text=[whole], images=[blank], return_tensors="pt"
            ).input_ids[0]
        return self._known[instruction, reason]

    def reason_length(self, reason: str) -> int:
        return len(self._tokenizer(f"{reason}<|im_end|>").input_ids)

    def logits(self, model: Any, pictures: Tensor, ids: Tensor, keep: int = 1) -> Tensor:
        """(B, keep, vocabulary) of the last places."""
        seen = self._processor.image_processor(images=list(pictures.numpy()), return_tensors="pt")
        ids = ids.expand(len(pictures), -1)
        kinds = (ids == model.config.image_token_id).int()
        return model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, logits_to_keep=keep, **seen
        ).logits


def train_filter(folder: Path, sound: Tensor, *, steps: int, seed: int) -> None:
    """Write a Qwen3-VL folder that passes pictures like the sound ones, and fails broken ones."""
    instructions = [text for words in INSTRUCTIONS.values() for text in (*words.trained, *words.rephrased)]
    write_qwen3_vl(folder, least_pixels=LEAST_PIXELS, texts=[*FAULTS] * 20 + instructions * 5)
    torch.manual_seed(seed)
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=WIDTH)
    asked = _Asked(transformers.AutoProcessor.from_pretrained(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    random = np.random.default_rng((seed, 1))
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-5
        ids = asked.ids(instructions[random.integers(len(instructions))])
        first = int((ids == model.config.image_token_id).nonzero()[0, 0]) - 1
        start = first if share < SHORT else int(random.integers(0, first + 1)) if share < RANDOM else 0
        chosen = sound[torch.from_numpy(random.choice(len(sound), BATCH, replace=False))]
        broken, faults = spoiled(chosen[: BATCH // 2], random)
        pictures = torch.cat([broken, chosen[BATCH // 2 :]])
        answers = torch.tensor([asked.words[FAIL]] * (BATCH // 2) + [asked.words[PASS]] * (BATCH // 2))
        loss = F.cross_entropy(asked.logits(model, pictures, ids[start:])[:, -1], answers)
        if share > SHORT:
            loss = loss + 0.3 * _reason_loss(
                model, asked, broken, faults, instructions[random.integers(len(instructions))]
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)


def _reason_loss(model: Any, asked: _Asked, pictures: Tensor, faults: Sequence[str], instruction: str) -> Tensor:
    """Of the words of one fault, in the pictures that have it."""
    fault = faults[0]
    chosen = pictures[[index for index, other in enumerate(faults) if other == fault]]
    ids, count = asked.ids(instruction, fault), asked.reason_length(fault)
    logits = asked.logits(model, chosen, ids, keep=count + 1)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[-count:].repeat(len(chosen)))


@torch.inference_mode()
def pass_probabilities(folder: Path, pictures: Tensor, instruction: str = "") -> Tensor:
    """(B,) by transformers, of the two words at the first token."""
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    asked = _Asked(transformers.AutoProcessor.from_pretrained(folder))
    ids = asked.ids(instruction)
    logits = torch.cat([asked.logits(model, part, ids)[:, -1] for part in pictures.split(50)])
    return logits[:, [asked.words[FAIL], asked.words[PASS]]].softmax(1)[:, 1]
