"""The recipe of `jobs.evaluate`: which model, which weights against its own, on what prompts, by which judges."""

from typing import Self

from pydantic import Field, model_validator

from rlhf.rewards.config import JudgesConfig, RewardConfig, ServeConfig
from rlhf.section import ClusterConfig, LocalPath, Section
from rlhf.tables import EvaluatedModelTable, EvaluateSamplingTable, PromptDataTable, SamplersConfig, TunedTable


class EvaluateRecipe(Section):
    out: LocalPath
    """Folder for the page, the numbers and the pictures. A finished evaluation is never overwritten."""
    seed: int = Field(0, ge=0)
    model: EvaluatedModelTable
    tuned: TunedTable
    data: PromptDataTable
    sampling: EvaluateSamplingTable = EvaluateSamplingTable()
    reward: RewardConfig = RewardConfig()
    """Which judges are asked, as in a run's recipe. They are never mixed here, so the numbers in weights do not matter."""
    judges: JudgesConfig = JudgesConfig()
    """Where the judges are. The filter is not asked."""
    samplers: SamplersConfig = SamplersConfig()
    """They are gone before the judges come, so both may use the same GPU."""
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        no_filter = self.judges.filter.model_copy(update={"enabled": False})
        problems = self.judges.model_copy(update={"filter": no_filter}).problems(self.reward)
        needing = [n for n in self.reward.names if n in self.judges.rewards and self.judges[n].item_columns]
        if needing and self.data.item_metadata is None:
            problems.append(f"the judge {needing[0]!r} needs data.item_metadata: it reads the item of a picture")
        if problems:
            raise ValueError("; ".join(problems))
        return self
