"""What counts as missing, sizes, and the job's dry run; no Ray is started here."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import ray
from PIL import Image

from jobs import preprocess as job
from jobs.demo.__main__ import lay_out
from jobs.encoding import missing, warn_of_unread
from jobs.preprocess import cache_place, read_data, wanted_encodings
from jobs.recipes import OnlineDPORecipe
from rlhf.data.cache import Manifest, Place, read_manifest
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.types import Encoding
from tests.jobs.test_configs import FOLDER
from tests.rlhf.data import photos


@pytest.fixture
def config(tmp_path, kontext) -> OnlineDPORecipe:
    return OnlineDPORecipe(
        model={"path": str(kontext), "height": 48, "width": 32},
        data={"path": str(photos.write(tmp_path / "data")), "cache": str(tmp_path / "cache")},
        reward={"type": "hps"},
        judges={"hps": {"path": "unused"}, "filter": {"enabled": False}},
    )


def change(config: OnlineDPORecipe, section: str, **values) -> OnlineDPORecipe:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def wanted(config: OnlineDPORecipe) -> list[Encoding]:
    prompts = read_data(config.data, config.eval, config.model).all
    return wanted_encodings(config.model, config.sampling, prompts)


def misses(config: OnlineDPORecipe, manifest: Manifest) -> tuple[int, int]:
    """(texts, pictures) that the cache lacks."""
    todo = missing(cache_place(config.model, config.data.cache), wanted(config), manifest)
    texts = sum(not encoding.sources for encoding in todo.values())
    return texts, len(todo) - texts


@pytest.fixture
def full(config) -> Manifest:
    """A manifest in which everything of `config` is present."""
    place = Place(file="", first=0, names=(), checksum="")
    cache = cache_place(config.model, config.data.cache)
    return Manifest(files={}, places={cache.key(encoding): place for encoding in wanted(config)})


def test_nothing_changed_is_no_miss_and_an_empty_cache_misses_all(config, full):
    assert misses(config, full) == (0, 0)
    assert misses(config, read_manifest(config.data.cache)) == (3, 3)


def test_instructions_that_are_cut_or_unknown_are_told_once_with_counts(config, tmp_path):
    """From what the cache says of them, whether encoded now or long ago."""
    folder = tmp_path / "data"
    texts = ["short", "long", "long", "strange"]
    rows = [{"image_id": f"p{i}", "prompt": text, "image": "images/1.png"} for i, text in enumerate(texts)]
    photos.write_rows(folder, rows)
    prompts = read_data(config.data, config.eval, config.model).all
    family, cache = load_family(config.model), cache_place(config.model, config.data.cache)
    shares = {"short": (0.0, 0.0), "long": (0.0, 0.25), "strange": (0.5, 0.0)}
    places = {
        cache.key(family.encodings(prompt)[0]): Place(
            file="",
            first=0,
            names=(),
            checksum="",
            unknown=shares[prompt.instruction][0],
            cut=shares[prompt.instruction][1],
        )
        for prompt in prompts
    }
    said = []
    warn_of_unread(family, cache, Manifest(files={}, places=places), prompts, said.append)
    unknown, cut = said
    assert "10% or more of the tokens of 1 instructions (1 of 4 prompts)" in unknown
    assert unknown.endswith("\n   50% unknown: strange (prompt 'p3')")
    assert "cuts off the end of 1 instructions (2 of 4 prompts) that are longer than it reads" in cut
    assert cut.endswith("\n   25% cut off: long (prompt 'p1')")


def test_one_changed_picture_is_one_miss(config, full, tmp_path):
    Image.fromarray(photos.picture(50)).save(tmp_path / "data/images/1.png")
    assert misses(config, full) == (0, 1)


def test_one_changed_instruction_is_one_miss(config, full, tmp_path):
    path = tmp_path / "data/train_metadata.jsonl"
    path.write_text(path.read_text().replace("edit 1", "edit one"))
    assert misses(config, full) == (1, 0)


def test_another_name_or_place_of_the_same_content_is_no_miss(config, full, tmp_path):
    path = tmp_path / "data/train_metadata.jsonl"
    (tmp_path / "data/images/1.png").rename(tmp_path / "data/images/renamed.png")
    path.write_text(path.read_text().replace("images/1.png", "images/renamed.png").replace('"1"', '"one"'))
    assert misses(config, full) == (0, 0)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"width": 48}),
        ("model", {"size": "auto"}),
        ("data", {"fit": "pad"}),
        ("data", {"fit": "stretch"}),
    ],
)
def test_another_size_or_fit_misses_pictures_only(config, full, section, values):
    assert misses(change(config, section, **values), full) == (0, 3)


def test_another_dtype_misses_all(config, full):
    assert misses(change(config, "model", dtype="float32"), full) == (3, 3)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("vae", (0, 3)),
        ("text_encoder", (3, 0)),
        ("text_encoder_2", (3, 0)),
        ("tokenizer_2", (3, 0)),
        ("transformer", (0, 0)),
    ],
)
def test_another_encoder_misses_what_it_encoded(config, full, tmp_path, folder, expected):
    copy = tmp_path / "model"
    shutil.copytree(config.model.path, copy)
    assert misses(change(config, "model", path=str(copy)), full) == (0, 0)
    file = max((copy / folder).iterdir(), key=lambda file: file.stat().st_size)
    content = file.read_bytes()  # JSON stays JSON
    file.write_bytes(content + b" " if file.suffix == ".json" else content[:-1] + b"\x7f")
    assert misses(change(config, "model", path=str(copy)), full) == expected


def test_equal_instructions_and_pictures_count_once(config, tmp_path):
    row = {"prompt": "same", "image": "images/0.png"}
    photos.write_rows(tmp_path / "data", [{**row, "image_id": str(i)} for i in range(3)])
    assert misses(config, read_manifest(config.data.cache)) == (1, 1)


def test_guidance_with_two_branches_misses_the_unguided_text_too(config, tmp_path):
    """Once for all prompts, and only where the scale asks for it."""
    model = write_stable_diffusion(tmp_path / "sd")
    texts = change(config, "model", family="stable_diffusion", path=str(model), height=64, width=64)
    nothing = read_manifest(config.data.cache)
    assert misses(texts, nothing) == (3 + 1, 0)
    assert misses(change(texts, "model", guidance_scale=1.0), nothing) == (3, 0)


def test_auto_size_is_chosen_per_picture(config, tmp_path):
    photos.write(tmp_path / "wide", size=(30, 90))
    both = change(change(config, "model", size="auto"), "eval", path=str(tmp_path / "wide/train_metadata.jsonl"))
    prompts = read_data(both.data, both.eval, both.model).all
    sizes = [(prompt.geometry.height, prompt.geometry.width) for prompt in prompts]
    assert sizes == [(1104, 944)] * 3 + [(672, 1568)] * 3 or sizes == [(1184, 880)] * 3 + [(672, 1568)] * 3


def test_training_and_evaluation_problems_come_together(config, tmp_path):
    photos.write(tmp_path / "eval")
    photos.write_rows(tmp_path / "eval", ["{"])
    (tmp_path / "data/images/2.png").unlink()
    both = change(config, "eval", path=str(tmp_path / "eval/train_metadata.jsonl"))
    with pytest.raises(BadInput) as caught:
        read_data(both.data, both.eval, both.model)
    assert len(caught.value.problems) == 2


def test_prompts_that_are_trained_on_are_not_held_out(config, tmp_path):
    """By instruction and pixels: neither the name of a file nor an id makes another prompt."""
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    shutil.copytree(tmp_path / "data/images", tmp_path / "data/held_out")
    for index, row in enumerate(rows):
        row |= {"image_id": f"e{index}", "image": row["image"].replace("images", "held_out")}
    rows[0]["prompt"] = "another edit of a photo that is trained on"
    held_out = tmp_path / "data/eval.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows)))
    both = change(config, "eval", path=str(held_out))
    with pytest.raises(Refused, match=r"2 of 3 prompts of eval\.path = '.*eval\.jsonl' are in data\.path = .* too"):
        read_data(both.data, both.eval, both.model)
    held_out.write_text(json.dumps(rows[0]))
    assert len(read_data(both.data, both.eval, both.model).held_out) == 1


def test_a_video_is_refused_of_a_model_of_pictures(config):
    video = change(config, "model", frames=5)
    with pytest.raises(Refused, match="5 frames: this model makes pictures"):
        read_data(video.data, video.eval, video.model)


def test_a_cache_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    there = change(config, "data", cache=str(tmp_path / "file/cache"))
    with pytest.raises(Refused, match=r"data\.cache: the folder .*/file/cache cannot be made: .*/file is a file"):
        read_data(there.data, there.eval, there.model)


def test_dry_run_starts_nothing_and_says_what_is_missing(config, monkeypatch, capsys):
    argv = ["--model.path", config.model.path, "--data.path", config.data.path, "--data.cache", config.data.cache]
    more = ["--reward.type", "hps", "--judges.hps.path", "x", "--judges.filter.enabled", "false", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["preprocess", *argv, *more])
    before = ray.is_initialized()
    job.main()
    out = capsys.readouterr().out
    assert "3 prompts; to encode: 3 texts, 3 pictures" in out and '[model]\nfamily = "flux_kontext"' in out
    assert ray.is_initialized() == before and not read_manifest(config.data.cache).files


def test_a_recipe_of_the_other_kind_is_told_and_so_is_a_misspelt_kind(tmp_path, monkeypatch, kontext):
    train = FOLDER / "sft_demo.toml", "It is a recipe of jobs.train: python -m jobs.preprocess train --config"
    online = FOLDER / "demo.toml", "It is a recipe of jobs.online_dpo: python -m jobs.preprocess --config"
    for kind, (file, says) in (([], train), (["train"], online)):
        monkeypatch.setattr(sys, "argv", ["preprocess", *kind, "--config", str(file)])
        with pytest.raises(Refused, match=says):
            job.main()
    monkeypatch.setattr(sys, "argv", ["preprocess", "trian", "--config", str(train[0])])
    with pytest.raises(Refused, match="'trian': give train for a recipe"):
        job.main()
    monkeypatch.setattr(sys, "argv", ["preprocess", "train", "--model.pth", "x"])
    with pytest.raises(Refused, match="pth = 'x': unknown key; did you mean") as refused:
        job.main()
    assert "It is a recipe" not in str(refused.value)


def test_a_train_recipe_s_cache_is_filled_ahead_of_time(cluster, tmp_path, monkeypatch, capsys):
    """The twenty pairs of the demo, each as it is and mirrored: a caption, and 20 × 2 sources and targets."""
    lay_out(tmp_path / "world")
    paths = {"model.path": "world/kontext", "data.path": "world/edits", "data.cache": "cache"}
    given = [f"--{key}={tmp_path / path}" for key, path in paths.items()]
    arguments = ["preprocess", "train", "--config", str(FOLDER / "sft_demo.toml"), *given]

    def said(*more):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        job.main()
        return capsys.readouterr().out

    assert "; to encode: 1 texts, 80 pictures" in said("--dry-run")
    assert "preprocess: 81/81 rows" in said()
    assert "to encode: 0 texts, 0 pictures" in said("--dry-run")
    assert "preprocess: all captions and pictures are in" in said()
