"""The only trainer: one FSDP2 rank of it. Knows no data source, no reward and no model by name.

Master weights are fp32, because at lr 1e-5 a bf16 AdamW step rounds away; forward and backward run in the family's dtype
(bf16, or fp16 under a loss scale). No rank ever holds more than its shard plus one block: weights are read by rows, refreshed
shard to shard, and written by rows. `trainer.offload` keeps shards in the host's memory. Left out: tensor parallelism.

Shapes: B examples, C latent channels, … height and width, with frames before them where there are any.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rlhf.diffusion.objectives import Objective, Predict
from rlhf.errors import Refused
from rlhf.models import quantised
from rlhf.models.family import Family
from rlhf.models.trainable import Trainable, owner
from rlhf.shards import distributed
from rlhf.shards.files import SafetensorsFolder, Shard, write_sharded
from rlhf.training import optimizers
from rlhf.training.average import Average
from rlhf.training_tables import TrainerConfig
from rlhf.types import POLICY, Batch, Condition

EMA = "ema"


class NonFiniteLoss(Refused):
    """Three steps in a row had a loss or gradient that was not finite, or weights to be saved are not."""


@dataclass
class LossScale:
    """The scale that keeps fp16 gradients from vanishing: doubled after 2000 good steps in a row, halved after a bad one.

    As torch.amp.GradScaler moves it, which decides by itself, with a collective of its own, whether a step is good; here the
    one decision follows from the norm that the trainer has reduced over all ranks already.
    """

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, good: bool) -> None:
        """`good`: the step's gradients were finite. Must be the same on every rank."""
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.value /= 2
        elif self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0


@dataclass(kw_only=True, eq=False, repr=False)
class Trainer:
    """`step / evaluate / refresh / shards / save / restore / export` over one rank's shard of a denoiser."""

    family: Family
    config: TrainerConfig
    trainable: Trainable
    objective: Objective
    mesh: DeviceMesh
    seed: int

    def __post_init__(self) -> None:
        family, config, objective = self.family, self.config, self.objective
        self.rank, self.device = self.mesh.get_rank(), self.mesh.device_type
        self._write = partial(write_sharded, rank=self.rank, barrier=torch.distributed.barrier)
        self.policy = self._load_policy()
        self.trained = self._trained(self.policy, POLICY)
        self._networks = {POLICY: self.policy}
        self.sides: dict[str, dict[str, DTensor]] = {}
        """The parameters of every frozen side, by the names that `trained` has."""
        for side in objective.sides:
            self.keep(side)
        self.ema: Average | None = None
        if config.ema_decay is not None:
            self.ema = Average(self.trained, config.ema_decay, offload=config.offloads("ema"))
        self.optimizer = optimizers.make_optimizer(self.trained.values(), config)
        schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        # The factor alone: the rate is set at every update.
        self._lr_factor: Callable[[int], float] = schedule.lr_lambdas[0]
        self.loss_scale = LossScale() if family.dtype == torch.float16 else None
        self.steps = self.skipped = self.skipped_in_a_row = 0

    def _load_policy(self) -> nn.Module:
        """Meta device → what is trained → shard → empty shards → fill each with its own rows of the checkpoint."""
        family = self.family
        denoiser = family.empty_denoiser(family.dtype)
        self.trainable.add(denoiser, self.objective.sides, torch.float32)
        self._recompute(denoiser)
        self._materialise(denoiser, family.dtype, self.config.offloads("optimizer"))
        self._fill(denoiser)
        return denoiser

    def _recompute(self, denoiser: nn.Module) -> None:
        """Have the backward pass recompute all of the family's blocks, or every second one, in place of keeping them."""
        if self.config.gradient_checkpointing == "none":
            return
        every = {"all": 1, "half": 2}[self.config.gradient_checkpointing]
        blocks = (module for module in denoiser.modules() if isinstance(module, self.family.blocks))
        kept = {block for number, block in enumerate(blocks) if number % every}

        def call(module: nn.Module, *arguments: Any) -> Any:
            return module(*arguments) if module in kept else checkpoint(module, *arguments, use_reentrant=False)

        denoiser.enable_gradient_checkpointing(call)  # diffusers' own

    @torch.no_grad()
    def _fill(self, denoiser: nn.Module) -> None:
        """This rank's rows of the checkpoint, and what adapters begin with."""
        checkpoint, begun = SafetensorsFolder(self.family.denoiser_path), self.trainable.begun(self.family)
        for name, parameter in denoiser.named_parameters():
            rows, first = parameter.to_local(), distributed.first_row(parameter)
            last = first + len(rows)
            whole = self.trainable.start(name, parameter.shape, self.seed, begun)
            if whole is not None:
                rows.copy_(whole[first:last])
            elif len(rows):
                base, dtype = self.family.base, self.family.dtype
                rows.copy_(quantised.rows_of(checkpoint, owner(name)[1], parameter, first, last, base, dtype))

    def keep(self, side: str) -> None:
        """Keep a frozen side, equal to the policy. A collective; called for every side that the objective names."""
        network, family = self.policy, self.family
        if not self.trainable.twins:  # one of its own in the compute dtype, to which FSDP would cast the masters anyway
            network = family.empty_denoiser(family.dtype)
            self.trainable.add(network, (), family.dtype)
            self._materialise(network.eval().requires_grad_(False), None, self.config.offloads("reference"))
        self._networks[side], self.sides[side] = network, self._trained(network, side)
        self.refresh(side)

    def _materialise(self, network: nn.Module, compute_dtype: torch.dtype | None, offload: bool) -> None:
        """Shard a network on the meta device, give it memory, and let the family fill in all but its parameters.

        offload: its shard, with gradients and optimizer, lies in the host's memory.
        """
        distributed.shard(network, self.family.blocks, self.mesh, compute_dtype, offload)
        distributed.materialise(network, "cpu" if offload else self.device)
        self.family.finish(network, self.device)
        empty = distributed.left_on_meta(network)
        assert not empty, f"{type(self.family).__name__}.finish leaves these without values: {', '.join(empty)}"

    def _trained(self, network: nn.Module, side: str) -> dict[str, DTensor]:
        return cast(dict[str, DTensor], self.trainable.trained(network, side))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, side: str = POLICY) -> Tensor:
        """A side's prediction (B, C, …), fp32; a frozen one's has no gradient. A collective: every rank must call it."""
        if side == POLICY:
            return self.family.predict(self.policy, x_t, t, condition)
        network = self._networks[side]
        with torch.no_grad(), self.trainable.using(network, side):
            return self.family.predict(network, x_t, t, condition)

    @property
    def predictions(self) -> dict[str, Predict]:
        """What an objective is handed: `predict` of every side."""
        return {side: partial(self.predict, side=side) for side in self._networks}

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """One optimizer update from this rank's micro-batches (the same number on every rank); finite scalars over all ranks.

        A non-finite loss or gradient skips the update and is counted; the third in a row raises `NonFiniteLoss`. In fp16 a
        non-finite gradient under a finite loss is the loss scale finding its level: it is none of the three while the scale
        is at least 1.
        """
        scale = self.loss_scale.value if self.loss_scale else 1.0
        sums = self._mean(micro_batches, scale)
        if self.loss_scale:
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        metrics = self._over_ranks(sums | {"grad_norm": norm})
        finite_loss, finite_gradient = math.isfinite(metrics["loss"]), math.isfinite(metrics["grad_norm"])
        if self.loss_scale:
            self.loss_scale.update(good=finite_gradient)
        lr = self.config.scaled_learning_rate * self._lr_factor(self.steps)
        if finite_loss and finite_gradient:
            self._update(lr)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            if not (finite_loss and self.loss_scale and self.loss_scale.value >= 1):
                self.skipped_in_a_row += 1
            if self.skipped_in_a_row == 3:
                raise NonFiniteLoss(f"three steps in a row up to step {self.steps} were not finite; last: {metrics}")
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        scales = {"loss_scale": scale} if self.loss_scale else {}
        return _finite(metrics) | {"lr": lr, "skipped": float(self.skipped)} | scales

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """The objective's scalars, as `step` gives them, with no gradient and no change of state. A collective like it."""
        return _finite(self._over_ranks(self._mean(micro_batches)))

    def _over_ranks(self, values: dict[str, Tensor]) -> dict[str, float]:
        return distributed.mean_over_ranks(values, self.device)

    def _mean(self, micro_batches: Sequence[Batch], scale: float | None = None) -> dict[str, Tensor]:
        """Loss and scalars averaged over this rank's micro-batches, and if `scale` is given the gradient of `scale` · loss."""
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            loss, scalars = self.objective(self.predictions, self.family.process, batch.to(self.device))
            if scale is not None:
                (loss / len(micro_batches) * scale).backward()
            for name, value in {"loss": loss, **scalars}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(micro_batches)
        return sums

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.ema:
            self.ema.wait()
        self.optimizer.step()
        if self.ema:
            self.ema.update()

    @torch.no_grad()
    def refresh(self, side: str, decay: float = 0.0) -> None:
        """side ← decay · side + (1 − decay) · policy, shard to shard: no byte moves between ranks. 0 copies the policy.

        Right after a copy the side's predictions equal the policy's bit for bit. The mean is taken in fp32, but a side that
        is a network of its own keeps it in the compute dtype: bf16 loses changes below 1/256 of a weight.
        """
        assert 0 <= decay <= 1, f"decay = {decay} is no share"
        for name, mine in self.sides[side].items():
            rows, policy = mine.to_local(), self.trained[name].to_local()
            rows.copy_(torch.lerp(policy.to(rows.device), rows.float(), decay) if decay else policy)

    def shards(
        self,
        which: str = POLICY,
        dtype: torch.dtype | None = None,
        names: Mapping[str, str] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Iterator[Shard]:
        """This rank's rows of the trained weights of the policy, the `ema` or a frozen side, one tensor at a time.

        `dtype` None: the compute dtype. `names`: those to give, with the name that each goes by; None: all by their own.
        `scales`: what some are multiplied by, by their own name.
        """
        if names is None:
            names = {name: name for name in self.trained}
        for shard in self._rows(which):
            if shard.name in names:
                scale = (scales or {}).get(shard.name)
                rows = shard.rows if scale is None else shard.rows * scale
                yield replace(shard, name=names[shard.name], rows=rows.to(dtype or self.family.dtype))

    def _rows(self, which: str) -> list[Shard]:
        """This rank's rows as they are kept: no copies."""
        if which == EMA:
            assert self.ema, "no average is kept"
            return [_shard(name, self.trained[name], rows) for name, rows in self.ema.rows.items()]
        tensors = self.trained if which == POLICY else self.sides[which]
        return [_shard(name, tensor, tensor.to_local().detach()) for name, tensor in tensors.items()]

    def export(self, folder: Path, which: str = POLICY, dtype: torch.dtype = torch.float32) -> None:
        """Write loadable weights into `folder`: a diffusers denoiser, a LoRA file, trained modules. A collective."""
        self._refuse_non_finite()
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.trainable.parts:
            file = part.export(self.policy, self.trained, self.family)
            if self.rank == 0:
                for name, text in file.beside.items():
                    (folder / name).write_text(text)
            shards = partial(self.shards, which, dtype, file.names, file.scales)
            self._write(folder / file.file, shards, metadata=file.metadata)

    def _refuse_non_finite(self) -> None:
        """Raise NonFiniteLoss rather than commit weights that no resume could mend."""
        for name, parameter in self.trained.items():
            if not parameter.to_local().isfinite().all():
                raise NonFiniteLoss(f"{name} is not finite after step {self.steps}: nothing is saved")

    def _state(self) -> tuple[dict[str, list[Shard]], dict[str, Tensor]]:
        """Everything that a resumed run needs: what fits any number of ranks, by file, and what is this rank's own."""
        by_rows, of_this_rank = optimizers.state_of(self.optimizer, self.trained)
        files = {kind: self._rows(kind) for kind in (POLICY, *self.sides, *((EMA,) if self.ema else ()))}
        for key, values in by_rows.items():
            files[key] = [_shard(name, value, value.to_local()) for name, value in values.items()]
        return files, of_this_rank

    def save(self, folder: Path) -> None:
        """Write the exact training state into `folder`: whole tensors by rows, for any number of ranks. A collective.

        What an optimizer keeps per rank (adamw_8bit: scales of blocks of a rank's values) fits this number of ranks only.
        """
        self._refuse_non_finite()
        folder.mkdir(parents=True, exist_ok=True)
        files, per_rank = self._state()
        for file, shards in files.items():
            self._write(folder / f"{file}.safetensors", partial(iter, shards))
        if per_rank:
            save_file(per_rank, self._rank_file(folder))
            with open(self._rank_file(folder), "rb") as written:
                os.fsync(written.fileno())
        if self.rank == 0:
            counters = {
                "steps": self.steps,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "loss_scale": vars(self.loss_scale) if self.loss_scale else None,
                "optimizer": self.config.optimizer,
                "without_state": [name for name, p in self.trained.items() if p not in self.optimizer.state],
                "optimizer_ranks": self.mesh.size() if per_rank else None,
            }
            (folder / "trainer.json").write_text(json.dumps(counters))
        torch.distributed.barrier()

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Read what `save` wrote. Raises Refused on a missing or odd tensor, another optimizer, or the wrong number of ranks."""
        counters = json.loads((folder / "trainer.json").read_text())
        self._refuse_foreign(counters, folder)
        self.steps, self.skipped = counters["steps"], counters["skipped"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        if self.loss_scale:
            self.loss_scale = LossScale(**counters["loss_scale"])
        if self.steps > self.skipped:
            never_had = set(counters["without_state"])  # parameters that no gradient reaches
            having = [p for name, p in self.trained.items() if name not in never_had]
            optimizers.make_state(self.optimizer, having, updates=self.steps - self.skipped)
        files, per_rank = self._state()
        for file, shards in files.items():
            saved = SafetensorsFolder(folder / f"{file}.safetensors")
            for shard in shards:
                if len(shard.rows):
                    last = shard.start + len(shard.rows)
                    shard.rows.copy_(saved.rows(shard.name, shard.start, last, shard.shape))
        if per_rank:
            found = load_file(self._rank_file(folder))
            for name, value in per_rank.items():
                if name not in found or found[name].shape != value.shape:
                    raise Refused(f"{self._rank_file(folder)} has no tensor {name!r} of shape {tuple(value.shape)}")
                value.copy_(found[name])

    def _rank_file(self, folder: Path) -> Path:
        return folder / f"optimizer_of_rank{self.rank}.safetensors"

    def _refuse_foreign(self, counters: dict, folder: Path) -> None:
        mine, saved = self.config.optimizer, counters["optimizer"]
        if mine != saved:
            raise Refused(
                f'{folder} holds the state of trainer.optimizer = "{saved}", not of "{mine}": set it back to "{saved}"'
            )
        ranks, here = counters["optimizer_ranks"], self.mesh.size()
        if ranks not in (None, here):
            raise Refused(
                f"{folder} holds the {saved} state of {ranks} ranks, which does not fit {here}: resume with "
                f'trainer.ranks = {ranks}, or start a new run from an export (the states of "adamw" and "adafactor" fit any '
                "number of ranks)"
            )


def _shard(name: str, tensor: DTensor, rows: Tensor) -> Shard:
    return Shard(name=name, shape=tuple(tensor.shape), start=distributed.first_row(tensor), rows=rows)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
