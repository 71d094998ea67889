"""The one distinction between errors: what a person can mend from the message alone, and everything else.

Jobs end with status 2 and the message for a `Refused`, with 1 and a traceback for any other: a defect, or the machine's fault.
"""

from collections.abc import Sequence


class Refused(Exception):
    """Wrong input, a wrong recipe, a folder that is in use, too few resources: the message says what and how to mend it."""


class NotFinite(Refused):
    """NaN or infinity where a picture is to come of numbers: a black PNG would look like an answer."""

    def __init__(self, what: str, rows: Sequence[int] = ()):
        """rows: of the batch, those that are to blame."""
        super().__init__(what)
        self.rows = tuple(rows)


def last_line(error: BaseException) -> str:
    """The type and the last line of what went wrong: messages from other processes hold whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip() or repr(cause)).splitlines()[-1]}"
