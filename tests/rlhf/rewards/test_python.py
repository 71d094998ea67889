"""A reward that is your own function: what is refused at load, what becomes of its answers and its errors."""

import sys

import numpy as np
import pytest

from rlhf.errors import Refused
from rlhf.rewards import load_reward
from rlhf.rewards.config import PythonJudgeConfig
from rlhf.rewards.protocols import JudgeError
from rlhf.types import Item

ITEM = Item(food_name="a", food_type="b", city_name="c", shop_name="d")
PICTURES = [np.full((4, 5, 3), value, np.uint8) for value in (0, 255)]
PROMPTS, ITEMS = ("x", "yy"), (ITEM, None)
SOURCE = """
import math
import numpy as np
import torch

calls = []
not_a_function = 3

def remember(images, prompts, items):
    calls.append((images, prompts, items))
    return [image.mean() for image in images]

class Judge:
    def __call__(self, images, prompts, items):
        return [0.5] * len(images)

    async def later(self, images, prompts, items):
        return [0.5] * len(images)

judge = Judge()

async def later(images, prompts, items):
    return [0.5] * len(images)

async def stream(images, prompts, items):
    yield 0.5

def fails(images, prompts, items):
    raise KeyError("no such city")

answers = {
    "list": [1, 2.5],
    "tuple": (1.0, 2.5),
    "numpy": np.array([1, 2.5], np.float32),
    "integers": np.array([1, 2]),
    "scalars": [np.float32(1.0), torch.tensor(2.5)],
    "tensor": torch.tensor([1.0, 2.5], dtype=torch.bfloat16, requires_grad=True),
    "short": [1.0],
    "nan": [1.0, math.nan],
    "none": None,
    "one": 0.5,
    "texts": ["1", "2"],
    "column": np.array([[1.0], [2.5]]),
    "dict": {0: 1.0, 1: 2.5},
}

def answer(images, prompts, items):
    return answers[prompts[0]]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package my_rewards, importable while the test runs."""
    folder = tmp_path / "my_rewards"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "look.py").write_text(SOURCE)
    (folder / "broken.py").write_text("import a_library_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "my_rewards"]:
        del sys.modules[name]


def load(function):
    return load_reward("mine", PythonJudgeConfig(function=function), "cuda")


def test_the_function_gets_whole_batches_as_lists(package):
    reward = load("my_rewards.look:remember")
    assert reward.score(PICTURES, PROMPTS, ITEMS) == [0.0, 255.0]
    ((images, prompts, items),) = sys.modules["my_rewards.look"].calls
    assert [type(values) for values in (images, prompts, items)] == [list] * 3
    assert images[1] is PICTURES[1] and prompts == ["x", "yy"] and items == [ITEM, None]
    assert reward.name == "mine" and reward.device == "cuda"


def test_no_pictures_are_no_call(package):
    assert load("my_rewards.look:remember").score([], [], []) == []
    assert sys.modules["my_rewards.look"].calls == []


def test_the_version_follows_the_source_file(package):
    first = load("my_rewards.look:remember").version
    assert first.startswith("my_rewards.look:remember@")
    assert load("my_rewards.look:judge").version.partition("@")[2] == first.partition("@")[2]
    (package / "look.py").write_text(SOURCE + "\n# another\n")
    assert load("my_rewards.look:remember").version != first
    (package / "alias.py").write_text("from my_rewards.look import remember")
    (package / "look.py").write_text(SOURCE)
    assert load("my_rewards.alias:remember").version == first.replace("look:", "alias:")


def test_a_callable_object_and_a_method_are_functions_too(package):
    assert load("my_rewards.look:judge").score(PICTURES, PROMPTS, ITEMS) == [0.5, 0.5]
    assert load("my_rewards.look:judge.__call__").score(PICTURES, PROMPTS, ITEMS) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no.such:thing", "ModuleNotFoundError: No module named 'no'; it must be importable on every node"),
        ("my_rewards.look:gone", "AttributeError: .*has no attribute 'gone'; it must be importable"),
        ("my_rewards.broken:score", "ModuleNotFoundError: No module named 'a_library_not_installed'"),
        ("my_rewards.look:not_a_function", "is int, not a function"),
        ("my_rewards.look:later", "is async; write a plain function"),
        ("my_rewards.look:judge.later", "is async"),
        ("my_rewards.look:stream", "is async"),
    ],
)
def test_what_cannot_be_called_is_refused_at_load(package, function, message):
    with pytest.raises(Refused, match=rf"judges\.python\.mine\.function = '{function}'.*{message}"):
        load(function)


@pytest.mark.parametrize("kind", ["list", "tuple", "numpy", "integers", "scalars", "tensor"])
def test_numbers_of_every_kind_are_taken(package, kind):
    scores = load("my_rewards.look:answer").score(PICTURES, (kind, ""), ITEMS)
    assert scores == [1.0, 2.0 if kind == "integers" else 2.5] and all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "gave 1 scores for 2 images"),
        ("nan", "gave nan for image 1"),
        ("none", "gave NoneType, not one number for each picture"),
        ("one", "gave float, not one number"),
        ("dict", "gave dict, not one number"),
        ("texts", "gave str for picture 0, not a number"),
        ("column", "gave list for picture 0, not a number"),
    ],
)
def test_other_answers_are_judge_errors(package, kind, message):
    with pytest.raises(JudgeError, match=message):
        load("my_rewards.look:answer").score(PICTURES, (kind, ""), ITEMS)


def test_what_the_function_raises_is_a_judge_error(package):
    with pytest.raises(
        JudgeError, match=r"mine\.function = 'my_rewards\.look:fails' raised KeyError: 'no such"
    ) as caught:
        load("my_rewards.look:fails").score(PICTURES, PROMPTS, ITEMS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_without_a_source_file_has_a_version(package):
    assert load("builtins:len").version == "builtins:len@built-in"
