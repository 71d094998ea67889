"""FireRed's rows become data sets by kind of text, which jobs.train mixes; what is wrong is told with file and line."""

import json
import sys
import tomllib
from functools import partial

import pytest

from actors import checks
from jobs import tasks
from jobs.example_sets import read_example_sets, tasks_of
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from tests.jobs.test_mixture import recipe
from tests.rlhf.data.pair_tables import png

ROWS = (
    {
        "source_image": "001.png",
        "target_image": "001_edit.png",
        "instruction": "Change the sky to sunset.",
        "instruction_cn": "把天空改成日落。",
        "inverse_instruction": "A photo of a landscape with a blue sky.",
        "inverse_instruction_cn": "一张蓝天下的风景照。",
    },
    {
        "source_image": ["ref1.png", "ref2.png"],
        "target_image": "out.png",
        "instruction": "Merge the two characters into one scene.",
        "instruction_cn": "把两个角色合成到一个场景里。",
    },
    {"source_image": None, "edit_image": "generated.png", "instruction": "A cat sitting on a windowsill."},
)
"""The three of its documentation, of which the last has one text here."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for number, name in enumerate(("001", "001_edit", "ref1", "ref2", "out", "generated")):
        (tmp_path / "img" / f"{name}.png").write_bytes(png(number, 48, 32))
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`run(rows, *arguments)`: what is said."""

    def start(rows, *arguments):
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        given = [folder / "rows.jsonl", "--name", "a", "--out", folder / "root", "--root", folder / "img", *arguments]
        monkeypatch.setattr(sys, "argv", ["tasks", *map(str, given)])
        tasks.main()
        return capsys.readouterr().out

    return start


def lines(folder, name):
    return [json.loads(line) for line in (folder / "root" / name / "rows.jsonl").read_text().splitlines()]


def test_the_rows_of_firereds_documentation_become_four_data_sets(folder, run):
    said = run(ROWS)
    assert lines(folder, "a_en") == [
        {"image_id": "1", "prompt": ROWS[0]["instruction"], "target": "001_edit.png", "source": ["001.png"]},
        {"image_id": "2", "prompt": ROWS[1]["instruction"], "target": "out.png", "source": ["ref1.png", "ref2.png"]},
        {"image_id": "3", "prompt": ROWS[2]["instruction"], "target": "generated.png"},
    ]
    assert [line["prompt"] for line in lines(folder, "a_cn")] == [row["instruction_cn"] for row in ROWS[:2]]
    way_back = {"target": "001.png", "source": ["001_edit.png"]}
    for kind, column in (("en", "inverse_instruction"), ("cn", "inverse_instruction_cn")):
        expected = {"image_id": "1", "prompt": ROWS[0][column], **way_back}
        assert lines(folder, f"a_inverse_{kind}") == [expected]
    data = tomllib.loads(said[said.index("[data]") :])["data"]
    assert data["task_weights"] == {"a_en": 1, "a_cn": 1, "a_inverse_en": 1, "a_inverse_cn": 1}
    assert data["root"] == str(folder / "img")


def test_what_is_written_is_what_jobs_train_mixes(folder, run, tmp_path_factory):
    run(ROWS)
    before = {path: path.read_bytes() for path in (folder / "root").rglob("*.jsonl")}
    run(ROWS)  # the same again: nothing is appended
    assert {path: path.read_bytes() for path in (folder / "root").rglob("*.jsonl")} == before
    model = write_qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen")
    config = recipe(folder, model, root=str(folder / "img"), task_weights={"a_en": 1.0, "a_inverse_cn": 2.0})
    found = read_example_sets(config, ("target",), partial(checks.in_threads, str)).training
    assert tasks_of(found, folder / "root") == ["a_en"] * 3 + ["a_inverse_cn"]
    prompts = list(found.prompts())
    assert [len(prompt.sources) for prompt in prompts] == [1, 2, 0, 1]
    assert prompts[3].instruction == ROWS[0]["inverse_instruction_cn"]


def test_inverse_texts_may_be_left_out(folder, run):
    run(ROWS, "--no-inverse")
    assert sorted(path.name for path in (folder / "root").iterdir()) == ["a_cn", "a_en"]


WRONG = {
    "no target": ({"source_image": "001.png", "instruction": "x"}, "target_image: is missing; give the path"),
    "two targets": (
        {"target_image": "out.png", "edit_image": "out.png", "instruction": "x"},
        "target_image: says the same as edit_image",
    ),
    "no text": ({"target_image": "out.png"}, "instruction: is missing, and so is every other text; write"),
    "a way back to two": (
        ROWS[1] | {"inverse_instruction": "x"},
        "inverse_instruction: is of the way back to the source, but the row has 2; leave it out, or give --no-inverse",
    ),
    "a way back to none": (
        {"target_image": "out.png", "inverse_instruction": "x"},
        "inverse_instruction: is of the way back to the source, but the row has 0",
    ),
    "a URL": (
        {"target_image": "https://host/1.png", "instruction": "x"},
        "'https://host/1.png' is a URL; pictures are",
    ),
    "a picture that is not there": ({"target_image": "none.png", "instruction": "x"}, "'none.png' does not exist"),
    "one outside the root": ({"target_image": "../rows.jsonl", "instruction": "x"}, "lies outside the data root"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_row_is_told_and_nothing_is_written(folder, run, fault):
    row, says = WRONG[fault]
    with pytest.raises(BadInput) as refused:
        run((*ROWS, row))
    assert f"{folder / 'rows.jsonl'}:4: " in str(refused.value) and says in str(refused.value)
    assert not (folder / "root").exists()


def test_a_name_that_is_none_and_a_root_that_is_none_are_refused(run, tmp_path):
    with pytest.raises(Refused, match=r"--name 'a/b' "):
        run(ROWS, "--name", "a/b")
    with pytest.raises(Refused, match=r"--root .*none is no folder: give the one that the paths start from"):
        run(ROWS, "--root", str(tmp_path / "none"))
