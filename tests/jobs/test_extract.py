"""Rows of several texts become a task folder that is encoded once: by any encoders, after any kill, and moved, the same bytes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import diffusers
import pytest
import ray
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load_file

from actors import checks
from actors.trainer import TrainerGroup
from jobs import extract, train
from jobs.cli import parse
from jobs.example_sets import read_example_sets, tasks_of, wanted
from jobs.recipes import ExtractRecipe, TrainRecipe
from rlhf.data.batches import noise_seed, t_seed
from rlhf.data.cache import EncodingCache, read_manifest
from rlhf.data.fingerprint import fingerprints
from rlhf.data.records import BadInput
from rlhf.data.sources import open_source
from rlhf.data.work import IndexedExamples
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from rlhf.types import noise_from
from tests.jobs.test_configs import FOLDER
from tests.jobs.test_strange import rows_of
from tests.rlhf.data.pair_tables import png

ROWS = (
    {
        "source_image": "/data/img/001.png",
        "target_image": "/data/img/001_edit.png",
        "instruction": "Change the sky to sunset.",
        "instruction_cn": "把天空改成日落。",
        "inverse_instruction": "A photo of a landscape with a blue sky.",
        "inverse_instruction_cn": "一张蓝天下的风景照。",
    },
    {
        "source_image": ["/data/ref1.png", "/data/ref2.png"],
        "target_image": "/data/out.png",
        "instruction": "Merge the two characters into one scene.",
        "instruction_cn": "把两个角色合成到一个场景里。",
    },
    {"source_image": None, "target_image": "/data/generated.png", "instruction": "A cat sitting on a windowsill."},
)
"""The three of FireRed's documentation."""
TEXTS = tuple(text for row in ROWS for name, text in row.items() if "instruction" in name)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen", texts=TEXTS)


@pytest.fixture
def folder(tmp_path):
    """data/ with the pictures, of which every one has a size of its own."""
    (tmp_path / "data" / "img").mkdir(parents=True)
    for i, name in enumerate(("img/001", "img/001_edit", "ref1", "ref2", "out", "generated")):
        (tmp_path / "data" / f"{name}.png").write_bytes(png(i, 40 + 8 * i, 72 - 8 * i))
    return tmp_path


def write_rows(folder: Path, rows) -> Path:
    """With /data where the folder's is."""
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "data" / "a.jsonl").write_text(text.replace('"/data/', f'"{folder}/data/'))
    return folder / "data" / "a.jsonl"


def arguments(folder: Path, model: Path, **more) -> list[str]:
    """The shipped recipe's, for two CPU ranks and a small model."""
    given = {
        "model.path": model,
        "model.height": 64,
        "model.width": 64,
        "data.path": folder / "tasks",
        "data.cache": folder / "tasks" / ".cache",
        "data.root": folder / "data",
        "data.buckets.min_side": 32,
        "run.dir": folder / "runs",
        "trainer.ranks": 2,
        "trainer.num_cpus": 0.2,
        "trainer.num_gpus": 0,
        "preprocess.encoders": 1,
        "preprocess.num_cpus": 0.2,
        "preprocess.num_gpus": 0,
        "cluster.num_cpus": 2,
        "cluster.object_store_memory": 200_000_000,
    } | {name.replace("__", "."): value for name, value in more.items()}
    recipe = str(FOLDER / "sft_qwen_image_edit_mixture.toml")
    return ["--config", recipe, *(f"--{key}={value}" for key, value in given.items())]


def of_rows(folder: Path, model: Path, name: str = "a", rows: str = "a.jsonl", **more) -> list[str]:
    return arguments(folder, model, extract__rows=folder / "data" / rows, extract__name=name, **more)


@pytest.fixture
def run(folder, model, monkeypatch, capsys):
    """`run(job, arguments)`: what is said."""

    def start(job, given):
        monkeypatch.setattr(sys, "argv", ["job", *given])
        job.main()
        return capsys.readouterr().out

    return start


def recipe_of(given) -> ExtractRecipe:
    return parse(ExtractRecipe, given).config


def examples_of(folder, model, rows=ROWS, **more):
    write_rows(folder, rows)
    return extract.examples_of(recipe_of(of_rows(folder, model, **more)).extract, folder / "data", range(4))


# --- rows ----------------------------------------------------------------------------------------------------------------


def test_every_text_of_a_row_becomes_an_example_with_paths_from_the_root(folder, model):
    found = examples_of(folder, model)
    there, back = (
        {"target": "img/001_edit.png", "source": ["img/001.png"]},
        {"target": "img/001.png", "source": ["img/001_edit.png"]},
    )
    two = {"target": "out.png", "source": ["ref1.png", "ref2.png"]}
    assert found.lines == [
        {"image_id": "1_en", "prompt": ROWS[0]["instruction"], **there},
        {"image_id": "1_cn", "prompt": ROWS[0]["instruction_cn"], **there},
        {"image_id": "1_inverse_en", "prompt": ROWS[0]["inverse_instruction"], **back},
        {"image_id": "1_inverse_cn", "prompt": ROWS[0]["inverse_instruction_cn"], **back},
        {"image_id": "2_en", "prompt": ROWS[1]["instruction"], **two},
        {"image_id": "2_cn", "prompt": ROWS[1]["instruction_cn"], **two},
        {"image_id": "3_en", "prompt": ROWS[2]["instruction"], "target": "generated.png"},
    ]
    assert found.counts == {"en": 3, "cn": 2, "inverse_en": 1, "inverse_cn": 1} and not found.problems


def test_some_texts_alone_columns_by_other_names_and_edit_image(folder, model):
    found = examples_of(folder, model, extract__texts='["cn", "inverse_cn"]')
    assert [line["image_id"] for line in found.lines] == ["1_cn", "1_inverse_cn", "2_cn"] != []
    rows = [{"before": "img/001.png", "edit_image": "out.png", "say": "x", "instruction": "not read"}]
    found = examples_of(folder, model, rows[:1], extract__source="before", extract__en="say")
    assert found.lines == [{"image_id": "1_en", "prompt": "x", "target": "out.png", "source": ["img/001.png"]}]


def test_a_dry_run_tells_what_there_is_and_writes_nothing(folder, model, run):
    write_rows(folder, ROWS)
    said = run(extract, [*of_rows(folder, model), "--dry-run"])
    assert said.startswith(f"{folder}/tasks/a: 7 examples (3 en, 2 cn, 1 inverse_en, 1 inverse_cn)\n")
    assert "; to encode: 11 texts, 8 pictures" in said and not (folder / "tasks" / "a").exists()
    with pytest.raises(Refused, match=r"model\.path = .*: there is no such folder"):
        run(extract, [*of_rows(folder, folder / "nothing"), "--dry-run"])


WRONG = {
    "no target": ({"source_image": "ref1.png", "instruction": "x"}, "target_image: is missing; give the path"),
    "two targets": (
        {"target_image": "out.png", "edit_image": "out.png", "instruction": "x"},
        "target_image: is given, and edit_image too; give",
    ),
    "no text": ({"target_image": "out.png"}, "instruction: is missing, and so is every other text; write"),
    "a way back to two": (
        ROWS[1] | {"inverse_instruction": "x"},
        'inverse_instruction: is of the way back to the source, but the row has 2; leave it out, or set extract.texts = ["en",',
    ),
    "a way back to none": (
        {"target_image": "out.png", "inverse_instruction": "x"},
        "inverse_instruction: is of the way back to the source, but the row has 0",
    ),
    "a URL": (
        {"target_image": "https://host/1.png", "instruction": "x"},
        "'https://host/1.png' is a URL; pictures are",
    ),
    "a picture that is not there": ({"target_image": "none.png", "instruction": "x"}, "'none.png' does not exist"),
    "a source by another name": (
        {"source": "ref1.png", "target_image": "out.png", "instruction": "x"},
        'source: is no column that is read; set extract.source = "source", or leave it out',
    ),
    "four sources": (
        {"source_image": ["ref1.png"] * 4, "target_image": "out.png", "instruction": "x"},
        "source_image: names 4 pictures, but the model takes 0 to 3",
    ),
    "one outside the root": ({"target_image": "/etc/hosts", "instruction": "x"}, "lies outside the data root"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_row_is_told_and_nothing_is_written(folder, model, run, fault):
    row, says = WRONG[fault]
    file = write_rows(folder, (*ROWS, row))
    with pytest.raises(BadInput) as refused:
        run(extract, of_rows(folder, model))
    assert f"{file}:4: " in str(refused.value) and says in str(refused.value)
    assert not (folder / "tasks").exists()
    said = run(extract, [*of_rows(folder, model, data__on_bad_row="skip"), "--dry-run"])
    assert f"left out:\n{file}:4: " in said and "7 examples" in said


def test_a_file_that_is_none_and_one_without_rows_are_refused(folder, model, run):
    write_rows(folder, ())
    for name, says in (("a.jsonl", "has no rows"), ("img", "is a nameless file"), ("none.jsonl", "no such file")):
        with pytest.raises(BadInput, match=says):
            run(extract, of_rows(folder, model, rows=name))
    (folder / "data" / "a.json").write_text("[]")
    with pytest.raises(BadInput, match=r"is a \.json file; give one of"):
        run(extract, of_rows(folder, model, rows="a.json"))


def test_a_name_that_is_none_and_a_root_that_is_none_are_refused(folder, model, run):
    write_rows(folder, ROWS)
    with pytest.raises(Refused, match=r"extract\.name = 'a/b' "):
        run(extract, of_rows(folder, model, name="a/b"))
    with pytest.raises(Refused, match=r"data\.root = .*none' is no folder: give the one that the paths in the rows"):
        run(extract, of_rows(folder, model, data__root=folder / "none"))


# --- encoding ------------------------------------------------------------------------------------------------------------


def rows_in(cache: Path) -> dict[str, str]:
    """The checksum of every encoding, by key."""
    return {key: place.checksum for key, place in read_manifest(cache).places.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_two_commands_of_firereds_documentation_on_its_three_rows(cluster, folder, model, run, monkeypatch):
    """In the shipped recipe's values, on two ranks. They hold no encoder, and nobody reads one: its weights are overwritten."""
    write_rows(folder, ROWS)
    mine = shutil.copytree(model, folder / "model")
    for name in ("dataset_a", "dataset_b", "dataset_c"):
        said = run(extract, of_rows(folder, mine, name=name))
        assert ("preprocess: all captions and pictures are in" in said) == (name != "dataset_a"), (
            "nothing is encoded twice"
        )
        assert f"{name}: 7 examples" in said and f"[data.task_weights]\n{name} = 1" in said
    files = files_below(folder / "tasks")
    run(extract, of_rows(folder, mine, name="dataset_a"))
    assert files_below(folder / "tasks") == files
    write_rows(folder, ROWS[:2])
    assert "dataset_c/rows.jsonl: replaced; it had 7 examples" in run(extract, of_rows(folder, mine, name="dataset_c"))
    write_rows(folder, ROWS)
    run(extract, of_rows(folder, mine, name="dataset_c"))

    held = []

    class Watched(TrainerGroup):
        def step(self, *given):
            scalars = super().step(*given)
            held.extend(ray.get([rank.__ray_call__.remote(encoders_held) for rank in self._group.workers], timeout=60))
            return scalars

    for weights in [*mine.glob("text_encoder/*.safetensors"), *mine.glob("vae/*.safetensors")]:
        overwrite(weights)
    monkeypatch.setattr(train, "TrainerGroup", Watched)
    said = run(train, arguments(folder, mine))
    assert "1 epochs of 21 examples are 11 updates; trainer.max_train_steps = 512" in said
    assert "preprocess: all captions and pictures are in" in said
    (path,) = (folder / "runs").glob("*/v0")
    steps = [row for row in rows_of(path) if "train/loss" in row]
    assert len(steps) == 11 and all(sum(row[f"data/dataset_{x}"] for x in "abc") == 2 for row in steps)
    assert held == [[]] * 22
    (weights,) = mine.glob("text_encoder/*.safetensors")
    assert all(tensor.isnan().all() for tensor in load_file(weights).values())


def overwrite(weights: Path) -> None:
    """Make every number NaN, and leave the size and the time, by which this process knows the file's hash, the cache's key."""
    times, content = weights.stat(), weights.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:head] + b"\xff" * (len(content) - head))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


def files_below(folder: Path) -> dict[Path, bytes]:
    """Task folders and what is encoded; the index of a check has a new name after every check."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "index.arrow"}


def encoders_held(rank) -> list[str]:
    """The networks in a rank's process that are no denoiser."""
    import gc

    import transformers

    kinds = (transformers.PreTrainedModel, diffusers.AutoencoderKLQwenImage)
    return [type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_embeddings_and_the_first_loss_are_the_pipelines_and_a_moved_folder_trains(cluster, folder, model, run):
    """In fp32, for no source, one and two, there and back, English, Chinese and what dropout tells."""
    write_rows(folder, ROWS)
    more = {"model__dtype": "float32", "data__task_weights": "{ a = 1 }"}
    run(extract, of_rows(folder, model, **more))
    config = parse(TrainRecipe, arguments(folder, model, **more)).config
    sets = read_example_sets(config, ("target",), partial(checks.in_threads, str))
    family, seen = load_family(config.model), []
    cache = EncodingCache(config.data.cache, fingerprints(family))
    for encoding in wanted(config, ("target",), sets):
        if encoding.text is not None:
            theirs = embedded(opened(model), encoding)
            mine = cache.row(encoding)["prompt_embeds"]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=EPS * 64 * theirs.abs().max().item())
            seen.append((encoding.text, len(encoding.sources)))
    counts = [1, 1, 1, 1, 2, 2, 0]
    assert set(seen) == {*zip(TEXTS, counts, strict=True), *((" ", count) for count in counts)}

    loss = [one_step(folder, model, run, **more)]
    # 100 roundings of the mean of squares that are of the order of 1.
    assert loss[0] == pytest.approx(first_loss(model, config, sets), rel=100 * EPS)
    (folder / "elsewhere").mkdir()
    for name in ("tasks", "data"):
        shutil.move(folder / name, folder / "elsewhere" / name)
    before = rows_in(folder / "elsewhere" / "tasks" / ".cache")
    loss.append(one_step(folder / "elsewhere", model, run, **more))
    assert loss[0] == loss[1] and rows_in(folder / "elsewhere" / "tasks" / ".cache") == before


def one_step(folder: Path, model: Path, run, **more) -> float:
    """The loss of an update, for which nothing is encoded."""
    said = run(train, arguments(folder, model, trainer__max_train_steps=1, **more))
    assert "preprocess: all captions and pictures are in" in said
    (path,) = (folder / "runs").glob("*/v0")
    return next(row["train/loss"] for row in rows_of(path) if "train/loss" in row)


def opened(model: Path) -> diffusers.QwenImageEditPlusPipeline:
    """A pipeline whose encoder is told which tokens are a picture's, as it was when the weights were trained."""
    pipeline = diffusers.QwenImageEditPlusPipeline.from_pretrained(model)
    encode, token = pipeline.text_encoder.forward, pipeline.text_encoder.config.image_token_id
    pipeline.text_encoder.forward = lambda input_ids, **given: encode(
        input_ids=input_ids, mm_token_type_ids=(input_ids == token).int(), **given
    )
    return pipeline


def embedded(pipeline: diffusers.QwenImageEditPlusPipeline, encoding) -> torch.Tensor:
    """(tokens, width) that `encode_prompt` gives: that of the pipeline for texts alone, where there is no source."""
    pictures = [Image.fromarray(picture[0]) for picture in pixels(encoding)]
    given = {"image": pictures} if pictures else {}
    if not pictures:
        parts = {name: part for name, part in pipeline.components.items() if name != "processor"}
        pipeline = diffusers.QwenImagePipeline(**parts)
    with torch.no_grad():
        found, mask = pipeline.encode_prompt(prompt=[encoding.text], **given)
    assert mask is None
    return found[0]


def pixels(encoding):
    """uint8 (1, H, W, 3) of every source, fitted."""
    return [open_source(*one) for one in zip(encoding.sources, encoding.geometries, strict=True)]


def first_loss(model: Path, config, sets) -> float:
    """Of the update on the first two examples, from the pipeline's parts: mean of (v − (ε − x0))² at x0 + t(ε − x0)."""
    pipeline, family, stream = opened(model), load_family(config.model), train.stream_of(config, sets.training)
    examples = IndexedExamples(family, sets.training.place.path, sets.training.place.sizes, ("target",))
    scheduler, losses = pipeline.scheduler.config, []
    for index in range(2):
        text, *sources, target = examples.encodings(stream[index])
        x0, *others = [latents_of(pipeline, *pixels(encoding)) for encoding in (target, *sources)]
        (height, width), tokens = x0.shape[-2:], x0[0, 0].numel() // 4
        noise = noise_from(noise_seed(config.run.seed, 1, index), x0[0, :, 0].shape)[None, :, None]
        ends = (scheduler.base_image_seq_len, scheduler.max_image_seq_len, scheduler.base_shift, scheduler.max_shift)
        shift = math.exp(pipeline_qwenimage_edit_plus.calculate_shift(tokens, *ends))
        uniform = torch.rand((), generator=torch.Generator().manual_seed(t_seed(config.run.seed, 1, index)))
        t = shift * uniform / (1 + (shift - 1) * uniform)
        packed = [packed_of(latents) for latents in (x0 + t * (noise - x0), *others)]
        with torch.no_grad():
            v = pipeline.transformer(
                hidden_states=torch.cat(packed, dim=1),
                timestep=t[None],
                encoder_hidden_states=embedded(pipeline, text)[None],
                img_shapes=[[(1, height // 2, width // 2), *((1, z.shape[-2] // 2, z.shape[-1] // 2) for z in others)]],
                return_dict=False,
            )[0][:, :tokens]
        losses.append((v - packed_of(noise - x0)).square().mean().item())
    return sum(losses) / 2


def packed_of(latents: torch.Tensor) -> torch.Tensor:
    channels, _, height, width = latents.shape[1:]
    return diffusers.QwenImageEditPlusPipeline._pack_latents(latents, 1, channels, height, width)


def latents_of(pipeline, picture) -> torch.Tensor:
    """(1, channels, 1, h, w) of uint8 (1, H, W, 3)."""
    scaled = torch.from_numpy(picture).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        return pipeline._encode_vae_image(scaled, generator=None)


KILLED = """
import actors.encoders
actors.encoders.COMMIT_EVERY_S = 0
from jobs import extract
extract.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_encoders_and_kills_at_random_give_the_same_bytes(cluster, folder, model, run):
    """Of 60 rows of one size with a text each, and what dropout tells. Killed three times, the job does not begin anew."""
    rows = [{"source_image": f"p{i}.png", "target_image": "out.png", "instruction": f"warm {i}"} for i in range(60)]
    for i in range(60):
        (folder / "data" / f"p{i}.png").write_bytes(png(i, 48, 48))
    write_rows(folder, rows)
    caches = {name: folder / name for name in ("one", "two", "killed")}
    for count, name in enumerate(("one", "two"), start=1):
        run(extract, of_rows(folder, model, data__cache=caches[name], preprocess__encoders=count))
    expected = rows_in(caches["one"])
    assert len(expected) == 60 * 3 + 1 and rows_in(caches["two"]) == expected

    address, chance = ray.get_runtime_context().gcs_address, random.Random(os.getpid())
    given = of_rows(folder, model, data__cache=caches["killed"], preprocess__encoders=2, cluster__address=address)
    done = 0
    for _ in range(3):
        with (folder / "log.txt").open("a") as log:
            process = subprocess.Popen([sys.executable, "-c", KILLED, *given], stdout=log, stderr=subprocess.STDOUT)
        try:
            while len(rows_in(caches["killed"])) <= done and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.random() / 4)
        finally:
            process.kill()
        process.wait(30)
        found = len(rows_in(caches["killed"]))
        assert found > done, (folder / "log.txt").read_text()[-3000:]
        done = found
    said = run(extract, of_rows(folder, model, data__cache=caches["killed"]))
    if done < len(expected):
        assert f"/{len(expected) - done} rows" in said, "only what is missing is encoded"
    assert rows_in(caches["killed"]) == expected


def test_what_is_written_is_a_data_set_of_jobs_train(folder, model):
    write_rows(folder, ROWS)
    recipe = recipe_of(of_rows(folder, model))
    (folder / "tasks" / "a").mkdir(parents=True)
    lines = extract.examples_of(recipe.extract, folder / "data", range(4)).lines
    extract.put(folder / "tasks" / "a", "".join(json.dumps(line) + "\n" for line in lines), "")
    alone = extract.alone(recipe, folder / "tasks", folder / "data")
    found = read_example_sets(alone, ("target",), partial(checks.in_threads, str)).training
    assert tasks_of(found, folder / "tasks") == ["a"] * 7
    assert [len(prompt.sources) for prompt in found.prompts()] == [1, 1, 1, 1, 2, 2, 0]
