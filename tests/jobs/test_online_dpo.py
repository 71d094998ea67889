"""The whole job on a light world: pairs under rejection, stops with reasons, and exact resume after kill -9.

The light judges reject and fail by a hash of the pixels, and those differ between CPUs in the last bits. What a test asks of
their counts fails by chance less than once in 100,000 runs; no judge's failures stop a run whose test is not about that.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image
from ray import serve
from safetensors.torch import load_file, save_file

from rlhf.data.audit import read_pairs
from rlhf.data.batches import latents_from_array
from rlhf.errors import NotFinite
from rlhf.models import load_family
from rlhf.rollouts.reliability import JudgeUnreliable
from rlhf.rollouts.rollout import NothingPasses
from rlhf.shards.files import SafetensorsFolder
from tests.conftest import SERVE_PORT
from tests.console import foreign_lines
from tests.jobs.light import light_config, metric_rows, run_online, write_photos
from tests.judge_server import warmth
from tests.processes import ray_processes

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    write_photos(tmp_path)
    return tmp_path


def test_a_filter_that_rejects_most_still_gives_full_batches_of_sound_pairs(cluster, judge_server, kontext, folder):
    url = judge_server(reject=0.7, fail=0.3)  # none of the 40 scores and more that 20 pairs take fails: 0.7⁴⁰ = 6e-7
    config = light_config(
        folder,
        kontext,
        url,
        judges=light_config(folder, kontext, url).judges.model_dump() | {"retries": 0, "max_failure_rate": 1.0},
        rollout={"max_sample_attempts": 12, "lookahead": 1},
        trainable={"kind": "lora", "rank": 4},
        trainer=light_config(folder, kontext, "").trainer.model_dump() | {"max_train_steps": 5},
        eval={"path": str(folder / "eval.jsonl"), "every": 3},
    )
    path = run_online(config)
    rows = read_pairs(path / "pairs")
    assert [row["step"] for row in rows] == [step for step in range(1, 6) for _ in range(4)]
    assert [row["index"] for row in rows] == [0, 1, 2, 3] * 5
    assert len({row["cursor"] for row in rows}) == len(rows), "a prompt trained twice within an epoch"
    for row in rows:
        assert row["winner_latents"] != row["loser_latents"]
        assert min(row["winner_pass_probability"], row["loser_pass_probability"]) >= 0.7
        assert dict(row["winner_rewards"])["hps"] > dict(row["loser_rewards"])["hps"]
        assert row["step"] - 1 - row["winner_version"] <= config.rollout.oldest + 2  # EMA publishes count too
    metrics = [row for row in metric_rows(path) if "train/loss" in row]
    # Of all verdicts, not step by step: with lookahead a step may see few, or none where its pairs were there already.
    assert 0 < np.mean([row["filter/pass_rate"] for row in metrics if "filter/pass_rate" in row]) < 1
    assert sum(row["rollout/quarantined_hps"] for row in metrics) > 0
    assert (path / "final" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(file.name for file in (path / "samples").glob("step_*.png")) == ["step_000004.png"]
    held_out = [row for row in metric_rows(path) if any(name.startswith("eval/") for name in row)]
    for side, step in (("base", 0), ("policy", 3), ("ema", 3)):
        (row,) = [row for row in held_out if row["step"] == step and f"eval/{side}_judged" in row]
        # Which of the held-out pictures pass is chance: a mean is told where some did, and only there.
        assert (f"eval/{side}_hps" in row) == (row.get(f"eval/{side}_pass_rate", 0) > 0)


def test_a_filter_that_rejects_all_stops_with_the_counts(cluster, judge_server, kontext, folder):
    config = light_config(
        folder,
        kontext,
        judge_server(reject=1.0),
        sampling={"steps": 1, "batch_size": 4},
        rollout={"max_sample_attempts": 3, "max_dropped_in_a_row": 6},
    )
    with pytest.raises(NothingPasses, match=r"0 of \d+ candidates passed the filter"):
        run_online(config)


def test_weights_that_give_nan_stop_the_run_before_a_judge_sees_a_picture(cluster, judge_server, kontext, folder):
    broken = shutil.copytree(kontext / "transformer", folder / "broken")
    weights = load_file(broken / "diffusion_pytorch_model.safetensors")
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, broken / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = light_config(folder, kontext, judge_server(), model={"denoiser": str(broken)})
    with pytest.raises(
        NotFinite, match=r"no picture of .* with published version \d of the trained weights: the denoiser"
    ):
        run_online(config)
    assert not list((folder / "runs").rglob("samples/*.png")) and not list((folder / "runs").rglob("pairs/*.parquet"))


def test_no_pair_holds_a_candidate_whose_judging_failed(cluster, judge_server, kontext, folder, tmp_path_factory):
    """A judge that fails a quarter of the pictures: the run goes on, tops up, and those pictures are in no pair."""
    failures = tmp_path_factory.mktemp("failures")
    url = judge_server(fail=0.25, reject=0.2, failures=failures)  # none of 48 and more fails: 0.75⁴⁸ = 1e-6
    judges = light_config(folder, kontext, url).judges.model_dump() | {"retries": 0, "max_failure_rate": 1.0}
    config = light_config(folder, kontext, url, judges=judges)
    path = run_online(config)
    rows, metrics = read_pairs(path / "pairs"), [row for row in metric_rows(path) if "train/loss" in row]
    assert [row["step"] for row in rows] == [step for step in range(1, 7) for _ in range(4)]
    failed = [np.asarray(Image.open(file)) for file in failures.glob("*.png")]
    assert len(failed) >= sum(row["rollout/quarantined_hps"] for row in metrics) > 0
    assert max(row["rollout/attempts_per_group"] for row in metrics) > 2, "nothing was topped up"
    codec = load_family(config.model).load_codec("cpu")
    for row in rows:
        for side in ("winner", "loser"):
            array = np.frombuffer(row[f"{side}_latents"], np.int16).reshape(row["latents_shape"])
            picture = codec.decode(latents_from_array(array)[None]).numpy()[0, 0]
            assert warmth(picture) == pytest.approx(dict(row[f"{side}_rewards"])["hps"], abs=2e-3), "another picture"
            assert min(np.abs(picture.astype(int) - other).mean() for other in failed) > 1


def test_a_judge_that_fails_too_often_stops_the_run_by_name(cluster, judge_server, kontext, folder):
    judges = light_config(folder, kontext, judge_server(fail=0.9)).judges.model_dump() | {"retries": 0}
    config = light_config(folder, kontext, "", judges=judges)
    with pytest.raises(JudgeUnreliable, match=r"judge 'hps' failed .*status 500.*on purpose"):
        run_online(config)


def test_any_mix_of_judges_trains(cluster, judge_server, kontext, folder):
    """A function of the user's and a service by batches, weighted; both deployed, scored and logged."""
    url = judge_server(reject=0.2)
    judges = {
        "python": {"green": {"function": "tests.jobs.light:greenness", "num_cpus": 0.1}},
        "http": {"warm": {"url": f"{url}/score_batch", "num_cpus": 0.1}},
        "filter": {"url": f"{url}/filter", "send_source": True},
    }
    config = light_config(
        folder,
        kontext,
        url,
        judges=judges,
        reward={"weights": {"green": 1.0, "warm": 3.0}},
        serve={"port": SERVE_PORT},
        trainer=light_config(folder, kontext, url).trainer.model_dump() | {"max_train_steps": 2},
    )
    path = run_online(config)
    rows = read_pairs(path / "pairs")
    assert len(rows) == 8
    for row in rows:
        winner, loser = dict(row["winner_rewards"]), dict(row["loser_rewards"])
        assert winner.keys() == loser.keys() == {"green", "warm"} and row["margin"] > 0
    steps = [row for row in metric_rows(path) if "train/loss" in row]
    for row in steps:
        assert row["reward/mean"] == pytest.approx((row["reward/green"] + 3 * row["reward/warm"]) / 4)
    deadline = time.monotonic() + 60
    while [name for name in serve.status().applications if name.startswith("light-v0")]:
        assert time.monotonic() < deadline, "the run's apps are still there"
        time.sleep(0.2)


def start(recipe: Path, log: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.online_dpo", "--config", str(recipe)]
    return subprocess.Popen(command, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment)


def wait_for(condition, seconds: float, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the driver ended early:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"too slow:\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


def state(path: Path, step: int) -> dict[str, bytes]:
    files = sorted((path / f"checkpoint_{step:06d}" / "state").glob("*"))
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.timeout(900)
def test_kill_9_and_the_same_command_give_the_run_that_nothing_happened_to(judge_server, kontext, folder):
    """To the last bit, because every candidate has the same place in its batch: with one place. Batches form by arrival."""
    url, steps = judge_server(reject=0.3), 40
    trainer = light_config(folder, kontext, url).trainer.model_dump(exclude_none=True)
    drivers = {}
    for name in ("straight", "killed"):
        config = light_config(
            folder,
            kontext,
            url,
            run={"name": name, "dir": str(folder / "runs"), "save_every": 5, "sample_every": 20, "keep_checkpoints": 1},
            trainer=trainer | {"max_train_steps": steps},
            sampling={"steps": 2, "batch_size": 1},
        )
        drivers[name] = folder / f"{name}.toml"
        drivers[name].write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    log = folder / "log.txt"
    assert start(drivers["straight"], log).wait(400) == 0, log.read_text()[-3000:]
    assert not foreign_lines(log.read_text())

    killed = folder / "runs" / "killed" / "v0"
    victim_step = random.Random(os.getpid()).choice(range(6, 32, 5))  # four steps before the next commit
    process = start(drivers["killed"], log)
    audit = killed / "pairs" / f"step_{victim_step:06d}.rank_0.parquet"
    wait_for(audit.exists, 300, process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    again = start(drivers["killed"], log)
    assert again.wait(400) == 0, log.read_text()[-3000:]

    straight = folder / "runs" / "straight" / "v0"
    assert list((killed / "discarded").glob("epoch_2/*")), f"nothing was redone after the kill at {victim_step}"
    assert metric_rows(killed) == metric_rows(straight)
    assert read_pairs(killed / "pairs") == read_pairs(straight / "pairs")
    assert state(killed, steps) == state(straight, steps)
    for kind in ("transformer", "ema_transformer"):
        one, other = (SafetensorsFolder(path / "final" / kind).path for path in (killed, straight))
        file = "diffusion_pytorch_model.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_a_killed_rank_and_a_killed_sampler_cost_time_but_no_run(cluster, judge_server, kontext, folder):
    base = light_config(folder, kontext, url := judge_server(reject=0.3))
    # Seven steps are left, and three until the next commit, when the rank is killed: the run cannot be over before.
    config = light_config(
        folder,
        kontext,
        url,
        run=base.run.model_dump() | {"save_every": 4},
        trainer=base.trainer.model_dump() | {"max_train_steps": 12},
    )
    pairs = folder / "runs" / "light" / "v0" / "pairs"
    killed = []

    def kill_when_reached() -> None:
        for step, name in ((3, "Sampler"), (5, "TrainerWorker")):
            while not (pairs / f"step_{step:06d}.rank_0.parquet").exists():
                time.sleep(0.05)
            victim = ray_processes(name)[0]
            killed.append(victim.pid)
            victim.kill()

    killer = threading.Thread(target=kill_when_reached, daemon=True)
    killer.start()
    path = run_online(config)
    assert len(killed) == 2
    rows = read_pairs(path / "pairs")
    assert [(row["step"], row["index"]) for row in rows] == [(s, i) for s in range(1, 13) for i in range(4)]
    assert list((path / "discarded").glob("epoch_1/pairs/*")), "the rank died, but nothing was rolled back"
    assert (path / "final" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    losses = [row["train/loss"] for row in metric_rows(path) if "train/loss" in row]
    assert len(losses) == 12


def test_a_second_driver_on_the_same_folder_is_refused(cluster, judge_server, kontext, folder):
    from jobs.cli import resolved_toml
    from rlhf.runs.folder import RunFolder, RunInUse

    config = light_config(folder, kontext, "http://127.0.0.1:9")
    held = RunFolder.claim(config.run.dir, config.run.name, resolved_toml(config))
    with pytest.raises(RunInUse, match="in use by a live driver"):
        run_online(config)
    held.release()


def test_run_and_folder_have_names_in_any_letters(cluster, kontext, tmp_path):
    """With a judge on Serve: neither its application nor Ray's metrics take other letters than ASCII."""
    folder = tmp_path / "产品 🍎"
    write_photos(folder, train=4)
    base = light_config(folder, kontext, "")
    config = light_config(
        folder,
        kontext,
        "",
        run={"name": "春 卷 🥟", "dir": str(folder / "运行"), "save_every": 1, "sample_every": 1},
        trainer=base.trainer.model_dump() | {"max_train_steps": 2, "ranks": 1},
        samplers=base.samplers.model_dump() | {"count": 1},
        reward={"weights": {"green": 1.0}},
        judges={
            "python": {"green": {"function": "tests.jobs.light:greenness", "num_cpus": 0.1}},
            "filter": {"enabled": False},
        },
        serve={"port": SERVE_PORT},
    )
    path = run_online(config)
    assert path == folder / "运行" / "春 卷 🥟" / "v0"
    assert [row["step"] for row in metric_rows(path) if "train/loss" in row] == [1, 2]
    assert len([*(path / "samples").glob("*.png")]) == 2 and (path / "final" / "transformer").is_dir()
    assert (path / "config.toml").read_text(encoding="utf-8").splitlines()[1] == 'name = "春 卷 🥟"'
