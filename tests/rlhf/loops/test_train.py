"""The training loop with a source and a trainer that only count, in a real run folder."""

import json
from pathlib import Path

import pytest

from rlhf.loops.train import Duty, evaluation, saving, train
from rlhf.runs.folder import RunFolder
from rlhf.tables import RunConfig
from rlhf.types import Geometry, Prompt, Score, Verdict, seed_from


class Counting:
    """A source, a trainer and a tracker in one: what it was asked, in order."""

    def __init__(self, fails_at: int | None = None):
        self.asked: list = []
        self.trained, self._fails_at = 0, fails_at

    def take(self, step):
        self.asked.append(("take", step))

    def metrics(self):
        return {"train/groups": 1.0}

    def snapshot(self):
        return {"taken": self.trained}

    def step(self, step, handed):
        if step == self._fails_at:
            raise KeyboardInterrupt
        self.trained = step
        return {"train/loss": 0.5}

    def log(self, step, scalars):
        self.asked.append(("log", step, dict(scalars)))

    def save(self, folder: Path):
        folder.mkdir()
        (folder / "weights").write_text(str(self.trained))

    def export(self, folder: Path):
        (folder / "weights").write_text(str(self.trained))


class Source(Counting):
    def restore(self, step, saved):
        self.asked.append(("restore", step, saved))


class Trainer(Counting):
    def restore(self, folder: Path):
        self.trained = int((folder / "weights").read_text())
        self.asked.append(("restore", self.trained))
        return self.trained


def run_once(tmp_path, steps, fails_at=None):
    """One driver's life: (its source, its trainer, its tracker, the steps of a duty that is due every 2)."""
    run = RunFolder.claim(tmp_path, "run", "")
    source, trainer, tracker, done = Source(), Trainer(fails_at), Counting(), []
    duties = [
        Duty(every=2, do=done.append, at_start=True),
        Duty(every=0, do=lambda step: pytest.fail("never due")),
        *saving(RunConfig(name="run", export_every=2, save_every=2, keep_checkpoints=1), run, source, trainer),
    ]
    try:
        train(steps, run, source, trainer, tracker, duties)
    except KeyboardInterrupt:
        assert fails_at is not None
    finally:
        run.release()
    return run.path, source, trainer, tracker, done


def test_a_run_starts_from_nothing_does_what_is_due_and_ends_with_its_weights(tmp_path):
    path, source, trainer, tracker, done = run_once(tmp_path, 5)
    assert source.asked == [("restore", 0, None), *(("take", step) for step in range(5))]
    assert tracker.asked == [("log", step, {"train/loss": 0.5, "train/groups": 1.0}) for step in range(1, 6)]
    assert done == [0, 2, 4] and trainer.asked == []
    assert (path / "final" / "weights").read_text() == "5"
    assert {export.name for export in (path / "exports").iterdir()} == {"step_000002", "step_000004"}
    assert [checkpoint.name for checkpoint in path.glob("checkpoint_*")] == ["checkpoint_000004"]


def test_a_run_goes_on_from_its_last_commit(tmp_path):
    path, *_, done = run_once(tmp_path, 5, fails_at=4)
    assert done == [0, 2] and not (path / "final").exists()
    assert json.loads((path / "checkpoint_000002" / "state" / "source.json").read_text()) == {"taken": 0}
    again, source, trainer, tracker, done = run_once(tmp_path, 5)
    assert again == path and done == [4], "what is due before the first step was done already"
    assert trainer.asked == [("restore", 2)]
    assert source.asked == [("restore", 2, {"taken": 0}), *(("take", step) for step in (2, 3, 4))]
    assert [step for _, step, _ in tracker.asked] == [3, 4, 5]
    assert (path / "final" / "weights").read_text() == "5"


class Judged:
    """Rollouts and a tracker: every second picture passes, the last cannot be judged."""

    def __init__(self):
        self.asked: list = []

    def score(self, prompts, seeds):
        self.asked.append(("score", [prompt.key for prompt in prompts], seeds))
        answers = [
            Score(verdict=Verdict(valid=i % 2 == 0), rewards={"clip": float(i)}) for i in range(len(prompts) - 1)
        ]
        return list(enumerate([*answers, "no answer"]))

    def log(self, step, scalars):
        self.asked.append(("log", step, scalars))

    def edits(self, step, name, prompts, answers):
        self.asked.append(("edits", step, name))

    def publish(self, side, step):
        self.asked.append(("publish", side, step))


def test_held_out_prompts_are_scored_with_the_policy_and_the_average_at_seeds_of_their_own():
    judged = Judged()
    held_out = [Prompt(key=key, instruction="", geometry=Geometry(height=8, width=8)) for key in "ab"]
    duty = evaluation(held_out, judged, judged, judged.publish, rewards=["clip"], variants=2, seed=3, ema=True)
    duty(0)
    seeds = [seed_from(3, "eval", index) for index in range(4)]
    assert judged.asked == [
        ("score", ["a", "a", "b", "b"], seeds),
        ("log", 0, {"eval/base_judged": 0.75, "eval/base_pass_rate": 2 / 3, "eval/base_clip": 1.0}),
        ("edits", 0, "base"),
    ]
    judged.asked.clear()
    duty(10)
    assert [asked[0] for asked in judged.asked] == [
        "score",
        "log",
        "edits",
        "publish",
        "score",
        "log",
        "edits",
        "publish",
    ]
    assert [asked for asked in judged.asked if asked[0] == "publish"] == [
        ("publish", "ema", None),
        ("publish", "policy", 10),
    ]
    assert judged.asked[6] == ("edits", 10, "ema")
