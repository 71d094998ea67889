"""The recipe of `jobs.train`: learning from examples that are already there."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.rewards.config import JudgesConfig, ServeConfig
from rlhf.section import ClusterConfig, Section
from rlhf.tables import (
    DPOConfig,
    HeldOutConfig,
    PairDataConfig,
    PreprocessConfig,
    RunConfig,
    SizedModelTable,
    TrainableTable,
    TrainerConfig,
)


class OfflineRunConfig(RunConfig):
    name: str = "offline_dpo"


class OfflineDPO(DPOConfig):
    reference_refresh_every: int = Field(0, ge=0)
    """Steps between copies of the policy into the reference; 0: never, as in the paper."""


class TrainRecipe(Section):
    objective: Literal["dpo", "sft"] = "dpo"
    """`sft` trains on the winners alone, without a reference."""
    run: OfflineRunConfig = OfflineRunConfig()
    model: SizedModelTable
    data: PairDataConfig
    eval: HeldOutConfig = HeldOutConfig()
    dpo: OfflineDPO = OfflineDPO()
    trainable: TrainableTable = TrainableTable()
    trainer: TrainerConfig = TrainerConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    judges: JudgesConfig = JudgesConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def judge_names(self) -> list[str]:
        """The judge that relabels, if one does."""
        return [self.data.choice_model] if self.data.choice_model else []

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        name = self.data.choice_model
        if name:
            problems += self.judges.unusable([name], "data.choice_model")
            if name in self.judges.rewards and self.judges[name].item_columns and self.data.item_metadata is None:
                problems.append(
                    f"data.choice_model = {name!r} needs data.item_metadata: it reads the item of a picture"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self
