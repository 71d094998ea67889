"""The same wrong model folder gets the same answer of every job that reads one, and wrong judge folders of every job that asks
judges: status 2 and a remedy, with and without --dry-run, before any process of Ray starts."""

import json
import re
import shutil
import sys
from importlib import import_module

import pytest
import ray
import tomli_w
import torch

from jobs.cli import run_main
from rlhf.rewards.ctr.build import small_config, small_tokenizer
from rlhf.rewards.ctr.model import CTRModel, save
from rlhf.rewards.tiny import write_hpsv2, write_qwen3_vl
from tests.jobs.light import write_photos
from tests.rlhf.rewards.tiny_clip import write_aesthetic_head, write_clip
from tests.wrong_models import POINTER, STEM, WRONG, cut, edit, remove, rename, tensors, write

READS_A_MODEL = ("online_dpo", "train", "evaluate", "edit", "preprocess")
ASKS_JUDGES = ("serve", "online_dpo", "train", "evaluate")
MODEL_FAULTS = (
    *(
        "no index of the model",
        "config that is no JSON",
        "another scheduler",
        "scheduler away",
        "FLUX.1 Fill",
        "FLUX.1 Dev",
    ),
    *(
        "quantised, by its config",
        "fp8",
        "quantised text encoder",
        "fp16 variant alone",
        "fp16 variant of a text encoder",
    ),
    *(
        "only .bin",
        "a single-file layout",
        "pointer for weights",
        "pointer for a text encoder",
        "pointer for a tokenizer",
    ),
    *("length without sense", "cut off", "cut off text encoder", "tokenizer away", "another shape", "a tensor less"),
    *("shards of which one is away", "an index that promises more", "an index that forgets one"),
)
JUDGE_FAULTS = {
    "hps pointer": ("hps", write("hps.pt", POINTER), r"hps\.pt is a Git LFS pointer.*`git lfs pull`"),
    "hps cut off": ("hps", cut("hps.pt", 5000), r"hps\.pt holds no weights of PyTorch.*download it again"),
    "hps page": ("hps", write("hps.pt", "<html>"), r"hps\.pt holds no weights of PyTorch"),
    "hps without state": (
        "hps",
        lambda f: torch.save([1], f / "hps.pt"),
        "is no HPSv2 checkpoint: it has no `state_dict`",
    ),
    "hps of another size": ("hps", edit("hps.json", embed_dim=64), r"hps\.pt does not fit the config hps\.json"),
    "hps config": ("hps", write("hps.json", "{"), r"hps\.json is not JSON"),
    "hps away": ("hps", remove("hps.pt"), r"judges\.hps\.path = .* does not exist"),
    "ctr pointer": ("ctr", write("ctr/model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer"),
    "ctr cut off": ("ctr", cut("ctr/model.safetensors", 20_000), r"model\.safetensors is cut off"),
    "ctr config": ("ctr", write("ctr/config.json", "{"), r"ctr/config\.json is not JSON"),
    "ctr of another kind": (
        "ctr",
        write("ctr/config.json", '{"model_type": "bert"}'),
        "is no CTR checkpoint: .*jobs.train_ctr",
    ),
    "ctr lacks": (
        "ctr",
        tensors("ctr/model.safetensors", lambda t: t.pop("modality")),
        r"does not fit.*\['modality'\]",
    ),
    "ctr words": ("ctr", write("ctr/tokenizer/tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "clip pointer": ("clip", write("clip/model.safetensors", POINTER), r"judges\.clip\.path.* is a Git LFS pointer"),
    "clip variant": ("clip", rename("clip/model.safetensors", "model.fp16.safetensors"), "that is a variant alone"),
    "clip lacks": ("clip", tensors("clip/model.safetensors", lambda t: t.pop(max(t))), "the weights lack 1 tensors"),
    "clip of another kind": (
        "clip",
        edit("clip/config.json", model_type="siglip"),
        "is a model of type 'siglip', not 'clip'",
    ),
    "clip config": ("clip", write("clip/config.json", "{"), r"clip/config\.json is not JSON"),
    "clip words": ("clip", write("clip/tokenizer.json", "{"), r"tokenizer\.json is not JSON"),
    "aesthetic pointer": ("aesthetic", write("head.pth", POINTER), r"head\.pth is a Git LFS pointer"),
    "aesthetic page": ("aesthetic", write("head.pth", "<html>"), r"head\.pth holds no weights of PyTorch"),
    "filter away": ("filter", lambda f: shutil.rmtree(f / "vlm"), r"judges\.filter\.path = .* does not exist"),
    "filter pointer": (
        "filter",
        write("vlm/model.safetensors", POINTER),
        r"judges\.filter\.path.* is a Git LFS pointer",
    ),
    "filter config": ("filter", write("vlm/config.json", "{"), r"vlm/config\.json is not JSON"),
    "filter blind": (
        "filter",
        edit("vlm/config.json", vision_config=None),
        "of type 'qwen3_vl', which sees no pictures",
    ),
    "filter without weights": (
        "filter",
        remove("vlm/model.safetensors"),
        r"has neither model\.safetensors .*download the weights",
    ),
    "filter without words": ("filter", remove("vlm/tokenizer.json"), r"lacks tokenizer\.json or vocab\.json"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, kontext):
    """A sound model, sound judges, and data for every job."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(kontext, folder / "model")
    write_photos(folder, train=4, held_out=1)
    pair = {"prompt": "x", "winner": "images/0.png", "loser": "images/1.png", "source": "images/2.png"}
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair | {"image_id": str(i)}) for i in range(4)))
    (folder / "items.csv").write_text(
        "image_id,food_name,food_type,city_name,shop_name\n" + "".join(f"{i},a,b,c,d\n" for i in (*range(4), 100))
    )
    write_hpsv2(folder / "hps.pt")
    write_clip(folder / "clip")
    write_aesthetic_head(folder / "head.pth")
    write_qwen3_vl(folder / "vlm")
    words = small_tokenizer(["a b", "a b c"])
    save(folder / "ctr", CTRModel(small_config(words)), words)
    return folder


@pytest.fixture
def copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / "world")


def recipe(job, folder, judge=None):
    """What `job` is told in a world; judge: the one that is asked (default: one that nobody has to load)."""
    model = {"path": str(folder / "model"), "height": 48, "width": 32}
    paths = {"hps": "hps.pt", "ctr": "ctr", "clip": "clip", "aesthetic": "clip", "filter": "vlm"}
    light = {"python": {"green": {"function": "tests.jobs.light:greenness", "num_cpus": 0.1}}}
    chosen = {judge: {"path": str(folder / paths[judge])}} if judge else {}
    if judge == "aesthetic":
        chosen[judge]["head"] = str(folder / "head.pth")
    judges = {"filter": {"enabled": judge == "filter"}} | light | chosen
    reward = {"weights": {judge if judge not in (None, "filter") else "green": 1.0}}
    rows, items = str(folder / "train.jsonl"), str(folder / "items.csv")
    no_gpu, cluster = {"num_gpus": 0.0}, {"address": "local", "num_cpus": 2.0, "object_store_memory": 200_000_000}
    data = {"path": rows, "item_metadata": items, "cache": str(folder / "cache")}
    run = {"run": {"dir": str(folder / "runs")}, "model": model, "trainer": {"train_batch_size": 1, **no_gpu}}
    if job == "serve":
        return {"judges": judges if judge == "filter" else judges | {"filter": {"enabled": False}}, "cluster": cluster}
    if job == "edit":
        return {"model": model, "edit": {"data": rows, "out": str(folder / "out")}}
    if job == "train":
        pairs = data | {"path": str(folder / "pairs.jsonl"), "choice_model": next(iter(reward["weights"]))}
        return run | {"data": pairs, "judges": judges, "cluster": cluster}
    if job == "evaluate":
        del data["cache"]
        tuned, out = {"denoiser": str(folder / "model/transformer")}, str(folder / "out")
        some = {"out": out, "model": model, "tuned": tuned, "data": data, "reward": reward, "judges": judges}
        return some | {"samplers": no_gpu, "cluster": cluster}
    return run | {"data": data, "reward": reward, "judges": judges, "samplers": no_gpu, "cluster": cluster}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a job in this process as its command does; (status, stderr)."""

    def done(job, folder, *options, **settings):
        (folder / "recipe.toml").write_text(tomli_w.dumps(recipe(job, folder, **settings)))
        monkeypatch.setattr(sys, "argv", [f"jobs.{job}", "--config", str(folder / "recipe.toml"), *options])
        monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("a process of Ray starts"))
        with pytest.raises(SystemExit) as end:
            run_main(import_module(f"jobs.{job}").main)
        return end.value.code, capsys.readouterr().err

    return done


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_sound_folders_pass_the_dry_run(run, copy, job):
    assert run(job, copy, "--dry-run") == (0, "")


@pytest.mark.parametrize("judge", ["hps", "ctr", "clip", "aesthetic", "filter"])
@pytest.mark.parametrize("job", ASKS_JUDGES)
def test_sound_judges_pass_the_dry_run(run, copy, job, judge):
    assert run(job, copy, "--dry-run", judge=judge) == (0, "")


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_wrong_model_gets_one_answer_of_every_job(run, copy, fault):
    change, said = WRONG["flux_kontext"][fault]
    change(copy / "model")
    answers = {(job, *dry): run(job, copy, *dry) for job in READS_A_MODEL for dry in ((), ("--dry-run",))}
    assert len(set(answers.values())) == 1, answers
    status, error = answers["edit",]
    assert status == 2 and error.startswith(f"model.path = '{copy / 'model'}': ") and "Traceback" not in error
    assert re.search(said, error, re.DOTALL), error


@pytest.mark.parametrize("fault", JUDGE_FAULTS)
def test_a_wrong_judge_gets_one_answer_of_every_job(run, copy, fault):
    judge, change, said = JUDGE_FAULTS[fault]
    change(copy)
    jobs = [job for job in ASKS_JUDGES if not (job in ("train", "evaluate") and judge == "filter")]
    answers = {(job, *dry): run(job, copy, *dry, judge=judge) for job in jobs for dry in ((), ("--dry-run",))}
    assert len(set(answers.values())) == 1, answers
    status, error = answers["serve",]
    assert status == 2 and "Traceback" not in error
    assert re.search(said, error, re.DOTALL), error


@pytest.mark.parametrize("job", READS_A_MODEL)
def test_a_wrong_denoiser_is_refused_by_every_job(run, copy, job):
    shutil.copytree(copy / "model/transformer", copy / "trained")
    (copy / "trained" / f"{STEM}.safetensors").write_text(POINTER)
    answers = {run(job, copy, *dry, "--model.denoiser", str(copy / "trained")) for dry in ((), ("--dry-run",))}
    ((status, error),) = answers
    assert status == 2 and error.startswith("model.denoiser = ") and "run `git lfs pull` in" in error
