"""The recipe of `jobs.online_dpo`."""

from typing import Self

from pydantic import Field, model_validator

from rlhf.rewards.config import JudgesConfig, RewardConfig, ServeConfig
from rlhf.section import ClusterConfig, Section
from rlhf.tables import (
    DataConfig,
    DPOConfig,
    EvalConfig,
    OnlineSamplersConfig,
    PreprocessConfig,
    RolloutConfig,
    RunConfig,
    SamplingTable,
    TrainableTable,
    TrainedEditModelTable,
    TrainerConfig,
)


class OnlineRunConfig(RunConfig):
    name: str = "online_dpo"
    sample_every: int = Field(10, ge=1)
    """Steps between contact sheets."""
    save_latents: bool = True


class OnlineDPORecipe(Section):
    run: OnlineRunConfig = OnlineRunConfig()
    model: TrainedEditModelTable
    data: DataConfig
    sampling: SamplingTable = SamplingTable()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    judges: JudgesConfig = JudgesConfig()
    dpo: DPOConfig = DPOConfig()
    trainable: TrainableTable = TrainableTable()
    trainer: TrainerConfig = TrainerConfig()
    samplers: OnlineSamplersConfig = OnlineSamplersConfig()
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
        needing = [n for n in self.reward.names if n in self.judges.rewards and self.judges[n].item_columns]
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
