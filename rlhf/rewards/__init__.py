"""The rewards. A new one is a file with a `Reward` class, an entry here, and a table in `JudgesConfig`."""

import pkgutil
from typing import Any

from rlhf.rewards.config import FilterJudgeConfig, HTTPJudgeConfig, JudgeConfig, PythonJudgeConfig
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
CHECK_FILTER = "rlhf.rewards.filters:check_filter"
_NAMED_BY_USERS: dict[type[JudgeConfig], str] = {PythonJudgeConfig: "python", HTTPJudgeConfig: "http"}


def load_reward(name: str, judge: JudgeConfig, device: str) -> Reward:
    """The loaded model of the judge `name`. Raises: what its class does, Refused mostly."""
    return _class(name, judge)(name, judge, device)


def check_judge(key: str, name: str, judge: JudgeConfig) -> None:
    """Raise Refused where the table at `key` of the judge `name` names what is not what it should be. Reads no weights."""
    check = pkgutil.resolve_name(CHECK_FILTER) if isinstance(judge, FilterJudgeConfig) else _class(name, judge).check
    check(key, judge)


def _class(name: str, judge: JudgeConfig) -> Any:
    return pkgutil.resolve_name(REWARDS[_NAMED_BY_USERS.get(type(judge), name)])
