"""What judges are asked of a prompt: the text that rewards read, the item's columns, and the sources as the model saw them.

Left out: asking (`actors.judges`) and the pictures that are judged.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rlhf.data.sources import seen_source
from rlhf.errors import Refused
from rlhf.rewards.config import JudgesConfig, template_parts
from rlhf.rewards.protocols import Sources, check_columns
from rlhf.types import Geometry, Prompt, Source


def reward_text(prompt: Prompt, template: str | None) -> str:
    """What rewards read: the instruction or, where it is empty, `template` (reward.empty_prompt) filled from the item.

    template None: always the instruction. Raises: Refused where the item lacks a column that the template names.
    """
    if template is None or prompt.instruction.strip():
        return prompt.instruction
    item, parts = prompt.item, template_parts(template)
    if missing := [column for _, column in parts if column is not None and column not in item]:
        there = f"its item has {', '.join(item)}" if item else "it has no item metadata"
        raise Refused(
            f"prompt {prompt.key!r} has an empty instruction, and reward.empty_prompt = {template!r} names "
            f"{', '.join(missing)}, but {there}; give such columns in data.item_metadata, or a fixed text"
        )
    return "".join(text + ("" if column is None else item[column]) for text, column in parts)


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
