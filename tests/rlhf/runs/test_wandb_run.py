"""What wandb is told, read back from the file that it keeps offline. Nothing is sent."""

import json
import struct
import sys

import psutil
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from rlhf.errors import Refused
from rlhf.runs.wandb_run import WandbRun, check_report_to

ASKED = ("tensorboard", "wandb")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "runs" / "edits" / "v0"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[trainer]\nlearning_rate = 0.001\n")
    yield folder
    wandb.teardown()  # it keeps the settings that it saw first


def records(file):
    """Of a log as LevelDB writes them: after a header of 7 bytes, chunks of (checksum, length, kind) in blocks of 32 KiB."""
    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def rows(file):
    """Step and loss of every row."""
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            yield json.loads(values["step"]), json.loads(values["train/loss"])


def test_a_run_and_its_resume_are_one_with_every_row(offline):
    check_report_to(ASKED)
    for steps in ((1, 2, 3), (3, 4)):  # as a resume does steps over
        run = WandbRun(offline, "shop")
        for step in steps:
            run.log(step, {"train/loss": 1 / step})
        run.close()
    first, second = sorted(offline.glob("wandb/offline-run-*/*.wandb"))
    assert list(rows(first)) == [(1, 1.0), (2, 0.5), (3, 1 / 3)] and list(rows(second)) == [(3, 1 / 3), (4, 0.25)]
    (told,) = (record.run for record in records(first) if record.WhichOneof("record_type") == "run")
    (again,) = (record.run for record in records(second) if record.WhichOneof("record_type") == "run")
    assert (told.project, told.display_name, told.run_group) == ("shop", "edits/v0", "edits")
    assert told.run_id == again.run_id == (offline / "wandb_id").read_text()
    assert json.loads({item.key: item.value_json for item in told.config.update}["trainer"]) == {"learning_rate": 0.001}
    assert not [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]


def test_it_is_refused_before_a_run_where_there_is_no_account(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(Refused, match=r'tracking\.report_to has "wandb": No API key .*Or set WANDB_MODE=offline'):
        check_report_to(ASKED)


def test_a_variable_that_wandb_does_not_take_is_refused(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(Refused, match="whose settings it refuses; see its variables, such as WANDB_MODE: "):
        check_report_to(ASKED)


def test_it_is_refused_before_a_run_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_report_to(("tensorboard",))
    with pytest.raises(Refused, match=r'is not installed .*: pip install "wandb==0\.31\.0"'):
        check_report_to(ASKED)
