"""The tables of training: what is trained, and how. The others are in `rlhf.tables`."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf.section import LocalPath, Section


class TrainableTable(Section):
    kind: Literal["full", "lora", "modules"] = "full"
    """`full`: every weight. `lora`: adapters, and the modules of `patterns` if there are any. `modules`: those alone."""
    rank: int | None = Field(None, ge=1)
    """Of LoRA; unset: 16."""
    alpha: float | None = Field(None, gt=0)
    """Of LoRA, whose update is scaled by alpha / rank; unset: 16."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Of LoRA: module name endings; unset: the family's attention and MLP projections."""
    init: Literal["kaiming", "gaussian"] | None = None
    """Of LoRA: how A begins, B being zero. `kaiming`: uniform in ±1/√in, as PEFT's `init_lora_weights = True`; `gaussian`: normal
    with deviation 1/rank, as its "gaussian". Unset: kaiming."""
    start: LocalPath | None = None
    """Of LoRA: a file, or a folder such as RUN/final/lora, whose adapters are trained further; of this rank. Of modules alone: a
    folder such as RUN/final/modules, of these patterns. Unset: new adapters, and the model's own modules."""
    patterns: tuple[str, ...] = ()
    """Whole modules by their dotted names; `*` matches anything, e.g. "transformer_blocks.*.attn"."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "lora":
            return {"rank": 16, "alpha": 16.0} | {key: value for key, value in values.items() if value is not None}
        return values

    def conflicts(self) -> Iterator[str]:
        if self.init is not None and self.start is not None:
            yield f"init = {self.init!r} and start = {self.start!r}: a LoRA that is trained further is begun already"
        for key in ("rank", "alpha", "targets", "init", "start"):
            of_modules = key == "start" and self.kind == "modules"
            if self.kind != "lora" and not of_modules and (value := getattr(self, key)) is not None:
                yield f'{key} = {value!r} belongs to LoRA, but kind = "{self.kind}": set kind = "lora" or leave {key} out'
        if self.kind == "modules" and not self.patterns:
            yield 'kind = "modules" needs patterns, e.g. ["transformer_blocks.*.attn"]'
        if self.kind == "full" and self.patterns:
            yield (
                f'patterns = {list(self.patterns)!r} chooses modules, but kind = "full" trains every weight: set '
                'kind = "modules", or "lora" to train both, or leave patterns out'
            )


Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"
]


class TrainerConfig(Section):
    ranks: int = Field(1, ge=1)
    train_batch_size: int = Field(2, ge=1)
    """Pairs per rank and micro-batch."""
    gradient_accumulation_steps: int = Field(4, ge=1)
    effective_batch_size: int | None = Field(None, ge=1)
    """Pairs of one update over all ranks; gradient_accumulation_steps then follows from it."""
    timesteps: Literal["uniform", "logit_normal", "mode"] | None = None
    """How training times are drawn, see `rlhf.diffusion.process.RectifiedFlow`; unset: the family's way (FLUX: logit_normal)."""
    timestep_shift: float | Literal["tokens"] = 1.0
    """Moves them towards noise (above 1) or data; "tokens": by the size of the target, as in sampling."""
    timestep_weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Of SFT on a flow: what an error at t counts, 1, t⁻² or 2 / (π·(1 − 2t + 2t²))."""
    max_train_steps: int = Field(1000, ge=1)
    """Updates."""
    epochs: int | None = Field(None, ge=1)
    """Of `jobs.train`: how often every example is trained on; the run ends with these or max_train_steps, whichever is less."""
    learning_rate: float = Field(1e-5, gt=0)
    scale_lr: bool = False
    """Multiply learning_rate by pairs_per_step (Diffusion-DPO's --scale_lr)."""
    lr_scheduler: Schedule = "constant_with_warmup"
    """diffusers.optimization.SchedulerType, over max_train_steps."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps of a linear rise from 0; "constant" and "piecewise_constant" know none."""
    lr_num_cycles: int = Field(1, ge=1)
    """Of "cosine_with_restarts"."""
    lr_power: float = Field(1.0, gt=0)
    """Of "polynomial", which ends at a rate of 1e-7."""
    lr_step_rules: str | None = None
    """Of "piecewise_constant": "1:10,0.1:20,0.01" is the rate × 1 before step 10, × 0.1 before step 20, × 0.01 from there."""
    optimizer: Literal["adamw", "adafactor", "adamw_8bit", "prodigy", "sgd"] = "adamw"
    """`adafactor` keeps means of the second moment, `adamw_8bit` both moments in 8 bits (resumes on equal ranks only). `prodigy`
    finds the rate by itself, by which learning_rate = 1 is multiplied; it keeps two copies of the weights more than `adamw`."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """adam_* are read by adamw, adamw_8bit and prodigy, weight_decay by every optimizer."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, ge=0)
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: Literal["all", "half", "none"] = "all"
    """Blocks that the backward pass computes again in place of keeping them: all, every second one, none."""
    offload: Literal["none", "ema", "reference", "optimizer"] = "none"
    """What lies in the host's memory, each with those before it. `ema`: the average, updated beside the next step. `reference`:
    frozen networks, which full training has (of others they are small and stay). `optimizer`: masters, gradients and Adam's
    moments; the update then runs on the CPU."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights; unset: none is kept."""
    num_cpus: float = Field(0.3, ge=0)
    num_gpus: float = Field(1.0, ge=0)
    timeout_s: float = Field(1800.0, gt=0)
    """One step, save or publish on one rank."""

    @model_validator(mode="before")
    @classmethod
    def _work_out_accumulation(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        whole = values.get("effective_batch_size")
        ranks, batch = values.get("ranks", 1), values.get("train_batch_size", 2)
        if not all(type(number) is int and number > 0 for number in (whole, ranks, batch)):
            return values  # none is asked for, or the fields' own types say what is wrong
        at_once = ranks * batch
        if whole % at_once:
            raise ValueError(
                f"effective_batch_size = {whole} is no multiple of ranks × train_batch_size = {at_once}; "
                f"{whole // at_once * at_once or at_once} and {(whole // at_once + 1) * at_once} are"
            )
        steps = values.setdefault("gradient_accumulation_steps", whole // at_once)
        if steps != whole // at_once:
            raise ValueError(
                f"effective_batch_size = {whole} over ranks × train_batch_size = {at_once} is {whole // at_once} accumulated "
                f"micro-batches, but gradient_accumulation_steps = {steps}; give one of the two keys"
            )
        return values

    def offloads(self, what: Literal["ema", "reference", "optimizer"]) -> bool:
        """Whether `what` lies in the host's memory."""
        order = ("none", "ema", "reference", "optimizer")
        return order.index(what) <= order.index(self.offload)

    @property
    def pairs_per_rank(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def pairs_per_step(self) -> int:
        return self.pairs_per_rank * self.ranks

    @property
    def scaled_learning_rate(self) -> float:
        """What the schedule multiplies: learning_rate, by scale_lr times pairs_per_step."""
        return self.learning_rate * (self.pairs_per_step if self.scale_lr else 1)

    def conflicts(self) -> Iterator[str]:
        if self.timestep_shift != "tokens" and not 0 < self.timestep_shift < math.inf:
            yield f'timestep_shift = {self.timestep_shift}: give a number above 0, or "tokens"'
        whole, rules, example = self.effective_batch_size, self.lr_step_rules, 'e.g. "1:10,0.1:20,0.01"'
        if whole not in (None, self.pairs_per_step):
            yield f"effective_batch_size = {whole}: write it as a whole number, like 2048"
        if self.offload == "optimizer" and self.optimizer != "adamw":
            yield (
                f'offload = "optimizer" updates on the CPU, which only optimizer = "adamw" does here, not "{self.optimizer}": '
                "take one of the two"
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            yield (
                f'optimizer = "prodigy" finds the rate, which learning_rate = {self.learning_rate:g} multiplies: set 1.0, or '
                "down to 0.1 to stay below what it finds"
            )
        if self.optimizer == "prodigy" and self.scale_lr:
            yield 'optimizer = "prodigy" finds the rate, which scale_lr would multiply: leave scale_lr out'
        if self.lr_scheduler == "piecewise_constant" and rules is None:
            yield f'lr_scheduler = "piecewise_constant" needs lr_step_rules, {example}'
        if self.lr_scheduler != "piecewise_constant" and rules is not None:
            yield f'lr_step_rules = {rules!r} belongs to lr_scheduler = "piecewise_constant", not "{self.lr_scheduler}"'
        if self.lr_scheduler in ("constant", "piecewise_constant") and self.lr_warmup_steps:
            yield (
                f'lr_warmup_steps = {self.lr_warmup_steps}, but lr_scheduler = "{self.lr_scheduler}" knows none: take '
                '"constant_with_warmup", or set 0'
            )
        if rules is not None and not _is_step_rules(rules):
            yield f"lr_step_rules = {rules!r} is not factor:step,…,factor with rising steps, {example}"
        if self.lr_scheduler == "polynomial" and self.scaled_learning_rate <= 1e-7:
            yield (
                f'lr_scheduler = "polynomial" ends at a rate of 1e-7, but learning_rate = {self.scaled_learning_rate:g} '
                "is not above it: raise it, set scale_lr, or take another schedule"
            )


def _is_step_rules(text: str) -> bool:
    *rules, last = (part.split(":") for part in text.split(","))
    try:
        steps = [int(step) for _, step in rules]
        factors = [float(factor) for factor, _ in rules] + [float(factor) for (factor,) in [last]]
    except ValueError:
        return False
    return steps == sorted({step for step in steps if step > 0}) and all(0 <= factor < math.inf for factor in factors)
