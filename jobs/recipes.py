"""The recipes: one class per job, which puts tables together. No key has its default here but those of the job alone.

`jobs.train_ctr`'s is in `rlhf.rewards.ctr.config`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from pydantic import Field

from rlhf import tables
from rlhf.rewards.config import JudgesConfig, RewardConfig, ServeConfig
from rlhf.section import ClusterConfig, LocalPath, Section
from rlhf.training_tables import TrainableTable, TrainerConfig
from rlhf.types import Fit


class OnlineRunConfig(tables.RunConfig):
    name: str = "online_dpo"
    sample_every: int = Field(10, ge=1)
    """Steps between contact sheets."""
    save_latents: bool = True


class OnlineDPORecipe(Section):
    run: OnlineRunConfig = OnlineRunConfig()
    tracking: tables.TrackingTable = tables.TrackingTable()
    model: tables.EditModelTable
    data: tables.DataConfig
    sampling: tables.SamplingTable = tables.SamplingTable()
    rollout: tables.RolloutConfig = tables.RolloutConfig()
    reward: RewardConfig = RewardConfig()
    judges: JudgesConfig = JudgesConfig()
    dpo: tables.DPOConfig = tables.DPOConfig()
    trainable: TrainableTable = TrainableTable()
    trainer: TrainerConfig = TrainerConfig()
    samplers: tables.OnlineSamplersConfig = tables.OnlineSamplersConfig()
    eval: tables.EvalConfig = tables.EvalConfig()
    serve: ServeConfig = ServeConfig()
    preprocess: tables.PreprocessConfig = tables.PreprocessConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        """The judges of this run."""
        return [*self.reward.names, *(["filter"] if self.judges.filter.enabled else [])]

    def conflicts(self) -> Iterator[str]:
        yield from _layouts_of_no_lora(self.run, self.trainable)
        yield from _without_items("the reward", self.reward.names, self.judges, self.data.item_metadata)
        yield from self.reward.unfilled(self.data.item_metadata)
        if self.trainer.epochs is not None:
            yield (
                f"trainer.epochs = {self.trainer.epochs} belongs to jobs.train; online, prompts are sampled anew in every epoch: "
                "leave it out and set trainer.max_train_steps"
            )
        if self.trainer.timestep_weighting != "none":
            yield f"trainer.timestep_weighting = {self.trainer.timestep_weighting!r} is of SFT, in jobs.train: leave it out"
        if self.model.size == "auto" and self.trainer.train_batch_size != 1:
            yield (
                f'model.size = "auto" mixes picture sizes, but trainer.train_batch_size = {self.trainer.train_batch_size} '
                "stacks pairs; set it to 1 and raise trainer.gradient_accumulation_steps"
            )
        yield from self.judges.problems(self.reward)


class OfflineRunConfig(tables.RunConfig):
    name: str = "offline_dpo"


class OfflineDPO(tables.DPOConfig):
    reference_refresh_every: int = Field(0, ge=0)
    """Steps between copies of the policy into the reference; 0: never, as in the paper."""


class TrainRecipe(Section):
    objective: Literal["dpo", "sft"] = "dpo"
    """`sft` trains on the winners alone, without a reference."""
    run: OfflineRunConfig = OfflineRunConfig()
    tracking: tables.TrackingTable = tables.TrackingTable()
    model: tables.SizedModelTable
    data: tables.PairDataConfig
    eval: tables.HeldOutConfig = tables.HeldOutConfig()
    validation: tables.ValidationTable = tables.ValidationTable()
    dpo: OfflineDPO = OfflineDPO()
    trainable: TrainableTable = TrainableTable()
    trainer: TrainerConfig = TrainerConfig()
    preprocess: tables.PreprocessConfig = tables.PreprocessConfig()
    judges: JudgesConfig = JudgesConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        """The judge that relabels, if one does."""
        return [self.data.choice_model] if self.data.choice_model else []

    def conflicts(self) -> Iterator[str]:
        yield from _layouts_of_no_lora(self.run, self.trainable)
        if self.data.buckets and not self.data.buckets.areas:
            yield from self.data.buckets.unfit(self.model.height * self.model.width, "model.height × model.width")
        if self.objective == "dpo" and self.trainer.timestep_weighting != "none":
            yield f'trainer.timestep_weighting = {self.trainer.timestep_weighting!r} is of objective = "sft": leave it out'
        if self.data.choice_model and self.model.frames > 1:
            yield f"data.choice_model = {self.data.choice_model!r}: judges see pictures, but model.frames = {self.model.frames}"
        yield from self.judges.unusable(self.judge_names, "data.choice_model")
        yield from _without_items("data.choice_model =", self.judge_names, self.judges, self.data.item_metadata)


Text = Literal["en", "cn", "inverse_en", "inverse_cn"]
TEXTS = get_args(Text)


class ExtractConfig(Section):
    """Which rows `jobs.extract` makes a task folder of, and the names of their columns."""

    rows: LocalPath
    """JSONL."""
    name: str
    """Of the task folder, which is made below data.path."""
    texts: tuple[Text, ...] = Field(TEXTS, min_length=1)
    """Those that are taken, where a row has them."""
    source: str = "source_image"
    target: str = "target_image"
    en: str = "instruction"
    cn: str = "instruction_cn"
    inverse_en: str = "inverse_instruction"
    inverse_cn: str = "inverse_instruction_cn"


class ExtractRecipe(TrainRecipe):
    """A recipe of jobs.train, whose model, sizes, cache and encoders are used, and what is extracted for it."""

    extract: ExtractConfig


class EvaluateRecipe(Section):
    out: LocalPath
    """Folder for the page, the numbers and the pictures. A finished evaluation is never overwritten."""
    seed: int = Field(0, ge=0)
    model: tables.EvaluatedModelTable
    tuned: tables.TunedTable
    data: tables.PromptDataTable
    sampling: tables.EvaluateSamplingTable = tables.EvaluateSamplingTable()
    reward: RewardConfig = RewardConfig()
    """Which judges are asked, as in a run's recipe. They are never mixed here, so the numbers in weights do not matter."""
    judges: JudgesConfig = JudgesConfig()
    """Where the judges are. The filter is not asked."""
    samplers: tables.SamplersConfig = tables.SamplersConfig()
    """They are gone before the judges come, so both may use the same GPU."""
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    def conflicts(self) -> Iterator[str]:
        no_filter = self.judges.filter.model_copy(update={"enabled": False})
        yield from self.judges.model_copy(update={"filter": no_filter}).problems(self.reward)
        yield from _without_items("the judge", self.reward.names, self.judges, self.data.item_metadata)
        yield from self.reward.unfilled(self.data.item_metadata)


class EditRequestConfig(Section):
    """What is edited, and where the PNGs go."""

    image: LocalPath | None = None
    references: tuple[str, ...] = ()
    """Further pictures beside `image`, for a model that takes several."""
    prompt: str = ""
    data: LocalPath | None = None
    """A JSONL like data.path, instead of one image."""
    out: LocalPath = "edits"
    seed: int = 0
    variants: int = Field(1, ge=1, le=1000)
    """Edits per prompt, each from noise of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    encoder_device: Literal["cpu", "cuda"] | None = None
    """Of the encoders and the VAE. Unset: `device`; "cpu" leaves the card to the denoiser."""
    fit: Fit = "crop"

    def conflicts(self) -> Iterator[str]:
        if (self.image is None) == (self.data is None):
            yield f"give either image or data: image = {self.image!r}, data = {self.data!r}"
        if self.data is not None and self.prompt:
            yield f"prompt = {self.prompt!r} belongs to image: the rows of data have instructions of their own"
        if self.data is not None and self.references:
            yield f"references = {list(self.references)!r} belong to image: a row of data has a list of pictures"


class EditRecipe(Section):
    model: tables.EditModelTable
    edit: EditRequestConfig
    tuned: tables.WeightsTable = tables.WeightsTable()
    """Unset: the base model's weights."""
    sampling: tables.SolverTable = tables.SolverTable()


class ServeRecipe(Section):
    """What `jobs.serve` keeps up: every judge below that has a checkpoint, a function or a server to ask."""

    name: str = "judges"
    judges: JudgesConfig = JudgesConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        names = [*self.judges.rewards, *(["filter"] if self.judges.filter.enabled else [])]
        return list(self.judges.to_deploy(names))

    def conflicts(self) -> Iterator[str]:
        if not self.judge_names:
            yield "nothing to serve: give a judge its source, e.g. judges.hps.path or judges.filter.path"


def _layouts_of_no_lora(run: tables.RunConfig, trainable: TrainableTable) -> Iterator[str]:
    if run.lora_layouts and (trainable.kind != "lora" or trainable.patterns):
        chosen = f'trainable.kind = "{trainable.kind}"' + (" with patterns" if trainable.patterns else "")
        yield (
            f"run.lora_layouts = {list(run.lora_layouts)!r} are layouts of a LoRA alone, but {chosen} trains other weights: "
            "leave them out"
        )


def _without_items(asked_by: str, names: Sequence[str], judges: JudgesConfig, items: str | None) -> Iterator[str]:
    """A line where a judge of `names` reads the item of a picture, and there are no `items`."""
    needing = [name for name in names if name in judges.rewards and judges[name].item_columns]
    if items is None and needing:
        yield f"{asked_by} {needing[0]!r} needs data.item_metadata: it reads the item of a picture"
