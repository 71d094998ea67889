"""Files that are there whole or not at all."""

import os

import pytest

from rlhf.runs.durable import durable


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with durable(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old" and partial.parent == tmp_path
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o644
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path, old):
    file = tmp_path / "file"
    if old:
        file.write_text(old)
    with pytest.raises(RuntimeError), durable(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [found.read_text() for found in tmp_path.iterdir()] == ([old] if old else [])


def test_the_file_and_then_its_folder_reach_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    with durable(tmp_path / "file") as partial:
        partial.write_text("x")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
