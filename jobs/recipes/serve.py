"""The recipe of `jobs.serve`."""

from typing import Self

from pydantic import model_validator

from rlhf.rewards.config import JudgesConfig, ServeConfig
from rlhf.section import ClusterConfig, Section


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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.judge_names:
            raise ValueError("nothing to serve: give a judge its source, e.g. judges.hps.path or judges.filter.path")
        return self
