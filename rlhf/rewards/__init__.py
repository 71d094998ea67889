"""The rewards. A new one is a file with a `Reward` class, an entry here, and a table in `JudgesConfig`."""

import pkgutil

from rlhf.rewards.config import HTTPJudgeConfig, JudgeConfig, PythonJudgeConfig
from rlhf.rewards.protocols import Reward

REWARDS = {
    "hps": "rlhf.rewards.hpsv2:HPSv2Reward",
    "ctr": "rlhf.rewards.ctr.model:CTRReward",
    "pickscore": "rlhf.rewards.clip:CLIPReward",
    "clip": "rlhf.rewards.clip:CLIPReward",
    "aesthetic": "rlhf.rewards.clip:AestheticReward",
    "python": "rlhf.rewards.python:PythonReward",
    "http": "rlhf.rewards.remote:HTTPReward",
}
"""Key in [judges] → its class, imported where it runs: their libraries take seconds to load."""
_NAMED_BY_USERS: dict[type[JudgeConfig], str] = {PythonJudgeConfig: "python", HTTPJudgeConfig: "http"}


def load_reward(name: str, judge: JudgeConfig, device: str) -> Reward:
    """The loaded model of the judge `name`. Raises: what its class does, Refused mostly."""
    return pkgutil.resolve_name(REWARDS[_NAMED_BY_USERS.get(type(judge), name)])(name, judge, device)
