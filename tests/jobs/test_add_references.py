"""A text-to-video folder gets the layers of references, and nothing that is there is touched."""

import json
import sys

import pytest

from jobs import add_references
from rlhf.errors import Refused
from rlhf.models.checks import check_model
from rlhf.models.tiny import TEXT_TOKENS
from rlhf.models.tiny_wan import write_clip, write_wan
from rlhf.models.wan_network import is_new
from rlhf.shards.files import SafetensorsFolder
from rlhf.tables import ModelTable


@pytest.fixture
def folder(tmp_path):
    write_wan(tmp_path / "base")
    write_clip(tmp_path / "clip")
    return tmp_path


def run(monkeypatch, folder, *more, base="base", clip="clip", out="out"):
    given = [folder / base, "--clip", folder / clip, "--out", folder / out, "--text_len", TEXT_TOKENS, *more]
    monkeypatch.setattr(sys, "argv", ["add_references", *map(str, given)])
    add_references.main()


@pytest.mark.parametrize("more", [(), ("--fused",)])
def test_the_folder_is_whole_and_the_base_is_as_it_was(folder, monkeypatch, capsys, more):
    before = {file: file.read_bytes() for file in (folder / "base").rglob("*") if file.is_file()}
    run(monkeypatch, folder, *more)
    assert 'new parameters; model.family = "wan_subject"' in capsys.readouterr().out
    check_model(ModelTable(family="wan_subject", path=str(folder / "out")))
    assert json.loads((folder / "out/transformer/config.json").read_text())["fused"] == bool(more)
    mine, theirs = (SafetensorsFolder(folder / name / "transformer") for name in ("out", "base"))
    old = [name for name in mine.where if not is_new(name)]
    assert set(old) == set(theirs.where)
    for name in old:
        shape = theirs.where[name].shape
        assert mine.rows(name, 0, shape[0], shape).equal(theirs.rows(name, 0, shape[0], shape))
    assert {file: file.read_bytes() for file in before} == before and len(list(folder.iterdir())) == 3


def test_what_is_no_such_folder_is_refused(folder, monkeypatch):
    run(monkeypatch, folder)
    for given, says in (
        ({}, r"--out .*out is there already"),
        ({"base": "clip", "out": "other"}, r"model_index\.json"),
        ({"clip": "base", "out": "other"}, r"--clip .*base holds no image_encoder/"),
        ({"base": "out", "out": "other"}, r"out/transformer is no text-to-video network"),
    ):
        with pytest.raises(Refused, match=says):
            run(monkeypatch, folder, **given)
    assert not (folder / "other").exists()
