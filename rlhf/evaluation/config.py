"""The recipe of an evaluation: which model, which weights against its own, on what prompts, by which judges."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.data.media import Fit
from rlhf.rewards.config import JudgesConfig, RewardConfig, ServeConfig
from rlhf.section import ClusterConfig, LocalPath, Section
from rlhf.tables import CheckpointConfig


class EvaluatedModelConfig(CheckpointConfig):
    """The base model."""

    height: int | None = Field(None, ge=16, multiple_of=16)
    """Pixels. Unset, with `width`: the family's own size, for edits the nearest to each source picture."""
    width: int | None = Field(None, ge=16, multiple_of=16)
    guidance_scale: float | None = None
    """Unset: the family's own default."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """What the networks compute in, as in `trainer.mixed_precision` of a run's recipe."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height = {self.height} and width = {self.width}: give both or neither")
        return self


class TunedConfig(Section):
    """The weights that are compared with the base model's own."""

    denoiser: LocalPath | None = None
    """A trained folder, e.g. RUN/final/transformer, RUN/final/ema_unet."""
    lora: LocalPath | None = None
    """A LoRA file or its folder, e.g. RUN/final/lora."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.denoiser is None) == (self.lora is None):
            raise ValueError(f"give exactly one: denoiser = {self.denoiser!r}, lora = {self.lora!r}")
        return self


class EvaluateDataConfig(Section):
    """The prompts; the keys mean what they mean in a run's recipe."""

    path: LocalPath
    """JSONL with image_id, prompt and image; where the model sees no source: JSONL with prompt (and image_id), or a .txt
    file with one prompt a line."""
    item_metadata: LocalPath | None = None
    """CSV: image_id, food_name, food_type, city_name, shop_name. Required where a CTR judge is asked."""
    prompt_column: str = "prompt"
    fit: Fit = "crop"
    max_prompts: int | None = Field(None, ge=1)
    """Only the first so many."""
    on_bad_row: Literal["stop", "skip"] = "stop"


class EvaluateSamplingConfig(Section):
    steps: int = Field(16, ge=1)
    seeds: int = Field(1, ge=1)
    """Pictures per prompt, each from noise of its own; base and tuned get the same."""
    batch_size: int = Field(4, ge=1)
    """Pictures per denoising batch; short batches are padded, so that a picture never depends on its neighbours."""


class PaintersConfig(Section):
    """The processes that sample. They are gone before the judges come, so both may use the same GPU."""

    count: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(1.0, ge=0)
    timeout_s: float = Field(1800.0, gt=0)
    """Loading the weights with the first batch, and each further batch."""


class EvaluateConfig(Section):
    out: LocalPath
    """Folder for the page, the numbers and the pictures. A finished evaluation is never overwritten."""
    seed: int = Field(0, ge=0)
    model: EvaluatedModelConfig
    tuned: TunedConfig
    data: EvaluateDataConfig
    sampling: EvaluateSamplingConfig = EvaluateSamplingConfig()
    reward: RewardConfig = RewardConfig()
    """Which judges are asked, as in a run's recipe. They are never mixed here, so the numbers in weights do not matter."""
    judges: JudgesConfig = JudgesConfig()
    """Where the judges are. The filter is not asked."""
    painters: PaintersConfig = PaintersConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        no_filter = self.judges.filter.model_copy(update={"enabled": False})
        problems = self.judges.model_copy(update={"filter": no_filter}).problems(self.reward)
        needing = [n for n in self.reward.names if n in self.judges.rewards and self.judges[n].needs_item]
        if needing and self.data.item_metadata is None:
            problems.append(f"the judge {needing[0]!r} needs data.item_metadata: it reads the item of a picture")
        if problems:
            raise ValueError("; ".join(problems))
        return self
