"""A reward that is your own function: what is refused at load, what becomes of its answers and its errors."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import jobs
from rlhf.errors import Refused
from rlhf.rewards import load_reward
from rlhf.rewards.config import PythonJudgeConfig
from rlhf.rewards.protocols import JudgeError
from tests.rlhf.rewards.asking import score

ITEM = {"food_name": "a", "price": "3.5"}
PICTURES = [np.full((4, 5, 3), value, np.uint8) for value in (0, 255)]
PROMPTS, ITEMS = ("x", "yy"), (ITEM, {})
SOURCE = """
import math
import numpy as np
import torch

calls = []
not_a_function = 3

def remember(images, prompts, items):
    calls.append((images, prompts, items))
    return [image.mean() for image in images]

def remember_four(images, prompts, sources, items):
    calls.append((images, prompts, sources, items))
    return [float(len(some)) for some in sources]

def remember_any(*arguments):
    calls.append(arguments)
    return [0.5] * len(arguments[0])

def weighted(images, prompts, items, weight=2.0):
    return [weight] * len(images)

def with_defaults(images, prompts, sources=(), items=()):
    return [float(len(some)) for some in sources]

def of_two(images, prompts):
    return [0.5] * len(images)

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
    (folder / "script.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "my_rewards"]:
        del sys.modules[name]


def load(function):
    return load_reward("mine", PythonJudgeConfig(function=function), "cuda")


def test_the_function_gets_whole_batches_as_lists(package):
    reward = load("my_rewards.look:remember")
    assert score(reward, PICTURES, PROMPTS, ITEMS) == [0.0, 255.0]
    ((images, prompts, items),) = sys.modules["my_rewards.look"].calls
    assert [type(values) for values in (images, prompts, items)] == [list] * 3
    assert images[1].shape == (4, 5, 3) and np.shares_memory(images[1], PICTURES[1])
    assert prompts == ["x", "yy"] and items == [ITEM, {}]
    assert reward.name == "mine" and reward.device == "cuda"


@pytest.mark.parametrize("function", ["remember_four", "remember_any"])
def test_a_function_of_four_arguments_gets_the_sources_as_pictures(package, function):
    reward = load(f"my_rewards.look:{function}")
    assert reward.reads_sources
    media = [picture[None] for picture in PICTURES]
    reward.score(media, PROMPTS, [(media[1], media[0]), ()], ITEMS)
    ((images, prompts, sources, items),) = sys.modules["my_rewards.look"].calls
    assert [type(values) for values in (images, prompts, sources, items)] == [list] * 4
    assert [type(some) for some in sources] == [tuple] * 2 and [len(some) for some in sources] == [2, 0]
    assert np.shares_memory(sources[0][0], PICTURES[1]) and sources[0][0].shape == (4, 5, 3)


def test_the_signature_says_whether_sources_are_read(package):
    answers = {"remember": False, "weighted": False, "judge": False, "remember_four": True, "with_defaults": True}
    assert {name: load(f"my_rewards.look:{name}").reads_sources for name in answers} == answers
    assert score(load("my_rewards.look:weighted"), PICTURES, PROMPTS, ITEMS) == [2.0, 2.0]


def test_no_pictures_are_no_call(package):
    assert load("my_rewards.look:remember").score([], [], [], []) == []
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
    assert score(load("my_rewards.look:judge"), PICTURES, PROMPTS, ITEMS) == [0.5, 0.5]
    assert score(load("my_rewards.look:judge.__call__"), PICTURES, PROMPTS, ITEMS) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no.such:thing", "ModuleNotFoundError: No module named 'no'; it must be importable on every node"),
        ("my_rewards.look:gone", "AttributeError: .*has no attribute 'gone'; it must be importable"),
        ("my_rewards.broken:score", "ModuleNotFoundError: No module named 'a_library_not_installed'"),
        ("my_rewards.script:score", "SystemExit: 0; it must be importable"),
        ("my_rewards.look:not_a_function", "is int, not a function"),
        ("my_rewards.look:later", "is async; write a plain function"),
        ("my_rewards.look:judge.later", "is async"),
        ("my_rewards.look:stream", "is async"),
        (
            "my_rewards.look:of_two",
            r"cannot be called with \(images, prompts, sources, items\): it is \(images, prompts\)",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_at_load(package, function, message):
    with pytest.raises(Refused, match=rf"judges\.python\.mine\.function = '{function}'.*{message}"):
        load(function)


@pytest.mark.parametrize("kind", ["list", "tuple", "numpy", "integers", "scalars", "tensor"])
def test_numbers_of_every_kind_are_taken(package, kind):
    scores = score(load("my_rewards.look:answer"), PICTURES, (kind, ""), ITEMS)
    assert scores == [1.0, 2.0 if kind == "integers" else 2.5] and all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "gave 1 scores for 2 media"),
        ("nan", "gave nan for medium 1"),
        ("none", "gave NoneType, not one number for each picture"),
        ("one", "gave float, not one number"),
        ("dict", "gave dict, not one number"),
        ("texts", "gave str for picture 0, not a number"),
        ("column", "gave list for picture 0, not a number"),
    ],
)
def test_other_answers_are_judge_errors(package, kind, message):
    with pytest.raises(JudgeError, match=message):
        score(load("my_rewards.look:answer"), PICTURES, (kind, ""), ITEMS)


def test_what_the_function_raises_is_a_judge_error(package):
    with pytest.raises(
        JudgeError, match=r"mine\.function = 'my_rewards\.look:fails' raised KeyError: 'no such"
    ) as caught:
        score(load("my_rewards.look:fails"), PICTURES, PROMPTS, ITEMS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_without_a_source_file_has_a_version(package):
    assert load("builtins:max").version == "builtins:max@built-in"


README = Path(jobs.__file__).parents[1] / "README.md"


def test_the_readmes_function_tells_how_much_of_the_subject_was_kept(package):
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "sources" in block
    ]
    (package / "kept.py").write_text(code)
    reward = load("my_rewards.kept:subject_kept")
    assert reward.reads_sources
    random = np.random.default_rng(0)
    source, other = random.integers(0, 200, (2, 48, 32, 3), dtype=np.uint8)
    brighter, half = source + 40, np.concatenate([source[:24], other[24:]])
    media = [picture[None] for picture in (source, brighter, half, other)]
    scores = reward.score(media, [""] * 4, [(source[None],)] * 4, [{}] * 4)
    assert scores[:2] == pytest.approx([1.0, 1.0]) and 0.3 < scores[2] < 0.7 and abs(scores[3]) < 0.1
