"""The recipe of `jobs.edit`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.section import LocalPath, Section
from rlhf.tables import EditModelTable, SolverTable, WeightsTable
from rlhf.types import Fit


class EditRequestConfig(Section):
    """What is edited, and where the PNGs go."""

    image: LocalPath | None = None
    prompt: str = ""
    data: LocalPath | None = None
    """A JSONL like data.path, instead of one image."""
    out: LocalPath = "edits"
    seed: int = 0
    variants: int = Field(1, ge=1)
    """Edits per prompt, each from noise of its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fit: Fit = "crop"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.image is None) == (self.data is None):
            raise ValueError(f"give either image or data: image = {self.image!r}, data = {self.data!r}")
        return self


class EditRecipe(Section):
    model: EditModelTable
    edit: EditRequestConfig
    tuned: WeightsTable = WeightsTable()
    """Unset: the base model's weights."""
    sampling: SolverTable = SolverTable()
