"""What each judge reports to Prometheus, through Ray's own metrics endpoint: latency, batch size, failures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Histogram

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128]


class JudgeMetrics:
    """One replica's figures; Serve adds its own (queue length, requests by route and status) beside them."""

    def __init__(self, judge: str) -> None:
        seconds, waited = "rlhf_judge_latency_seconds", "one request inside the replica, its wait for a batch included"
        self._latency = Histogram(seconds, waited, SECONDS, ("judge",))
        self.rows = Histogram("rlhf_judge_batch_size", "requests in one forward", ROWS, ("judge",))
        self._failures = Counter("rlhf_judge_failures", "requests without a usable answer", ("judge",))
        for metric in (self._latency, self.rows, self._failures):
            metric.set_default_tags({"judge": judge})

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request: its seconds, and whether it failed."""
        started = time.monotonic()
        try:
            yield
        except Exception:
            self._failures.inc()
            raise
        self._latency.observe(time.monotonic() - started)
