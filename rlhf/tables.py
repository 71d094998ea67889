"""The tables of recipes: frozen, typed, and strict.

A recipe (`jobs.recipes`) puts tables together; a constructor takes the tables that it reads. The defaults are those of FEAST's
`train_dpo_flux_kontext.py`. The tables of judges are in `rlhf.rewards.config`.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rlhf.names import name_fault
from rlhf.section import LocalPath, Section
from rlhf.types import Fit


class RunConfig(Section):
    name: str
    dir: LocalPath = "runs"
    """Folder that holds every run; this one writes to `dir`/`name`/vN. Shared by all nodes."""
    seed: int = Field(42, ge=0)
    resume: Literal["auto", "never"] = "auto"
    save_every: int = Field(100, ge=1)
    """Steps between committed checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older ones are removed; what is exported stays."""
    export_every: int = Field(0, ge=0)
    """Steps between exports of loadable weights into exports/; 0: only at the end, into final/."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of exported weights: float32 loses nothing that was learnt, the others load at half the size."""

    def conflicts(self) -> Iterator[str]:
        if fault := name_fault(self.name):
            yield f"name = {self.name!r} {fault}"


class ModelTable(Section):
    family: str = "flux_kontext"
    """A name of rlhf.models.FAMILIES, or module:NAME of a family of yours, importable on every node."""
    path: LocalPath
    """Folder in the diffusers layout."""
    denoiser: LocalPath | None = None
    """A trained folder in place of the model's own, e.g. RUN/final/unet of an SFT run that DPO is to begin with."""
    accept_index: bool = False
    """Take a folder whose model_index.json names another pipeline: FLUX.1 Dev has Kontext's shapes, and some Kontext copies
    have Dev's index."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the networks compute in; trained weights stay fp32. float16 trains under a dynamic loss scale."""
    guidance_scale: float | None = None
    """Of classifier-free guidance when sampling; a network with embedded guidance is told it in training too. Unset: the
    family's own default."""


class SizedModelTable(ModelTable):
    height: int = Field(ge=16, multiple_of=8)
    """Pixels."""
    width: int = Field(ge=16, multiple_of=8)
    frames: int = Field(1, ge=1)
    """Of a sample; more than 1: a video."""


class EditModelTable(ModelTable):
    height: int = Field(1312, ge=16, multiple_of=16)
    """Pixels."""
    width: int = Field(784, ge=16, multiple_of=16)
    size: Literal["fixed", "auto"] = "fixed"
    """`auto`: the nearest of the family's own sizes per picture."""


class TrainedEditModelTable(EditModelTable):
    frames: int = Field(1, ge=1)
    """Of a sample; more than 1: a video."""


class EvaluatedModelTable(ModelTable):
    height: int | None = Field(None, ge=16, multiple_of=16)
    """Pixels. Unset, with `width`: the family's own size, for edits the nearest to each source picture."""
    width: int | None = Field(None, ge=16, multiple_of=16)

    def conflicts(self) -> Iterator[str]:
        if (self.height is None) != (self.width is None):
            yield f"height = {self.height} and width = {self.width}: give both or neither"


class SolverTable(Section):
    steps: int = Field(16, ge=1)
    guidance_scale: float | None = None
    """Unset: model.guidance_scale."""


class SamplingTable(SolverTable):
    batch_size: int = Field(4, ge=1)
    """Pictures per denoising batch. Short ones are padded, so that no bit of a picture depends on its neighbours or their number.
    Its place may change its last bits: with 1 there is one place, and a resumed run repeats an uninterrupted one on any CPU."""


class WeightsTable(Section):
    denoiser: LocalPath | None = None
    """A trained folder, e.g. RUN/final/transformer, RUN/final/ema_unet."""
    lora: LocalPath | None = None
    """A LoRA file or its folder, e.g. RUN/final/lora."""

    def conflicts(self) -> Iterator[str]:
        if self.denoiser is not None and self.lora is not None:
            yield f"denoiser = {self.denoiser!r} and lora = {self.lora!r}: give one of them"


def _prompt_column(name: str) -> str:
    if name in ("", "image", "image_id"):
        raise ValueError('holds no instruction: name the field of data.path that does, such as "prompt"')
    return name


PromptColumn = Annotated[str, AfterValidator(_prompt_column)]


class DataConfig(Section):
    path: LocalPath
    """JSONL: image_id, prompt, image (a path relative to the file, or a list of them)."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name. Required where a CTR reward is used."""
    fit: Fit = "crop"
    prompt_column: PromptColumn = "prompt"
    on_bad_row: Literal["stop", "skip"] = "stop"
    cache: LocalPath = "cache"
    """Folder of the content-addressed cache of encodings."""


class PairDataConfig(Section):
    path: LocalPath
    """Preference pairs: Parquet or Arrow files in Pick-a-Pic's columns (a file, or a folder as `datasets` or the hub lays it
    out), a JSONL of winner, loser, prompt[, source] (a path or a list of them), or the pairs/ folder of an online run."""
    split: str = "train"
    """Of a folder with split-00000-of-….parquet files, those to read."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name; for a choice_model that reads the item of a JSONL's row."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    cache: LocalPath = "cache"
    """Folder of the checked index, of encoded captions and of cached latents."""
    choice_model: str | None = None
    """A judge whose scores decide the winner in place of the human label (AI feedback). Equal scores keep the label."""
    latents: Literal["cached", "on_the_fly"] = "cached"
    """`cached`: every picture is encoded once, before training. `on_the_fly`: encoder actors work beside the trainer."""
    crop: Literal["centre", "random"] = "centre"
    hflip: bool = True
    """Mirror half of the pairs, both pictures (and the source) alike."""
    caption_dropout: float = Field(0.2, ge=0, le=1)
    """Share of pairs that train with the empty caption, which classifier-free guidance needs."""
    shuffle: bool = True
    """False: the order of the files, epoch after epoch."""
    shuffle_blocks: int = Field(16, ge=1)
    """On the fly: Parquet row groups whose rows are mixed with each other; every encoder holds as many. Cached: all are."""

    def conflicts(self) -> Iterator[str]:
        if self.crop == "random" and self.latents == "cached":
            yield (
                'crop = "random" draws a crop for every visit, but latents = "cached" encodes a picture once; set '
                'latents = "on_the_fly" or crop = "centre"'
            )


class RolloutConfig(Section):
    num_valid_samples: int = Field(2, ge=2)
    max_sample_attempts: int = Field(20, ge=2)
    lookahead: int = Field(0, ge=0)
    """Batches of groups sampled ahead of the trainer. 0 with publish_every 1 is strictly on-policy."""
    publish_every: int = Field(1, ge=1)
    max_age: int | None = None
    """Largest (steps since its policy was published) a pair may have when it trains; default: the smallest that works."""
    max_dropped_in_a_row: int = Field(32, ge=1)
    """Groups in a row without a pair after which the run stops with the counts."""

    @property
    def oldest(self) -> int:
        return self.lookahead + self.publish_every - 1 if self.max_age is None else self.max_age

    def conflicts(self) -> Iterator[str]:
        attempts, valid = self.max_sample_attempts, self.num_valid_samples
        if attempts < valid:
            yield f"max_sample_attempts = {attempts} is below num_valid_samples = {valid}"
        ahead, every, age = self.lookahead, self.publish_every, self.max_age
        if age is not None and age < ahead + every - 1:
            need = f"lookahead + publish_every - 1 = {ahead} + {every} - 1 = {ahead + every - 1}"
            yield f"max_age = {age} is below {need}: every pair would be too old to train on"


class DPOConfig(Section):
    beta: float = Field(5000.0, gt=0)
    reference_refresh_every: int = Field(50, ge=0)
    """Steps between copies of the policy into the reference; 0: never."""


class TrainableTable(Section):
    kind: Literal["full", "lora", "modules"] = "full"
    """`full`: every weight. `lora`: adapters, and the modules of `patterns` if there are any. `modules`: those alone."""
    rank: int | None = Field(None, ge=1)
    """Of LoRA; unset: 16."""
    alpha: float | None = Field(None, gt=0)
    """Of LoRA, whose update is scaled by alpha / rank; unset: 16."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Of LoRA: module name endings; unset: the family's attention and MLP projections."""
    patterns: tuple[str, ...] = ()
    """Whole modules by their dotted names; `*` matches anything, e.g. "transformer_blocks.*.attn"."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "lora":
            return {"rank": 16, "alpha": 16.0} | {key: value for key, value in values.items() if value is not None}
        return values

    def conflicts(self) -> Iterator[str]:
        for key in ("rank", "alpha", "targets"):
            if self.kind != "lora" and (value := getattr(self, key)) is not None:
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
    max_train_steps: int = Field(1000, ge=1)
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
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    """`adafactor` keeps means of the second moment, `adamw_8bit` both moments in 8 bits (resumes on equal ranks only)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """adam_* are read by adamw and adamw_8bit, weight_decay by every optimizer."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, ge=0)
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
        whole, rules, example = self.effective_batch_size, self.lr_step_rules, 'e.g. "1:10,0.1:20,0.01"'
        if whole not in (None, self.pairs_per_step):
            yield f"effective_batch_size = {whole}: write it as a whole number, like 2048"
        if self.offload == "optimizer" and self.optimizer != "adamw":
            yield (
                f'offload = "optimizer" updates on the CPU, which only optimizer = "adamw" does here, not "{self.optimizer}": '
                "take one of the two"
            )
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


class SamplersConfig(Section):
    count: int = Field(1, ge=1)
    num_cpus: float = Field(0.2, ge=0)
    num_gpus: float = Field(1.0, ge=0)
    timeout_s: float = Field(1800.0, gt=0)
    """Starting, loading weights, and one batch."""


class OnlineSamplersConfig(SamplersConfig):
    max_restarts: int = Field(4, ge=0)
    """Of one sampler, and of the actor that asks the judges; a further failure ends the run."""


class EvalConfig(Section):
    path: LocalPath | None = None
    every: int = Field(50, ge=1)
    seeds: int = Field(1, ge=1)
    max_prompts: int = Field(16, ge=1)


class HeldOutConfig(Section):
    path: LocalPath | None = None
    """Pairs that are never trained on, in any format that data.path may have; unset: no evaluation."""
    split: str = "validation_unique"
    every: int = Field(100, ge=1)
    max_pairs: int = Field(256, ge=1)
    """Of the first so many, as many as fill batches of every rank."""
    draws: int = Field(4, ge=1)
    """(t, noise) draws per pair, always the same ones."""


class PreprocessConfig(Section):
    encoders: int = Field(1, ge=1)
    """Processes that hold the text encoders and the VAE."""
    batch_size: int = Field(8, ge=1)
    """Encodings computed at once; short batches are padded."""
    num_cpus: float = Field(0.3, ge=0)
    """Of each encoder."""
    num_gpus: float = Field(0.0, ge=0)
    """Of each encoder; 0: on the CPU."""
    timeout_s: float = Field(7200.0, gt=0)
    """All of the encoding before training and, offline, before it all of the check of the pairs."""


class PromptDataTable(Section):
    path: LocalPath
    """JSONL with image_id, prompt and image; where the model sees no source: JSONL with prompt (and image_id), or a .txt
    file with one prompt a line."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name. Required where a CTR judge is asked."""
    prompt_column: PromptColumn = "prompt"
    fit: Fit = "crop"
    max_prompts: int | None = Field(None, ge=1)
    """Only the first so many."""
    on_bad_row: Literal["stop", "skip"] = "stop"


class EvaluateSamplingTable(SamplingTable):
    seeds: int = Field(1, ge=1)
    """Pictures per prompt, each from noise of its own; base and tuned get the same."""


class TunedTable(WeightsTable):
    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.denoiser is None and self.lora is None:
            yield "give denoiser (a trained folder) or lora (a LoRA)"
