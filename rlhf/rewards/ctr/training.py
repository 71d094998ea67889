"""Trains a CTR model: pretrained backbones at the learning rates of FEAST's CTR model, or the small pair from scratch.

Rows → tokenizer and model → epochs of AdamW under a cosine → the weights of the epoch that was best on validation
products → figures of held-out rows. A `Learner` is one rank of it; `fit` drives one, or a group of them. A non-finite loss
stops the run. Left out: resuming (minutes to hours, and the input is a CSV), sharded weights (the largest backbone fits one
GPU).

Ranks: each takes its share of every batch and DistributedDataParallel averages the gradients, so that the update is the
one of a single rank, up to rounding: for the binomial loss, which is divided by the impressions of the whole update, and
the squares of the compound loss. Its variance and KL terms are those of each rank's share of each batch. Batch norm sees whole
batches on GPUs (SyncBatchNorm); on CPUs, where that does not exist, each rank normalises its share, and rank 0's running
statistics are saved.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf.errors import Refused
from rlhf.rewards.ctr.batches import Batch, Batches, Update
from rlhf.rewards.ctr.build import create, parameter_groups
from rlhf.rewards.ctr.clicks import Click, Rows
from rlhf.rewards.ctr.config import CTRModelSection, CTRTrainConfig
from rlhf.rewards.ctr.model import binomial_loss, compound_loss, save, weighted_squares
from rlhf.rewards.ctr.report import Predictions, metrics, write_plots
from rlhf.shards import distributed
from rlhf.types import seed_from

_WARMUP = 0.05
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fit(
    epoch: Callable[[int], dict[str, float]],
    keep: Callable[[], None],
    config: CTRTrainConfig,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Up to `config.epochs` epochs; stops after `config.patience` of them without a lower validation loss.

    epoch, keep: of a `Learner`. Returns both losses of the best epoch, its number, and how many epochs and seconds it took.
    """
    started, best = monotonic(), dict[str, float]()
    for number in range(1, config.epochs + 1):
        found = epoch(number - 1) | {"best_epoch": float(number)}
        validation = found.get("validation_loss")
        better = not best or validation is None or validation < best["validation_loss"]
        said = "" if validation is None else f" validation {validation:.5f}{' best' if better else ''}"
        progress(f"ctr epoch {number}/{config.epochs} loss {found['loss']:.5f}{said}")
        if better:
            best = found
            if validation is not None:
                keep()
        elif number - best["best_epoch"] >= config.patience:
            best_epoch, patience = f"{best['best_epoch']:.0f}", config.patience
            progress(f"ctr stopped: no better epoch than {best_epoch} in train.patience = {patience}")
            break
    figures = {"train_loss": best["loss"], "best_epoch": best["best_epoch"], "epochs": float(number)}
    if "validation_loss" in best:
        figures["validation_loss"] = best["validation_loss"]
    return figures | {"seconds": monotonic() - started}


class Learner:
    """One rank of the training. Of several, all must have the process group of `rlhf.shards.distributed` up."""

    def __init__(self, rows: Rows, section: CTRModelSection, config: CTRTrainConfig, seed: int, rank: int = 0) -> None:
        """Seeds torch's generators: equal seeds give equal weights. Raises: Refused, see `uses_binomial`."""
        self.binomial = uses_binomial(rows, config)
        self.rows, self.config, self.seed, self.rank = rows, config, seed, rank
        torch.manual_seed(seed)
        self.model, self.tokenizer = create(rows.train, section)
        self.model.to(config.device)
        for name in config.freeze:
            getattr(self.model, name).requires_grad_(False)
        self.batches = Batches(self.tokenizer, self.model.config, config, rank)
        self.parallel: nn.Module = self.model
        if config.ranks > 1:
            if config.device == "cuda":
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            # A backbone may have parameters that the model does not read, such as BERT's pooler.
            self.parallel = DistributedDataParallel(self.model, find_unused_parameters=True)
            torch.manual_seed(seed_from(seed, "dropout", rank))
        groups = parameter_groups(self.model, section, config)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.updates, self.steps = 0, config.epochs * self.batches.updates(len(rows.train))
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.mixed_precision == "fp16")
        self._best: dict[str, Tensor] | None = None

    def epoch(self, index: int) -> dict[str, float]:
        """Train all updates of one epoch. A collective where there are more ranks.

        Returns `loss` and, where there are validation rows, `validation_loss`. Raises: Refused where one is not finite.
        """
        self.parallel.train()
        for name in self.config.freeze:
            getattr(self.model, name).eval()
        losses = [self.step(update) for update in self.batches.epoch(self.rows.train, seed_from(self.seed, index))]
        values = {"loss": torch.tensor(losses).mean()}
        if self.rows.validation:
            values["validation_loss"] = self._validation_loss()
        alone = {name: value.item() for name, value in values.items()}
        found = distributed.mean_over_ranks(values, self.config.device) if self.config.ranks > 1 else alone
        if not all(map(math.isfinite, found.values())):
            raise Refused(f"epoch {index + 1} of the CTR training gave {found}; lower train.learning_rate")
        return found

    def step(self, update: Update) -> float:
        """One optimizer update. Returns the loss of which the mean over the ranks is the update's."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * _factor(self.updates, self.steps)
        total = 0.0
        for index, batch in enumerate(update.batches, start=1):
            last = index == update.count
            with nullcontext() if last or self.config.ranks == 1 else self.parallel.no_sync():
                loss = self._loss(batch, update)
                self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not norm.isfinite() and not self.scaler.is_enabled():  # the scaler skips such an update
            raise Refused("a gradient of the CTR model is not finite; lower train.learning_rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1
        return total

    def _loss(self, batch: Batch, update: Update) -> Tensor:
        """This batch's part of the update's loss, times the ranks, over which gradients are averaged."""
        precision = _PRECISIONS.get(self.config.mixed_precision)
        with torch.autocast(self.config.device, precision, enabled=precision is not None):
            logits = self.parallel(batch.pixels, batch.ids, batch.mask)
        if self.binomial:
            return binomial_loss(logits.float(), batch.rate, batch.impressions, update.impressions / self.config.ranks)
        return compound_loss(logits.float().sigmoid(), batch.rate) / update.count

    def _validation_loss(self) -> Tensor:
        """The loss per row or impression, in shares of which the mean over the ranks is the whole.

        Of the compound loss only the weighted squares, since its other terms depend on which rows are together.
        """
        said = self.predict(self.rows.validation[self.rank :: self.config.ranks])
        if self.binomial:
            views = sum(click.impressions or 0 for click in self.rows.validation)
            return binomial_loss(said.logit, said.rate, said.impressions, views / self.config.ranks)
        return weighted_squares(said.logit.sigmoid(), said.rate).sum() * self.config.ranks / len(self.rows.validation)

    @torch.inference_mode()
    def predict(self, clicks: Sequence[Click]) -> Predictions:
        """Predictions of these rows, in fp32."""
        self.model.eval()
        logits = [self.model(batch.pixels, batch.ids, batch.mask).cpu() for batch in self.batches.ordered(clicks)]
        return Predictions(
            logit=torch.cat(logits) if logits else torch.zeros(0),
            rate=torch.tensor([click.rate for click in clicks]),
            impressions=torch.tensor([float(click.impressions or 0) for click in clicks]),
            products=[click.item for click in clicks],
        )

    def keep(self) -> None:
        """Remember the weights: they are the best so far. Rank 0 does, as they are the same on all ranks."""
        if self.rank == 0:
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def finish(self, folder: Path) -> dict[str, float]:
        """Write the checkpoint of the kept weights (else the last) and the plots of the held-out rows.

        Returns the figures of these rows; none: there are none. For rank 0 alone; no collective.
        """
        if self._best is not None:
            self.model.load_state_dict(self._best)
        save(folder, self.model, self.tokenizer)
        if not self.rows.held_out:
            return {}
        predictions = self.predict(self.rows.held_out)
        write_plots(folder, predictions)
        return metrics(predictions)


def uses_binomial(rows: Rows, config: CTRTrainConfig) -> bool:
    """What `train.loss` comes to. Raises: Refused where it is "binomial" and impressions are missing."""
    counted = all(click.impressions is not None for click in (*rows.train, *rows.validation))
    if config.loss == "binomial" and not counted:
        raise Refused('train.loss = "binomial" needs the columns impressions and clicks in data.path')
    return config.loss == "binomial" or (config.loss == "auto" and counted)


def _factor(step: int, steps: int) -> float:
    warmup = max(1, int(steps * _WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
