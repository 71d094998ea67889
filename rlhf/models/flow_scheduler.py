"""diffusers' `FlowMatchEulerDiscreteScheduler` of a folder, as FLUX and Qwen-Image have it: what it must say, and its process."""

from pathlib import Path

from rlhf.diffusion.process import RectifiedFlow
from rlhf.models.family import NUMBER, Need
from rlhf.shards.files import read_json

SCHEDULER = Need(
    file="scheduler_config.json",
    values={
        "_class_name": ("FlowMatchEulerDiscreteScheduler",),
        "use_dynamic_shifting": (True,),
        "num_train_timesteps": (None, 1000),
        "time_shift_type": (None, "exponential"),
        "shift_terminal": (None, NUMBER),
        **dict.fromkeys(("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"), (NUMBER,)),
        **dict.fromkeys(("invert_sigmas", "stochastic_sampling"), (None, False)),
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (None, False)),
    },
)
"""What `RectifiedFlow` computes."""


def flow_of(folder: Path) -> RectifiedFlow:
    """The process of a model's folder."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return RectifiedFlow(
        base_shift=config["base_shift"],
        max_shift=config["max_shift"],
        base_tokens=config["base_image_seq_len"],
        max_tokens=config["max_image_seq_len"],
        last=config.get("shift_terminal"),
    )
