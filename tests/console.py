"""What a job prints: on a sound run there is no line of a third party that a newcomer must wonder about."""

import re

LEVELS = r"\b(WARNING|ERROR|CRITICAL|FATAL)\b"
FOREIGN = re.compile(
    rf"{LEVELS}|^\[\d{{4}}-[^\]]* [WEF] |Warning:|Traceback|will not be applied|worker processes have been started",
    re.M,
)
OURS = ("WARNING: the text encoder",)


def foreign_lines(output: str) -> list[str]:
    """Lines at WARNING, ERROR or above that are not our own words."""
    return [line for line in output.splitlines() if FOREIGN.search(line) and not line.startswith(OURS)]
