"""When a judge fails too often to go on with: online, in an evaluation, and where it relabels pairs.

Pure. Left out: retries, which come before a call counts as failed (`actors.judges`).
"""

from collections import defaultdict, deque
from collections.abc import Sequence

from rlhf.errors import Refused

MIN_CALLS = 10
"""Calls of a judge before its failure rate is believed."""
WINDOW = 50
"""Calls of a judge that `judges.max_failure_rate` looks back on."""


class JudgeUnreliable(Refused):
    """One judge fails too often for its scores to be trusted."""


def check_rate(judge: str, calls: Sequence[bool], limit: float, reason: str) -> None:
    """`calls`: of the judge's last calls, whether each failed; `reason`: why the last one did.

    Raises JudgeUnreliable where the share of failures is above `limit` (`judges.max_failure_rate`).
    """
    rate = sum(calls) / len(calls)
    if rate > limit:
        raise JudgeUnreliable(
            f"judge {judge!r} failed {sum(calls)} of its last {len(calls)} calls ({rate:.0%}, "
            f"judges.max_failure_rate = {limit:.0%}); the last reason: {reason}"
        )


class FailureRates:
    """Of each judge's last calls, for callers that keep no state of their own."""

    def __init__(self, limit: float):
        """`limit`: `judges.max_failure_rate`."""
        self.limit = limit
        self._calls: dict[str, deque[str | None]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def add(self, judge: str, reason: str | None) -> None:
        """One call, and why it failed if it did. Raises JudgeUnreliable, once there are calls enough to believe it."""
        self._calls[judge].append(reason)
        if len(self._calls[judge]) >= MIN_CALLS:
            self.check(judge)

    def check(self, judge: str) -> None:
        """At the end: raise JudgeUnreliable also where the calls were few. A judge that was never asked is fine."""
        calls = self._calls[judge]
        if reasons := [reason for reason in calls if reason is not None]:
            check_rate(judge, [reason is not None for reason in calls], self.limit, reasons[-1])
