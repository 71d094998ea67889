"""Trains a CTR model in one process: pretrained backbones at the seed's learning rates, or the small pair from scratch.

One linear path: rows → tokenizer and model → epochs of AdamW under a cosine → metrics on held-out rows. A non-finite
loss stops the run. Left out: several GPUs (the model fits one), resuming (minutes to hours, and the inputs are a CSV).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.rewards.ctr import CTRModel, CTRModelConfig, binomial_loss, compound_loss, describe, encode_items, transform
from rlhf.rewards.ctr_config import CTRModelSection, CTRTrainConfig
from rlhf.rewards.ctr_data import Click
from rlhf.rewards.ctr_small import small_config, small_tokenizer
from rlhf.rewards.images import decode_image
from rlhf.types import seed_from

_CACHE_BYTES = 2**30
_WARMUP = 0.05


def train(
    clicks: Sequence[Click],
    held_out: Sequence[Click],
    model_section: CTRModelSection,
    config: CTRTrainConfig,
    *,
    seed: int,
    device: str = "cpu",
    progress: Callable[[str], None] = print,
) -> tuple[CTRModel, PreTrainedTokenizerBase, dict[str, float]]:
    """The trained model (eval mode), its tokenizer, and metrics of the held-out rows.

    Raises: ValueError where `config.loss` needs impressions that the rows lack; RuntimeError for a non-finite loss.
    """
    if config.loss == "binomial" and any(click.impressions is None for click in clicks):
        raise ValueError('train.loss = "binomial" needs the columns impressions and clicks in data.path')
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        model, tokenizer = create(clicks, model_section)
        model.to(device)
        groups = parameter_groups(model, model_section, config)
        return _fit(model, tokenizer, groups, clicks, held_out, config, seed, device, progress)


def create(clicks: Sequence[Click], section: CTRModelSection) -> tuple[CTRModel, PreTrainedTokenizerBase]:
    """An untrained CTR model over the configured backbones, its output bias at the mean click rate of `clicks`."""
    if section.text is None or section.image is None:
        tokenizer: PreTrainedTokenizerBase = small_tokenizer(describe(click.item) for click in clicks)
        config = small_config(tokenizer, image_size=section.image_size or 64, max_tokens=section.max_tokens)
        model = CTRModel(config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(section.text)
        config = CTRModelConfig(
            text=AutoConfig.from_pretrained(section.text).to_dict(),
            image=AutoConfig.from_pretrained(section.image).to_dict(),
            image_size=section.image_size or 512,
            max_tokens=section.max_tokens,
        )
        model = CTRModel(config)
        model.text.load_state_dict(AutoModel.from_pretrained(section.text).state_dict())
        model.image.load_state_dict(AutoModel.from_pretrained(section.image).state_dict())
    mean = min(max(float(np.mean([click.rate for click in clicks])), 1e-4), 1 - 1e-4)
    torch.nn.init.constant_(model.head[-1].bias, math.log(mean / (1 - mean)))
    return model, tokenizer


def evaluate(model: CTRModel, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
    """Pearson and rank correlation, mean squared error and, where known, binomial loss per impression."""
    model.eval()
    logits, rates, impressions = [], [], []
    with torch.inference_mode():
        for batch in batches:
            logits.append(model(batch["pixels"], batch["ids"], batch["mask"]).float().cpu())
            rates.append(batch["rate"].cpu())
            impressions.append(batch["impressions"].cpu())
    logit, rate, views = torch.cat(logits), torch.cat(rates), torch.cat(impressions)
    predicted = logit.sigmoid()
    metrics = {
        "correlation": _correlation(predicted, rate),
        "rank_correlation": _correlation(predicted.argsort().argsort().float(), rate.argsort().argsort().float()),
        "mse": (predicted - rate).square().mean().item(),
        "rows": float(len(rate)),
    }
    if views.min() > 0:
        metrics["binomial_loss"] = binomial_loss(logit, rate, views).item()
    return metrics


def _fit(model, tokenizer, groups, clicks, held_out, config, seed, device, progress):
    batches = Batches(tokenizer, model.config, config.batch_size, device)
    binomial = config.loss == "binomial" or (
        config.loss == "auto" and all(click.impressions is not None for click in clicks)
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    per_epoch = max(1, len(clicks) // config.batch_size)
    steps = max(1, config.epochs * per_epoch // config.gradient_accumulation_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
    done = 0
    for epoch in range(config.epochs):
        model.train()
        total = 0.0
        for batch in batches.shuffled(clicks, seed_from(seed, epoch)):
            with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                logits = model(batch["pixels"], batch["ids"], batch["mask"])
            logits = logits.float()
            if binomial:
                loss = binomial_loss(logits, batch["rate"], batch["impressions"])
            else:
                loss = compound_loss(logits.sigmoid(), batch["rate"])
            if not torch.isfinite(loss):
                raise RuntimeError(f"the CTR loss is {loss.item()} in epoch {epoch + 1}; lower train.learning_rate")
            (loss / config.gradient_accumulation_steps).backward()
            total += loss.item()
            done += 1
            if done % config.gradient_accumulation_steps == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        progress(f"ctr epoch {epoch + 1}/{config.epochs} loss {total / per_epoch:.5f}")
    metrics = evaluate(model, batches.ordered(held_out)) if held_out else {}
    return model.eval(), tokenizer, metrics | {"train_rows": float(len(clicks)), "train_loss": total / per_epoch}


class Batches:
    """Tensors of rows: pixels (B, 3, S, S), ids and mask (B, L), rate and impressions (B,); 0 impressions = unknown."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: CTRModelConfig, batch_size: int, device: str
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.batch_size = batch_size
        self.device = device
        self._pixels = lru_cache(_CACHE_BYTES // (12 * config.image_size**2))(self._load)

    def shuffled(self, clicks: Sequence[Click], seed: int) -> Iterator[dict[str, Tensor]]:
        """One epoch in an order given by `seed`, pictures mirrored half of the time; the short rest is dropped."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(clicks))
        size = min(self.batch_size, len(clicks))
        groups = [[clicks[i] for i in order[start : start + size]] for start in range(0, len(clicks) - size + 1, size)]
        mirrored = [torch.from_numpy(rng.random(size) < 0.5) for _ in groups]
        return self._prefetched(groups, mirrored)

    def ordered(self, clicks: Sequence[Click]) -> Iterator[dict[str, Tensor]]:
        """All rows in order, as they are."""
        groups = [clicks[start : start + self.batch_size] for start in range(0, len(clicks), self.batch_size)]
        return self._prefetched(groups, [torch.zeros(len(group), dtype=torch.bool) for group in groups])

    def _prefetched(self, groups: Sequence[Sequence[Click]], mirrored: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._batch, groups[0], mirrored[0])]
            for index in range(len(groups)):
                if index + 1 < len(groups):
                    coming.append(pool.submit(self._batch, groups[index + 1], mirrored[index + 1]))
                yield {name: tensor.to(self.device) for name, tensor in coming.pop(0).result().items()}

    def _batch(self, clicks: Sequence[Click], mirrored: Tensor) -> dict[str, Tensor]:
        pixels = torch.stack([self._pixels(click.image) for click in clicks])
        ids, mask = encode_items(self.tokenizer, [click.item for click in clicks], self.config.max_tokens)
        return {
            "pixels": torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels),
            "ids": ids,
            "mask": mask,
            "rate": torch.tensor([click.rate for click in clicks]),
            "impressions": torch.tensor([float(click.impressions or 0) for click in clicks]),
        }

    def _load(self, path) -> Tensor:
        return transform(decode_image(path.read_bytes()), self.config.image_size)


def parameter_groups(model: CTRModel, section: CTRModelSection, config: CTRTrainConfig) -> list[dict]:
    """Heads, text, image, each at its own rate (the seed's defaults); a small model from scratch all at the heads'."""
    backbones = [list(model.text.parameters()), list(model.image.parameters())]
    known = {id(parameter) for group in backbones for parameter in group}
    heads = [parameter for parameter in model.parameters() if id(parameter) not in known]
    rates = [config.learning_rate, config.text_learning_rate, config.image_learning_rate]
    if section.text is None:
        rates = [config.learning_rate] * 3
    return [{"params": group, "lr": rate} for group, rate in zip([heads, *backbones], rates, strict=True)]


def _factor(step: int, steps: int) -> float:
    warmup = max(1, int(steps * _WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _correlation(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
