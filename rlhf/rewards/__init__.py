"""The rewards. A new one is a file with a `Reward` class and an entry here."""

import pkgutil

from rlhf.rewards.config import JudgeConfig
from rlhf.rewards.reward import Reward

REWARDS = {
    "hps": "rlhf.rewards.hpsv2:HPSv2Reward",
    "ctr": "rlhf.rewards.ctr:CTRReward",
    "pickscore": "rlhf.rewards.clip:PickScoreReward",
    "clip": "rlhf.rewards.clip:CLIPReward",
    "aesthetic": "rlhf.rewards.aesthetic:AestheticReward",
}
"""Judge → its class, imported where it runs: their libraries take seconds to load."""
PYTHON = "rlhf.rewards.python:PythonReward"
"""The class of every judge in [judges.python]."""


def load_reward(name: str, judge: JudgeConfig, device: str) -> Reward:
    """The loaded model of the judge `name`. Raises: what its `from_config` does, FileNotFoundError mostly."""
    return pkgutil.resolve_name(REWARDS.get(name, PYTHON)).from_config(name, judge, device)
