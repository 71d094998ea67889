"""The one distinction between errors: what a person can mend from the message alone, and everything else.

Jobs end with status 2 and the message for a `Refused`, with 1 and a traceback for any other: a defect, or the machine's fault.
"""


class Refused(Exception):
    """Wrong input, a wrong recipe, a folder that is in use, too few resources: the message says what and how to mend it."""


def last_line(error: BaseException) -> str:
    """The type and the last line of what went wrong: messages from other processes hold whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip() or repr(cause)).splitlines()[-1]}"
