"""The configuration of a run: frozen, typed, and strict.

Each table of a TOML recipe is one class here. An unknown key is an error that names the nearest valid one, a rule between
two keys names both values, and the defaults are the old script's (H×W 1312×784, 16 steps, β 5000, …).
"""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rlhf.rewards.config import JudgesConfig, RewardConfig, ServeConfig
from rlhf.section import ClusterConfig, LocalPath, Section


class RunConfig(Section):
    name: str
    dir: LocalPath = "runs"
    """Folder that holds every run; this one writes to `dir`/`name`/vN. Shared by all nodes."""
    seed: int = Field(42, ge=0)
    resume: Literal["auto", "never"] = "auto"
    save_every: int = Field(100, ge=1)
    """Steps between committed checkpoints (the old script's --checkpointing_steps)."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older ones are removed; what is exported stays."""
    export_every: int = Field(0, ge=0)
    """Steps between exports of loadable weights into exports/; 0: only at the end, into final/."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of exported weights: float32 loses nothing that was learnt, the others load at half the size."""


class OnlineRunConfig(RunConfig):
    name: str = "online_dpo"
    sample_every: int = Field(10, ge=1)
    """Steps between contact sheets."""
    save_latents: bool = True


class CheckpointConfig(Section):
    family: Literal["flux_kontext", "stable_diffusion"] = "flux_kontext"
    path: LocalPath
    """Folder in the diffusers layout."""
    denoiser: LocalPath | None = None
    """A trained folder in place of the model's own, e.g. RUN/final/unet of an SFT run that DPO is to begin with."""


class ModelConfig(CheckpointConfig):
    height: int = Field(ge=16, multiple_of=8)
    width: int = Field(ge=16, multiple_of=8)


class EditModelConfig(ModelConfig):
    height: int = Field(1312, ge=16, multiple_of=16)
    width: int = Field(784, ge=16, multiple_of=16)
    size: Literal["fixed", "auto"] = "fixed"
    """`auto`: the nearest of the family's own sizes per image."""


class DataConfig(Section):
    path: LocalPath
    """JSONL: image_id, prompt, image (relative to the file)."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name. Required where a CTR reward is used."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    prompt_column: str = "prompt"
    on_bad_row: Literal["stop", "skip"] = "stop"
    cache: LocalPath = "cache"
    """Folder of the content-addressed cache of encoded prompts."""


class RolloutConfig(Section):
    steps: int = Field(16, ge=1)
    guidance_scale: float = 3.5
    num_valid_samples: int = Field(2, ge=2)
    max_sample_attempts: int = Field(20, ge=2)
    batch_size: int = Field(4, ge=1)
    """Candidates per denoising batch; short batches are padded so that a candidate's pixels never depend on its neighbours."""
    lookahead: int = Field(0, ge=0)
    """Batches of groups sampled ahead of the trainer. 0 with publish_every 1 is strictly on-policy."""
    publish_every: int = Field(1, ge=1)
    max_age: int | None = None
    """Largest (steps since its policy was published) a pair may have when it trains; default: the smallest that works."""
    max_dropped_in_a_row: int = Field(32, ge=1)
    """Groups in a row without a pair after which the run stops with the counts."""
    timeout_s: float = Field(1800.0, gt=0)
    """One sampling batch."""

    @property
    def oldest(self) -> int:
        return self.lookahead + self.publish_every - 1 if self.max_age is None else self.max_age

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_sample_attempts < self.num_valid_samples:
            raise ValueError(
                f"max_sample_attempts = {self.max_sample_attempts} is below num_valid_samples = {self.num_valid_samples}"
            )
        need = self.lookahead + self.publish_every - 1
        if self.max_age is not None and self.max_age < need:
            raise ValueError(
                f"max_age = {self.max_age} is below lookahead + publish_every - 1 = {self.lookahead} + {self.publish_every} - 1"
                f" = {need}: every pair would be too old to train on"
            )
        return self


class DPOConfig(Section):
    beta: float = Field(5000.0, gt=0)
    reference_refresh_every: int = Field(50, ge=0)
    """Steps between copies of the policy into the reference; 0: never."""


class LoRAConfig(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] | None = None
    """Module name endings; default: the family's attention and MLP projections."""


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
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = "constant_with_warmup"
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
    adam_beta1: float = 0.9
    """adam_* are read by adamw and adamw_8bit, weight_decay by every optimizer."""
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """What the network computes in; the trained weights stay fp32. fp16 trains under a dynamic loss scale."""
    gradient_checkpointing: bool = True
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights; unset: none is kept."""
    lora: LoRAConfig | None = None
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.effective_batch_size not in (None, self.pairs_per_step):
            raise ValueError(
                f"effective_batch_size = {self.effective_batch_size}: write it as a whole number, like 2048"
            )
        if self.lr_scheduler == "piecewise_constant" and self.lr_step_rules is None:
            raise ValueError('lr_scheduler = "piecewise_constant" needs lr_step_rules, e.g. "1:10,0.1:20,0.01"')
        if self.lr_step_rules is not None and not _is_step_rules(self.lr_step_rules):
            raise ValueError(
                f"lr_step_rules = {self.lr_step_rules!r} is not factor:step,…,factor with rising steps, "
                'e.g. "1:10,0.1:20,0.01"'
            )
        if self.lr_scheduler == "polynomial" and self.scaled_learning_rate <= 1e-7:
            raise ValueError(
                f'lr_scheduler = "polynomial" ends at a rate of 1e-7, but learning_rate = {self.scaled_learning_rate:g} '
                "is not above it: raise it, set scale_lr, or take another schedule"
            )
        return self


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
    max_restarts: int = Field(4, ge=0)


class EvalConfig(Section):
    path: LocalPath | None = None
    every: int = Field(50, ge=1)
    seeds: int = Field(1, ge=1)
    max_prompts: int = Field(16, ge=1)


class EditRequestConfig(Section):
    """What `jobs.edit` edits, with which weights, and where the PNGs go."""

    image: LocalPath | None = None
    prompt: str = ""
    data: LocalPath | None = None
    """A JSONL like data.path, instead of one image."""
    transformer: LocalPath | None = None
    """A trained transformer folder, e.g. RUN/final/transformer; unset: the base model's."""
    lora: LocalPath | None = None
    """A LoRA file or its folder, e.g. RUN/final/lora."""
    out: LocalPath = "edits"
    seed: int = 0
    variants: int = Field(1, ge=1)
    """Edits per prompt, each from noise of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fit: Literal["crop", "pad", "stretch"] = "crop"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.image is None) == (self.data is None):
            raise ValueError(f"give either image or data: image = {self.image!r}, data = {self.data!r}")
        return self


class EditConfig(Section):
    model: EditModelConfig
    edit: EditRequestConfig
    rollout: RolloutConfig = RolloutConfig()


class PreprocessConfig(Section):
    encoders: int = Field(1, ge=1)
    """Processes that hold the text encoders and the VAE."""
    batch_size: int = Field(8, ge=1)
    """Texts, or pictures (on the fly: pairs), encoded at once; short batches are padded."""
    num_cpus: float = Field(0.3, ge=0)
    """Of each encoder."""
    num_gpus: float = Field(0.0, ge=0)
    """Of each encoder; 0: on the CPU."""
    timeout_s: float = Field(7200.0, gt=0)
    """All of the encoding before training and, offline, before it all of the check of the pairs."""


class OnlineDPOConfig(Section):
    run: OnlineRunConfig = OnlineRunConfig()
    model: EditModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    judges: JudgesConfig = JudgesConfig()
    dpo: DPOConfig = DPOConfig()
    trainer: TrainerConfig = TrainerConfig()
    samplers: SamplersConfig = SamplersConfig()
    eval: EvalConfig = EvalConfig()
    serve: ServeConfig = ServeConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        """The judges of this run."""
        return [*self.reward.names, *(["filter"] if self.judges.filter.enabled else [])]

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        needing = [n for n in self.reward.names if n in self.judges.rewards and self.judges[n].needs_item]
        if needing and self.data.item_metadata is None:
            problems.append(f"the reward {needing[0]!r} needs data.item_metadata: it reads the item of a picture")
        if self.model.size == "auto" and self.trainer.train_batch_size != 1:
            problems.append(
                f'model.size = "auto" mixes picture sizes, but trainer.train_batch_size = {self.trainer.train_batch_size} '
                "stacks pairs; set it to 1 and raise trainer.gradient_accumulation_steps"
            )
        problems += self.judges.problems(self.reward)
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ServeJobConfig(Section):
    """What `jobs.serve` keeps up: every judge below that has a checkpoint, a function or a server to ask."""

    name: str = "judges"
    judges: JudgesConfig = JudgesConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        names = [*self.judges.rewards, *(["filter"] if self.judges.filter.enabled else [])]
        return list(self.judges.to_deploy(names))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.judge_names:
            raise ValueError("nothing to serve: give a judge its source, e.g. judges.hps.path or judges.filter.path")
        return self
