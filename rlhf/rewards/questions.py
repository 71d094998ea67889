"""What judges are asked of a prompt: the text that rewards read, the item's columns, and the sources as the model saw them.

Left out: asking (`actors.judges`) and the pictures that are judged.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from rlhf.data.checks import check_file
from rlhf.data.records import BadInput, Field, whole
from rlhf.data.sources import seen_source
from rlhf.errors import Refused
from rlhf.rewards.config import JudgesConfig, RewardConfig, is_blank, template_parts
from rlhf.rewards.protocols import Sources, check_columns
from rlhf.tables import DataConfig, PromptDataTable
from rlhf.types import Geometry, Prompt, Source


def reward_text(prompt: Prompt, template: str | None) -> str:
    """What rewards read: the instruction or, where it is empty, `template` (reward.empty_prompt) filled from the item.

    template None: always the instruction. Raises: Refused where the item lacks a column that the template names, and where
    what comes out is blank.
    """
    if template is None or not is_blank(prompt.instruction):
        return prompt.instruction
    item, parts = prompt.item, template_parts(template)
    if missing := [column for _, column in parts if column is not None and column not in item]:
        there = f"its item has {', '.join(item)}" if item else "it has no item metadata"
        raise Refused(
            f"prompt {prompt.key!r} has an empty instruction, and reward.empty_prompt = {template!r} names "
            f"{', '.join(missing)}, but {there}; give such columns in data.item_metadata, or a fixed text"
        )
    filled = "".join(text + ("" if column is None else item[column]) for text, column in parts)
    if is_blank(filled):
        blank = ", ".join(column for _, column in parts if column is not None)
        raise Refused(
            f"prompt {prompt.key!r} has an empty instruction, and reward.empty_prompt = {template!r} gives no text for it: "
            f"{blank} of its item is blank; fill it in, write an instruction, or name another column"
        )
    return filled


def check_prompts(
    judges: JudgesConfig, reward: RewardConfig, data: DataConfig | PromptDataTable, prompts: Sequence[Prompt]
) -> None:
    """Raise BadInput, a line per prompt, where a reward judge would find no text, or not the columns that it needs."""
    file = data.item_metadata or data.path
    columns = [column for _, column in template_parts(reward.empty_prompt) if column is not None]
    there = dict.fromkeys(name for prompt in prompts for name in prompt.item)
    if there and (unknown := [column for column in columns if column not in there]):
        what = f"has no column {', '.join(unknown)}, which reward.empty_prompt = {reward.empty_prompt!r} names"
        raise BadInput([whole(file, what, f"name others: there are {', '.join(there)}")])
    faults: dict[str, Refused] = {}
    for prompt in prompts:
        try:
            check_prompt(judges, reward.names, reward.empty_prompt, prompt)
        except Refused as error:
            faults[prompt.key] = error
    if faults:
        lines = _lines(file, otherwise=".csv" if data.item_metadata else ".jsonl")
        place = {key: f"line {lines[key]}: " if key in lines else "" for key in faults}
        leaves = "leaves the judges nothing to read"
        problems = [whole(file, f"{place[key]}{key!r} {leaves}", str(error)) for key, error in faults.items()]
        raise BadInput(problems)


def _lines(file: str, otherwise: str) -> dict[str, int]:
    """Where the rows of a file stand, by image_id."""
    records, _ = check_file(Path(file), (Field(name="image_id"),), key="", otherwise=otherwise)
    return {record.fields["image_id"]: record.number for record in records}


def check_prompt(judges: JudgesConfig, names: Sequence[str], template: str | None, prompt: Prompt) -> None:
    """Raise Refused where the reward judges of `names` would find no text, or not the columns that they need."""
    if any(judges[name].reads_prompt for name in names):
        reward_text(prompt, template)
    for name in names:
        try:
            check_columns(name, judges[name].item_columns, prompt.item)
        except Refused as error:
            raise Refused(f"prompt {prompt.key!r}: {error}") from error


def sources_of(prompt: Prompt) -> Sources:
    """The prompt's sources as the model saw them. Raises: OSError, Refused where one has changed."""
    return tuple(_open(source, prompt.geometry) for source in prompt.sources)


@lru_cache(64)  # about 3 MB each at 1312×784; the candidates of a prompt are judged within a short time of each other
def _open(source: Source, geometry: Geometry) -> np.ndarray:
    medium = seen_source(source, geometry)
    medium.flags.writeable = False
    return medium
