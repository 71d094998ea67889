"""Stop a Ray Data execution from outside, at once and with everything it started.

Ray Data has no such call: a consumer that goes away leaves its operators waiting, and a later `ray.shutdown` finds them
still at work. Its execution loop does call back at every step, also while tasks hang, and an exception there ends it in
order. Left out: two executions at once in one driver; the request is one flag for the process.
"""

import threading
from typing import Any

requested = threading.Event()


class Stopped(RuntimeError):
    """Raised inside the execution that was asked to stop."""


class StopOnRequest:
    """A Ray Data execution callback (`DataContext.custom_execution_callback_classes`); workers unpickle it by name."""

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        if requested.is_set():
            raise Stopped

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...
