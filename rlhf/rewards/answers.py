"""What other services answer, checked before it counts."""

import math
from typing import Any

import httpx

from rlhf.rewards.protocols import JudgeError


def read_json(url: str, response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a 200 answer. Raises: JudgeError for anything else, with the status and what was said."""
    if response.status_code != 200:
        raise JudgeError(f"{url}: status {response.status_code}: {response.text[:200]}")
    try:
        answer = response.json()
    except ValueError as error:
        raise JudgeError(f"{url}: not JSON: {response.text[:200]!r}") from error
    if not isinstance(answer, dict):
        raise JudgeError(f"{url}: not a JSON object: {response.text[:200]!r}")
    return answer


def number(url: str, key: str, value: Any) -> float:
    """`value` as a float. Raises: JudgeError where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise JudgeError(f"{url}: `{key}` is {value!r}, not a finite number")
    return float(value)
