"""Runs that never trained are removed on request, and nothing else."""

import sys

import pytest

from jobs import prune
from rlhf.errors import Refused
from rlhf.runs.folder import RunFolder
from rlhf.runs.tracking import FileTracker


@pytest.fixture
def runs(tmp_path):
    """v0 trained a step; v1 only measured the base; v2 failed at once; v3 committed nothing but is in use."""
    folders = []
    for index in range(4):
        folder = RunFolder.claim(tmp_path, "edits", "[run]\n", resume="never")
        if index < 2:
            tracker = FileTracker(folder.path)
            tracker.log(0, {"eval/loss": 1.0})
            if index == 0:
                tracker.log(1, {"train/loss": 1.0})
            tracker.close()
        if index < 3:
            folder.release()
        folders.append(folder)
    yield tmp_path / "edits"
    folders[-1].release()


def said(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["prune", *map(str, arguments)])
    prune.main()
    return capsys.readouterr().out


def test_runs_without_an_update_go_and_one_in_use_stays(runs, monkeypatch, capsys):
    told = said(monkeypatch, capsys, runs, "--dry-run")
    assert (
        f"would remove {runs / 'v1'}\nwould remove {runs / 'v2'}\n" in told and "v3 is in use by a live driver" in told
    )
    assert sorted(path.name for path in runs.glob("v*")) == ["v0", "v1", "v2", "v3"]
    assert f"removing {runs / 'v2'}" in said(monkeypatch, capsys, runs)
    assert sorted(path.name for path in runs.glob("v*")) == ["v0", "v3"] and (runs / "v0/metrics.jsonl").is_file()
    assert "every run has trained, or is in use" in said(monkeypatch, capsys, runs)
    assert RunFolder.foreseen(runs.parent, "edits", "[run]\n").startswith(f"would begin in {runs / 'v3'}")


def test_what_is_no_run_s_folder_stays(runs, monkeypatch, capsys):
    (runs / "v7").mkdir()
    (runs / "v7/thesis.txt").write_text("precious")
    (runs / "v8").write_text("")
    told = said(monkeypatch, capsys, runs)
    assert f"{runs / 'v7'} is no run's folder, and stays" in told and "v8 is no run's folder" in told
    assert (runs / "v7/thesis.txt").is_file() and not (runs / "v1").exists()


def test_a_folder_without_runs_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "v1").mkdir()
    with pytest.raises(Refused, match="holds no run v0, v1, …: give runs/NAME"):
        said(monkeypatch, capsys, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]
