"""A run's page: numbers of known rows, the newest pictures, and what is no run."""

import json

import pytest
import tomli_w

from rlhf.errors import Refused
from rlhf.runs.report import Change, curves, report, write_report

CONFIG = {"trainer": {"max_train_steps": 40, "ranks": 2}, "dpo": {"beta": 500.0}, "reward": {"weights": {"hps": 1.0}}}


def update(step, **scalars):
    return {"step": step, "train/lr": 1e-5, "time/step": 4.0, "time/rollout": 2.5, "time/train": 1.0, **scalars}


@pytest.fixture
def run(tmp_path):
    """20 updates whose reward is their step, evaluated before, after 10 and after 20."""
    folder = tmp_path / "v0"
    (folder / "samples").mkdir(parents=True)
    for name in (
        "eval_base_step_000000",
        "eval_policy_step_000010",
        "eval_policy_step_000020",
        "step_000009",
        "step_000020",
    ):
        (folder / f"samples/{name}.png").write_bytes(b"")
    rows = [{"step": 0, "eval/base_hps": 0.25, "eval/base_pass_rate": 0.5}]
    for step in range(1, 21):
        rows.append(update(step, **{"reward/hps": float(step), "train/loss": 0.7 - step / 100}))
        if step % 10 == 0:
            rows.append({"step": step, "eval/policy_hps": 0.25 + step / 100, "eval/policy_pass_rate": 0.5})
            rows.append({"step": step, "eval/ema_hps": 0.25})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 21, "tr')
    (folder / "config.toml").write_text(tomli_w.dumps(CONFIG))
    return folder


def test_the_numbers(run):
    found, _ = report(run)
    assert (found.steps, found.planned, found.finished, found.evaluated) == (20, 40, False, 20)
    assert found.held_out == [
        Change(name="policy_hps", before=0.25, after=0.45),
        Change(name="policy_pass_rate", before=0.5, after=0.5),
        Change(name="ema_hps", before=0.25, after=0.25),
    ]
    reward, loss = found.training
    assert reward == Change(name="reward/hps", before=1.5, after=19.5)  # means of steps 1, 2 and of 19, 20
    assert loss.name == "train/loss" and loss.before == pytest.approx(0.685) and loss.after == pytest.approx(0.505)
    assert found.seconds == {"waiting for rated edits": 50.0, "training": 20.0, "all": 80.0}
    assert found.held_out_sheets == {"policy beside base": "samples/eval_policy_step_000020.png"}
    assert found.pair_sheet == "samples/step_000020.png"
    assert found.settings == {"reward.weights.hps": 1.0, "dpo.beta": 500.0, "trainer.ranks": 2}


def test_the_page_opens_from_the_disk_and_says_it_all(run):
    (run / "final").mkdir()
    page = write_report(run).read_text()
    told = json.loads((run / "report.json").read_text())
    assert told["finished"] and "20 of 40 updates, finished" in page and "after 20 updates" in page
    for picture in (*told["held_out_sheets"].values(), told["pair_sheet"]):
        assert f'src="{picture}"' in page
    assert page.count("<svg") == 1 and "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    )
    assert "+0.2" in page and "<td>20 s</td>" in page and "25 %" in page  # 20 of 80 seconds


def test_a_headline_comes_first_and_facts_are_beside_the_numbers(run):
    page = write_report(run, "It <rose> by 20 %.", {"true_rate_gain": 0.2}).read_text()
    assert "<b>It &lt;rose&gt; by 20 %.</b>" in page and page.index("It &lt;rose") < page.index("<h2>")
    told = json.loads((run / "report.json").read_text())
    assert told["true_rate_gain"] == 0.2 and told["headline"] == "It <rose> by 20 %." and told["steps"] == 20


def test_a_run_without_an_evaluation_after_the_first_shows_the_base_alone(run):
    for sheet in run.glob("samples/eval_policy_*"):
        sheet.unlink()
    found, _ = report(run)
    assert found.held_out_sheets == {"base": "samples/eval_base_step_000000.png"}


def test_a_null_is_a_band_around_the_base_of_its_measure_alone(run):
    assert "shuffled rewards" not in write_report(run).read_text()
    _, rows = report(run)
    with_band = curves(rows, {"hps": 0.1, "unknown": 0.1})
    assert with_band.count("shuffled rewards") == 1


def test_without_a_base_the_first_evaluation_is_what_the_last_is_held_against(run):
    rows = [update(1), {"step": 0, "eval/implicit_acc": 0.5}, update(2), {"step": 2, "eval/implicit_acc": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = report(run)
    assert found.held_out == [Change(name="implicit_acc", before=0.5, after=0.75)] and found.training == []


def test_what_is_no_run_or_has_not_begun_is_refused(run, tmp_path):
    with pytest.raises(
        Refused, match=r"is no run: it holds no metrics\.jsonl and config\.toml; give e\.g\. runs/NAME/v0"
    ):
        write_report(tmp_path)
    (run / "config.toml").write_text("")
    with pytest.raises(Refused, match=r"names no trainer\.max_train_steps: only runs that a job wrote have a page"):
        write_report(run)
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/base_hps": 0.25}\n')
    with pytest.raises(Refused, match="no update was done yet"):
        write_report(run)
    assert not (run / "report.html").exists()
