"""`jobs.edit` on rows whose ids could leave the folder, meet in one file, or name none."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from jobs import edit
from rlhf.errors import Refused

IDS = [
    "10001",
    "shop7/10001",
    "shop7_10001",
    "../../outside",
    "/tmp/outside",
    "A",
    "a",
    "红烧肉",
    "x" * 300,
    "..",
    ".x",
]


def run(monkeypatch, kontext, out, *options):
    size = ["--model.path", str(kontext), "--model.height", "48", "--model.width", "32", "--model.dtype", "float32"]
    argv = ["edit", *size, "--sampling.steps", "1", "--edit.device", "cpu", "--edit.out", str(out), *options]
    monkeypatch.setattr(sys, "argv", argv)
    edit.main()


def test_every_id_gets_a_file_of_its_own_inside_the_folder(monkeypatch, kontext, tmp_path):
    Image.fromarray(np.full((48, 32, 3), 90, np.uint8)).save(tmp_path / "1.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"image_id": i, "prompt": "warm", "image": "1.png"}) for i in IDS))
    before = {*tmp_path.rglob("*")}
    out = tmp_path / "编辑 🍎" / "out"
    run(monkeypatch, kontext, out, "--edit.data", str(rows))
    made = {*tmp_path.rglob("*")} - before - {out.parent, out}
    assert {file.parent for file in made} == {out} and len({file.name.casefold() for file in made}) == len(IDS)
    assert {"10001_0.png", "红烧肉_0.png"} <= {file.name for file in made}


def test_a_folder_that_cannot_be_made_is_told_before_the_model_loads(monkeypatch, kontext, tmp_path):
    (tmp_path / "file").write_text("")
    Image.fromarray(np.full((48, 32, 3), 90, np.uint8)).save(tmp_path / "1.png")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(
            Refused, match=r"edit\.out: the folder .* cannot be made: .*/file is a file; choose another"
        ):
            run(monkeypatch, kontext, out, "--edit.image", str(tmp_path / "1.png"))
