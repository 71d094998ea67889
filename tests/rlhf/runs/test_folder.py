import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from rlhf.errors import Refused
from rlhf.runs.folder import Fenced, RunFolder, RunInUse

CONFIG = """
[run]
name = "x"
seed = 42
save_every = 10
[dpo]
beta = 5000.0
[cluster]
num_cpus = 2
"""


@pytest.fixture
def claim(tmp_path):
    return lambda config=CONFIG, resume="auto": RunFolder.claim(tmp_path, "demo", config, resume)


def save(folder, step):
    with folder.checkpoint(step) as path:
        (path / "state").mkdir()
        (path / "state" / "shard").write_text(str(step))


def interrupted_save(folder, step):
    with pytest.raises(KeyboardInterrupt), folder.checkpoint(step) as path:
        (path / "torn").write_text("x")
        raise KeyboardInterrupt


def finish(folder):
    with folder.whole("final") as path:
        (path / "model").write_text("w")
    return folder.path / "final"


def test_the_first_claim_takes_v0_and_keeps_the_config(claim, tmp_path):
    folder = claim()
    assert folder.path == tmp_path / "demo" / "v0" and folder.epoch == 1 and not folder.resumed
    assert (folder.path / "config.toml").read_text() == CONFIG
    folder.fence.check()


def trained(folder):
    """The folder of a driver that got as far as a first row, and ended."""
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    folder.release()


def test_a_start_that_did_nothing_takes_another_configuration(claim):
    claim().release()
    mended = CONFIG.replace("beta = 5000.0", "beta = 100.0")
    folder = claim(mended)
    assert folder.path.name == "v0"
    assert (folder.path / "config.toml").read_text() == mended


def test_a_commit_alone_keeps_its_configuration(claim):
    folder = claim()
    save(folder, 1)
    folder.release()
    with pytest.raises(Refused, match="beta"):
        claim(CONFIG.replace("beta = 5000.0", "beta = 100.0"))


def test_an_unfinished_run_is_resumed_under_the_next_epoch(claim):
    trained(claim())
    moved = CONFIG.replace("save_every = 10", "save_every = 5").replace("num_cpus = 2", "num_cpus = 4")
    folder = claim(moved)
    assert folder.path.name == "v0" and folder.epoch == 2 and folder.resumed
    assert (folder.path / "config.toml").read_text() == CONFIG
    assert (folder.path / "config.epoch_2.toml").read_text() == moved


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("beta = 5000.0", "beta = 100.0", r"dpo\.beta: was 5000\.0, now 100\.0"),
        ("[dpo]", "[dpo]\nreference_refresh_every = 5", r"dpo\.reference_refresh_every: was '\(unset\)', now 5"),
        ("seed = 42", "seed = 43", r"run\.seed: was 42, now 43"),
    ],
)
def test_another_configuration_is_refused_with_both_values(claim, old, new, message):
    trained(claim())
    with pytest.raises(Refused, match=message):
        claim(CONFIG.replace(old, new))
    assert claim().epoch == 2  # the refused claim left no lock and took no epoch


def test_what_a_claim_would_do_is_told_and_nothing_is_made(claim, tmp_path):
    def foreseen(config=CONFIG, resume="auto"):
        return RunFolder.foreseen(tmp_path, "demo", config, resume).replace(str(tmp_path), "")

    assert foreseen() == "would begin in /demo/v0" and not any(tmp_path.iterdir())
    folder = claim()
    save(folder, 3)
    trained(folder)
    before = {*tmp_path.rglob("*")}
    assert foreseen() == "would go on in /demo/v0 from step 3" and foreseen(resume="never") == "would begin in /demo/v1"
    with pytest.raises(Refused, match=r"dpo\.beta: was 5000\.0, now 100\.0"):
        foreseen(CONFIG.replace("beta = 5000.0", "beta = 100.0"))
    assert {*tmp_path.rglob("*")} == before
    finish(folder)
    assert foreseen() == "would begin in /demo/v1"
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"run\.dir: the folder .* cannot be made: .*/file is a file"):
        RunFolder.foreseen(tmp_path / "file", "demo", CONFIG)


def test_a_finished_run_leads_to_the_next_version(claim):
    folder = claim()
    assert (finish(folder) / "model").read_text() == "w"
    folder.release()
    again = claim(CONFIG.replace("beta = 5000.0", "beta = 1.0"))
    assert again.path.name == "v1" and not again.resumed
    with pytest.raises(FileExistsError):
        finish(folder)


def test_resume_never_takes_the_next_version(claim):
    first = claim()
    assert claim(resume="never").path.name == "v1"
    first.fence.check()


def test_names_stay_inside_the_root(tmp_path):
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(Refused, match=r"run\.name"):
            RunFolder.claim(tmp_path, name, CONFIG)


def test_a_second_driver_is_refused_at_once(claim):
    folder = claim()
    with pytest.raises(RunInUse, match=f"pid {os.getpid()}"):
        claim()
    folder.release()
    claim()


def test_a_killed_driver_lets_the_next_one_in(claim, tmp_path):
    code = (
        "import sys; from rlhf.runs.folder import RunFolder\n"
        "RunFolder.claim(sys.argv[1], 'demo', '')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with driver:
        assert driver.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=f"pid {driver.pid}"):
            claim("")
        driver.kill()
        driver.wait()
    assert claim("").epoch == 2


def test_a_fenced_driver_writes_nothing(claim):
    old = claim()
    begun = [old.checkpoint(10), old.whole("final"), old.whole("exports/step_000010")]
    for writing in begun:
        (writing.__enter__() / "shard").write_text("old")
    old.release()  # as if it had slept through the loss of its lock
    claim()
    for write in (
        old.fence.check,
        lambda: old.checkpoint(20).__enter__(),
        lambda: old.prune(1),
        lambda: old.move_uncommitted_to_discarded(None),
        lambda: old.whole("exports/step_000020").__enter__(),
        lambda: old.whole("final").__enter__(),
        *(partial(writing.__exit__, None, None, None) for writing in begun),
    ):
        with pytest.raises(Fenced, match="epoch 2, ours 1"):
            write()
    assert old.last_committed() is None
    assert not any((old.path / name).exists() for name in ("final", "exports/step_000010"))


def test_only_committed_checkpoints_count(claim):
    folder = claim()
    assert folder.last_committed() is None
    save(folder, 10)
    interrupted_save(folder, 20)
    assert folder.last_committed() == 10
    with pytest.raises(FileNotFoundError), folder.checkpoint(20):
        pass
    assert folder.last_committed() == 10
    assert json.loads((folder.checkpoint_path(10) / "COMMITTED").read_text()) == {"step": 10, "epoch": 1}


def test_committed_is_written_after_the_rest_is_on_disk(claim, monkeypatch):
    folder, synced = claim(), []
    path = folder.checkpoint_path(10)
    fsync = os.fsync

    def record(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (path / "COMMITTED").exists()))
        fsync(handle)

    with folder.checkpoint(10):
        (path / "shard").write_text("x")
        monkeypatch.setattr(os, "fsync", record)
    assert synced[:2] == [(str(path / "shard"), False), (str(path), False)]
    assert (str(path), True) in synced


def test_an_interrupted_save_starts_over_and_a_committed_one_is_never_overwritten(claim):
    folder = claim()
    interrupted_save(folder, 10)
    save(folder, 10)
    assert not (folder.checkpoint_path(10) / "torn").exists()
    with pytest.raises(FileExistsError):
        save(folder, 10)


def test_prune_keeps_the_newest_committed(claim):
    folder = claim()
    interrupted_save(folder, 5)
    folder.prune(1)
    assert folder.checkpoint_path(5).exists()  # nothing is committed yet
    for step in (10, 20, 30):
        save(folder, step)
    interrupted_save(folder, 40)
    folder.prune(2)
    left = sorted(path.name for path in folder.path.glob("checkpoint_*"))
    assert left == ["checkpoint_000020", "checkpoint_000030", "checkpoint_000040"]
    assert folder.last_committed() == 30
    with pytest.raises(ValueError, match="keep_checkpoints = 0"):
        folder.prune(0)


def written(folder, steps):
    with (folder.path / "metrics.jsonl").open("a") as rows:
        rows.writelines(json.dumps({"step": step, "train/loss": 0.5}) + "\n" for step in steps)
    for kind, ending in (("pairs", "parquet"), ("samples", "png")):
        (folder.path / kind).mkdir(exist_ok=True)
        for step in steps:
            (folder.path / kind / f"step_{step:06d}.{ending}").write_text(f"{kind} {step}")


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("torn", ['{"step": 13, "train/lo', '{"step": 1}'])
def test_what_follows_the_last_commit_is_set_aside(claim, torn):
    folder = claim()
    written(folder, [8, 9, 10, 11, 12])
    save(folder, 10)
    with (folder.path / "metrics.jsonl").open("a") as rows:
        rows.write(torn)  # no end of line: the kill came in between
    folder.release()
    folder = claim()
    assert folder.move_uncommitted_to_discarded(folder.last_committed()) == 3 + 2 + 2
    aside = folder.path / "discarded" / "epoch_2"
    assert steps_of(folder.path / "metrics.jsonl") == [8, 9, 10]
    assert (aside / "metrics.jsonl").read_text().splitlines()[-1] == torn
    assert [path.name for path in sorted((folder.path / "pairs").iterdir())][-1] == "step_000010.parquet"
    assert (aside / "pairs" / "step_000012.parquet").read_text() == "pairs 12"
    assert (aside / "samples" / "step_000011.png").read_text() == "samples 11"
    assert folder.move_uncommitted_to_discarded(10) == 0


def test_without_a_commit_everything_is_set_aside_and_nothing_is_lost(claim):
    folder = claim()
    written(folder, [0, 1])
    assert folder.move_uncommitted_to_discarded(None) == 6
    assert (folder.path / "metrics.jsonl").read_text() == ""
    assert steps_of(folder.path / "discarded" / "epoch_1" / "metrics.jsonl") == [0, 1]


def test_a_crash_while_setting_rows_aside_loses_none(claim, monkeypatch):
    folder = claim()
    written(folder, [1, 2])
    replace_file, calls = os.replace, []

    def crash_on_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", crash_on_second)
    with pytest.raises(KeyboardInterrupt):
        folder.move_uncommitted_to_discarded(1)
    monkeypatch.undo()
    assert steps_of(folder.path / "metrics.jsonl") == [1, 2]
    folder.release()
    folder = claim()
    folder.move_uncommitted_to_discarded(1)
    assert steps_of(folder.path / "metrics.jsonl") == [1]
    assert steps_of(folder.path / "discarded" / "epoch_2" / "metrics.jsonl") == [2]


def export(folder, step, weights):
    with folder.whole(f"exports/step_{step:06d}") as path:
        (path / "weights").write_text(weights)


def test_exports_stay_when_checkpoints_go_and_undone_ones_are_set_aside(claim):
    folder = claim()
    for step in (10, 20, 30):
        export(folder, step, str(step))
        save(folder, step)
        folder.prune(1)
    export(folder, 40, "undone")
    with pytest.raises(KeyboardInterrupt), folder.whole("exports/step_000050"):
        raise KeyboardInterrupt
    assert folder.move_uncommitted_to_discarded(folder.last_committed()) == 2
    assert {path.name for path in (folder.path / "exports").iterdir()} == {f"step_0000{n}" for n in (10, 20, 30)}
    assert (folder.path / "discarded/epoch_1/exports/step_000040/weights").read_text() == "undone"
    with pytest.raises(FileExistsError, match=r"step_000030 exists already"):
        export(folder, 30, "again")
    assert (folder.path / "exports/step_000030/weights").read_text() == "30"


def test_an_updates_pairs_may_be_split_otherwise_but_not_be_more_or_fewer(claim):
    def split(ranks, batch, accumulation):
        values = f"ranks = {ranks}\ntrain_batch_size = {batch}\ngradient_accumulation_steps = {accumulation}\n"
        return f"{CONFIG}[trainer]\n{values}num_gpus = {1 / ranks}\n"

    trained(claim(split(8, 2, 4)))
    claim(split(4, 1, 16)).release()
    with pytest.raises(Refused, match=r"trainer.ranks × .*steps: was 64, now 32\n"):
        claim(split(4, 2, 4))


# --- going on from a checkpoint that is named --------------------------------------------------------------------------


def two_checkpoints(claim):
    """A finished v0 with checkpoints of steps 2 and 4, rows of steps 1 to 4, and the digest of its pairs."""
    folder = claim()
    for step in (1, 2, 3, 4):
        with (folder.path / "metrics.jsonl").open("a") as rows:
            rows.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        if step % 2 == 0:
            save(folder, step)
    (folder.path / "pairs.digest").write_text("abc")
    finish(folder)
    folder.release()
    return folder.path


def test_a_named_checkpoint_begins_the_next_version_and_the_same_command_goes_on_there(claim):
    first = two_checkpoints(claim)
    named = str(first / "checkpoint_000002")
    second = claim(resume=named)
    assert second.path == first.parent / "v1" and second.started and not second.resumed
    assert second.last_committed() == 2 and (second.path / "pairs.digest").read_text() == "abc"
    assert steps_of(second.path / "metrics.jsonl") == [1, 2]
    for file in (first / "checkpoint_000002").rglob("*"):
        copy = second.path / "checkpoint_000002" / file.relative_to(first / "checkpoint_000002")
        assert file.is_dir() or copy.read_bytes() == file.read_bytes()
    save(second, 3)
    second.release()
    again = claim(resume=named)
    assert again.path == second.path and again.resumed and again.last_committed() == 3
    again.prune(1)
    again.release()
    assert (first / "checkpoint_000002" / "COMMITTED").exists(), "the other run keeps what it has"
    third = claim(resume=str(first / "checkpoint_000004"))
    assert third.path == first.parent / "v2" and third.last_committed() == 4
    third.release()


def test_what_is_begun_from_is_foreseen(claim, tmp_path):
    first = two_checkpoints(claim)
    named = str(first / "checkpoint_000002")
    said = RunFolder.foreseen(tmp_path, "demo", CONFIG, named)
    assert said == f"would begin in {first.parent / 'v1'} from {named}" and not (first.parent / "v1").exists()
    claim(resume=named).release()
    assert RunFolder.foreseen(tmp_path, "demo", CONFIG, named) == f"would go on in {first.parent / 'v1'} from step 2"


def test_a_start_that_broke_off_while_it_copied_begins_again(claim, monkeypatch):
    first = two_checkpoints(claim)
    named = str(first / "checkpoint_000002")
    monkeypatch.setattr("rlhf.runs.folder._sync_tree", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        claim(resume=named)
    monkeypatch.undo()
    assert not (first.parent / "v1" / "checkpoint_000002" / "COMMITTED").exists()
    second = claim(resume=named)
    assert second.path == first.parent / "v1" and second.last_committed() == 2
    second.release()


def test_another_configuration_cannot_go_on_from_there(claim, tmp_path):
    first = two_checkpoints(claim)
    there = sorted(first.parent.iterdir())
    with pytest.raises(Refused, match="was started with another configuration"):
        RunFolder.claim(
            tmp_path, "demo", CONFIG + "\n[trainer]\nmax_train_steps = 9\n", str(first / "checkpoint_000002")
        )
    assert sorted(first.parent.iterdir()) == there, "a folder that was made would be resumed by the next plain command"


def test_a_runs_own_folder_is_answered_with_its_checkpoints_and_a_copy_with_what_it_lacks(claim, tmp_path):
    first = two_checkpoints(claim)
    with pytest.raises(
        Refused, match=r"no committed checkpoint; there are .*v0/checkpoint_000002, .*checkpoint_000004"
    ):
        claim(resume=str(first))
    copy = tmp_path / "backup" / "checkpoint_000002"
    shutil.copytree(first / "checkpoint_000002", copy)
    with pytest.raises(Refused, match=r"config\.toml is not beside it; give it where it was written"):
        claim(resume=str(copy))


@pytest.mark.parametrize("where", ["checkpoint_000003", "final", "checkpoint_000002/state", "nothing"])
def test_what_is_no_checkpoint_is_refused_with_those_that_are_there(claim, where):
    first = two_checkpoints(claim)
    with pytest.raises(Refused, match=r"run\.resume = '.*' is no committed checkpoint; ") as told:
        claim(resume=str(first / where))
    assert (f"{first}/checkpoint_000002, {first}/checkpoint_000004" in str(told.value)) == ("/" not in where)
