"""The configuration of a run: frozen, typed, and strict.

Each table of a TOML recipe is one class here. An unknown key is an error that names the nearest valid one, a rule between
two keys names both values, and the defaults are the seed document's (H×W 1312×784, 16 steps, β 5000, …).
"""

import difflib
import os
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOCAL_PATH = "local path"
LocalPath = Annotated[str, LOCAL_PATH]
"""A file or folder of this machine: `jobs.cli` makes it absolute, and refuses a relative one in a submitted job."""


class Section(BaseModel):
    """A frozen table that refuses unknown keys, naming the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values.keys() - cls.model_fields.keys():
                near = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r} = {values[key]!r}; {hint}")
        return values


class RunConfig(Section):
    name: str = "online_dpo"
    dir: LocalPath = "runs"
    """Folder that holds every run; this one writes to `dir`/`name`/vN. Shared by all nodes."""
    seed: int = 42
    resume: Literal["auto", "never"] = "auto"
    save_every: int = Field(100, ge=1)
    """Steps between committed checkpoints (the seed's --checkpointing_steps)."""
    export_every: int = Field(0, ge=0)
    """Steps between exports of loadable weights into the checkpoint; 0: only at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(10, ge=1)
    """Steps between contact sheets."""
    save_latents: bool = True


class ModelConfig(Section):
    family: Literal["flux_kontext"] = "flux_kontext"
    path: LocalPath
    """Folder in the diffusers layout."""
    height: int = Field(1312, ge=16, multiple_of=16)
    width: int = Field(784, ge=16, multiple_of=16)
    size: Literal["fixed", "auto"] = "fixed"
    """`auto`: the nearest of Kontext's own sizes per image."""


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


class HPSRewardConfig(Section):
    empty_prompt: str = "{food_name}"
    """Text scored in place of an empty instruction; {food_name} and the other item fields are filled in."""


class RewardConfig(Section):
    type: Literal["hps", "hpsv2", "ctr", "hps_ctr"] = "hps_ctr"
    scaling: Literal["running", "fixed"] = "running"
    """`running`: each reward over its pooled within-group deviation.
    `fixed`: the seed's 0.5·clip((hps−0.15)/0.2, 0, 1) + 0.5·ctr."""
    hps: HPSRewardConfig = HPSRewardConfig()

    @property
    def names(self) -> tuple[str, ...]:
        return {"hps": ("hps",), "hpsv2": ("hps",), "ctr": ("ctr",), "hps_ctr": ("hps", "ctr")}[self.type]


class JudgeConfig(Section):
    """One judge: a Serve deployment of ours, or an external HTTP service at `url`."""

    path: LocalPath | None = None
    url: str | None = None
    token: str | None = Field(None, exclude=True)
    """Bearer token that the service at `url` asks for. Never written to a file."""
    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.2, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    max_batch_size: int = Field(16, ge=1)
    batch_wait_s: float = Field(0.02, ge=0)
    max_ongoing_requests: int = Field(64, ge=1)
    max_queued_requests: int = Field(256, ge=-1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    pad_batches: bool = False
    """Pad every forward to max_batch_size rows: a score is then the same bits whatever it was batched with."""

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests = {self.max_ongoing_requests} is below max_batch_size = {self.max_batch_size}: "
                "batches would never fill"
            )
        return self


class HPSJudgeConfig(JudgeConfig):
    version: Literal["v2.0", "v2.1"] = "v2.1"


class FilterJudgeConfig(JudgeConfig):
    enabled: bool = True
    api_base: str | None = None
    """An OpenAI-compatible server instead of the built-in engine (also QWEN_API_BASE, QWEN_API_KEY, QWEN_MODEL_NAME)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    model_name: str = "Qwen/Qwen3-VL-32B-Instruct"
    min_pass_probability: float = Field(0.5, ge=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    max_model_len: int = Field(4096, ge=256)
    max_reason_tokens: int = Field(64, ge=0)


class JudgesConfig(Section):
    hps: HPSJudgeConfig = HPSJudgeConfig()
    ctr: JudgeConfig = JudgeConfig()
    filter: FilterJudgeConfig = FilterJudgeConfig()
    max_failure_rate: float = Field(0.5, ge=0, le=1)
    """Share of failed calls of one judge, over its last 50, above which the run stops."""
    retries: int = Field(2, ge=0)
    timeout_s: float = Field(120.0, gt=0)
    deploy_timeout_s: float = Field(1800.0, gt=0)


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
    max_train_steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_steps: int = Field(0, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = True
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights; unset: none is kept."""
    lora: LoRAConfig | None = None
    num_cpus: float = Field(0.3, ge=0)
    num_gpus: float = Field(1.0, ge=0)
    timeout_s: float = Field(1800.0, gt=0)
    """One step, save or publish on one rank."""

    @property
    def pairs_per_rank(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def pairs_per_step(self) -> int:
        return self.pairs_per_rank * self.ranks


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
    model: ModelConfig
    edit: EditRequestConfig
    rollout: RolloutConfig = RolloutConfig()


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    route_prefix: str = Field("", pattern=r"^(/[\w-]+)*$")
    """Put before /hpsv2, /ctr and /filter: a second run on the same cluster needs its own, like /second."""
    token: str | None = Field(None, exclude=True)
    """Bearer token asked of every HTTP request; also RLHF_SERVE_TOKEN. Never written to a file."""


class PreprocessConfig(Section):
    encoders: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    num_cpus: float = Field(0.3, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    timeout_s: float = Field(7200.0, gt=0)


class ClusterConfig(Section):
    address: str | None = None
    """A running cluster ("auto" or host:port; also RAY_ADDRESS). Unset: the job starts one of its own and ends it."""
    num_cpus: float | None = None
    object_store_memory: int | None = Field(None, ge=80_000_000)


class OnlineDPOConfig(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if "ctr" in self.reward.names and self.data.item_metadata is None:
            problems.append(
                f'reward.type = "{self.reward.type}" needs data.item_metadata: the CTR model reads the item'
            )
        if self.model.size == "auto" and self.trainer.train_batch_size != 1:
            problems.append(
                f'model.size = "auto" mixes picture sizes, but trainer.train_batch_size = {self.trainer.train_batch_size} '
                "stacks pairs; set it to 1 and raise trainer.gradient_accumulation_steps"
            )
        for name in self.reward.names:
            judge = getattr(self.judges, name)
            if judge.path is None and judge.url is None:
                problems.append(
                    f'reward.type = "{self.reward.type}" needs judges.{name}.path (a checkpoint) or judges.{name}.url'
                )
        filter = self.judges.filter
        if filter.enabled and not (filter.path or filter.url or filter.api_base or os.environ.get("QWEN_API_BASE")):
            problems.append(
                "judges.filter needs path (a Qwen3-VL folder), url or api_base; or set judges.filter.enabled = false"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class CTRDataConfig(Section):
    path: LocalPath
    """CSV: image_url (a path relative to the file), food_name, food_type, city_name, shop_name, pv_ctr[, impressions, clicks]."""
    eval_path: LocalPath | None = None
    """The same for held-out rows; unset: `eval_fraction` of the pictures of `path` are held out."""
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    on_bad_row: Literal["stop", "skip"] = "stop"


class CTRModelSection(Section):
    text: LocalPath | None = None
    """Folder of a text backbone for AutoModel (the seed: Chinese-BERT-wwm-ext); unset with `image`: a small pair from scratch."""
    image: LocalPath | None = None
    """Folder of an image backbone for AutoModel (the seed: ConvNeXtV2-Huge-22k-512)."""
    image_size: int | None = Field(None, ge=32)
    """Pixels of the square that pictures are padded to; default 512, and 64 for the small pair."""
    max_tokens: int = Field(64, ge=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) != (self.image is None):
            raise ValueError(
                f"model.text = {self.text!r} and model.image = {self.image!r}: give both backbones or neither"
            )
        return self


class CTRTrainConfig(Section):
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(32, ge=2)
    gradient_accumulation_steps: int = Field(1, ge=1)
    loss: Literal["auto", "compound", "binomial"] = "auto"
    """`compound`: the seed's. `binomial`: clicks of impressions, where the CSV has them. `auto`: binomial if it has."""
    learning_rate: float = Field(1e-3, gt=0)
    """Heads, and everything in the small model."""
    text_learning_rate: float = Field(2e-5, gt=0)
    image_learning_rate: float = Field(5e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["bf16", "no"] = "no"
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    timeout_s: float = Field(86400.0, gt=0)


class TrainCTRConfig(Section):
    data: CTRDataConfig
    model: CTRModelSection = CTRModelSection()
    train: CTRTrainConfig = CTRTrainConfig()
    output: LocalPath = "runs/ctr"
    """Folder of the checkpoint; judges.ctr.path of the runs that use it. Never overwritten."""
    seed: int = 42
    cluster: ClusterConfig = ClusterConfig()
