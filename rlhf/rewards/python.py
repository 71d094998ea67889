"""Your own reward: a Python function `(images, prompts, sources, items) -> scores`, named in the recipe by its import path.

    [judges.python.sharpness]
    function = "my_rewards.sharpness:score"

It gets whole batches as lists: pictures (uint8 (H, W, 3) arrays that may be read-only), texts, for each picture a tuple of
what it was made from (pictures of the same kind, as the model saw them), and for each the item's columns as a dict, which
is empty where nothing is known. A function of three arguments, `(images, prompts, items)`, is not sent sources. It
returns one number per picture, higher is better: a list, a tuple, a NumPy array or a tensor of them. At the start and
when idle it is also asked about small grey pictures with a grey source, the text "probe", and "probe" in the CTR model's
columns.

Left out: configuration (a function reads its own), a device (it places its own model and states what it needs in
`num_gpus`), and async functions, which a batch at a time gains nothing from.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import Refused
from rlhf.rewards.config import PythonJudgeConfig
from rlhf.rewards.protocols import Items, JudgeError, Media, Reward, Sources, picture_of, quick_fingerprint

ARGUMENTS = "(images, prompts, sources, items)"


class PythonReward(Reward):
    """The `Reward` of [judges.python.NAME]: whatever the function returns."""

    def __init__(self, name: str, judge: PythonJudgeConfig, device: str) -> None:
        """device: where its replica's card is, reported and not passed on. Raises: Refused, naming the key."""
        if judge.function is None:
            raise Refused(f'judges.python.{name}.function is not set; give "package.module:function"')
        self.name, self.device = name, device
        self.key = f"judges.python.{name}.function = {judge.function!r}"
        self._function = resolve(self.key, judge.function)
        self.reads_sources = takes_sources(self._function)
        self.version = version(self._function, judge.function)

    @classmethod
    def check(cls, key: str, judge: PythonJudgeConfig) -> None:
        resolve(f"{key}.function = {judge.function!r}", str(judge.function))

    def _scores(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """The function's scores. Raises: JudgeError with what it raised, or with what is wrong with its answer."""
        images = [picture_of(medium) for medium in media]
        befores = [[tuple(picture_of(source) for source in some) for some in sources]] if self.reads_sources else []
        try:
            answer = self._function(images, list(prompts), *befores, list(items))
        except (Exception, SystemExit) as error:  # it is not our code: it may raise anything
            raise JudgeError(f"{self.key} raised {type(error).__name__}: {error}") from error
        values = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(values, list | tuple):
            raise JudgeError(f"{self.key} gave {type(answer).__name__}, not one number for each picture")
        numbers = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
        for index, number in enumerate(numbers):
            if not isinstance(number, int | float):
                raise JudgeError(f"{self.key} gave {type(number).__name__} for picture {index}, not a number")
        return numbers


def resolve(key: str, function: str) -> Callable[..., Any]:
    """The function at the import path. Raises: Refused that starts with `key` and says why it cannot be had."""
    try:
        found = pkgutil.resolve_name(function)
    except (Exception, SystemExit) as error:  # importing runs the module, which may raise anything
        raise Refused(
            f"{key}: {type(error).__name__}: {error}; it must be importable on every node: install its package there, "
            "or keep its module in the job's working directory"
        ) from error
    if not callable(found):
        raise Refused(f"{key} is {type(found).__name__}, not a function {ARGUMENTS} -> scores")
    if any(inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part) for part in (found, found.__call__)):
        raise Refused(f"{key} is async; write a plain function, which gets a whole batch at a time")
    if not (_fits(found, 3) or _fits(found, 4)):
        raise Refused(f"{key} cannot be called with {ARGUMENTS}: it is {inspect.signature(found)}")
    return found


def takes_sources(found: Callable[..., Any]) -> bool:
    """Whether a function is of four arguments, (images, prompts, sources, items), and not of three, by its signature.

    One that can be called with either is of four if it takes any number, or names an argument `sources`.
    """
    if not _fits(found, 4):
        return False
    parameters = inspect.signature(found).parameters
    any_number = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    return not _fits(found, 3) or any_number or "sources" in parameters


def _fits(found: Callable[..., Any], count: int) -> bool:
    """Whether `count` arguments by position are what it takes; one written in C that has no signature takes three."""
    try:
        inspect.signature(found).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return count == 3
    return True


def version(found: Callable[..., Any], function: str) -> str:
    """The import path and a quick fingerprint of the function's source file; of a callable object, its module's file."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(found))
    except TypeError:
        file = getattr(sys.modules[function.partition(":")[0]], "__file__", None)
    return f"{function}@{quick_fingerprint(Path(file)) if file else 'built-in'}"
