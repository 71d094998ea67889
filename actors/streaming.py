"""Ray Data with a deadline, without its progress bars, and with a stop that ends what it started.

Ray Data waits without a limit, and has no call to end an execution: a consumer that goes away leaves its operators at work. Its
execution loop does call back at every step, also while tasks hang, and an exception there ends it in order. Left out: two
executions at once in one driver; the request is one flag for the process.
"""

import logging
import queue
import threading
import warnings
from collections.abc import Iterator
from time import monotonic
from typing import Any

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from rlhf.errors import Refused

STOP_TIMEOUT_S = 30.0
requested = threading.Event()


class PreprocessFailed(Refused):
    """Checking or encoding stopped over an input or a limit; what was encoded before is kept."""


class StreamBroken(RuntimeError):
    """Ray Data failed: a worker died, or code of ours raised. What was encoded before is kept."""


class Stopped(RuntimeError):
    """Raised inside the execution that was asked to stop."""


class StopOnRequest(ExecutionCallback):
    """Workers unpickle it by name."""

    def on_execution_step(self, executor: Any) -> None:
        if requested.is_set():
            raise Stopped


def stream(dataset: ray.data.Dataset, what: str, timeout_s: float) -> Iterator[dict[str, Any]]:
    """The dataset's rows as they come; `what`: what is done, for messages. Ray Data runs in a thread and the deadline is here.

    Raises: PreprocessFailed for a row with an `error` and at the deadline; StreamBroken.
    """
    results: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def consume() -> None:
        try:
            for row in dataset.iter_rows():
                results.put(row)
            results.put(None)
        except BaseException as error:
            results.put(error)

    requested.clear()
    thread = threading.Thread(target=consume, name="preprocess", daemon=True)
    thread.start()
    deadline = monotonic() + timeout_s
    try:
        while (result := results.get(timeout=max(0.0, deadline - monotonic()))) is not None:
            if isinstance(result, BaseException):
                raise StreamBroken(f"{what} failed: {result}") from result
            if result["error"]:
                raise PreprocessFailed(f"{what} failed: {result['error']}")
            yield result
    except queue.Empty:
        raise PreprocessFailed(
            f"{what} is not finished after preprocess.timeout_s = {timeout_s:g} s. The cluster has "
            f"{ray.available_resources().get('CPU', 0):g} CPUs free; raise the limit, or start again: what is encoded is kept"
        ) from None
    finally:
        requested.set()
        thread.join(timeout=STOP_TIMEOUT_S)


def _of_a_fault(record: logging.LogRecord) -> bool:
    """Ray Data takes the stop for a fault of its own, and tells its traceback."""
    return not requested.is_set()


def prepare() -> None:
    """One progress line of ours in place of Ray Data's bars and execution plans; and it stops when asked to."""
    context = ray.data.DataContext.get_current()
    if StopOnRequest not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(StopOnRequest)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # advises memory reservations for loaders that live for seconds
    # `max_restarts` of a stage's actors has no other place than these arguments in Ray 2.60.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data.exceptions").addFilter(_of_a_fault)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off
