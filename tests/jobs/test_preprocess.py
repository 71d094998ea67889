"""What counts as missing, sizes, and the job's dry run; no Ray is started here."""

import shutil
import sys

import pytest
import ray
from PIL import Image

from jobs import preprocess as job
from jobs.preprocess import missing, prompts_of, read_data
from rlhf.data.cache import Manifest, Place, read_manifest
from rlhf.data.records import BadInput
from rlhf.tables import OnlineDPOConfig
from tests.rlhf.data import photos


@pytest.fixture
def config(tmp_path, kontext) -> OnlineDPOConfig:
    return OnlineDPOConfig(
        model={"path": str(kontext), "height": 48, "width": 32},
        data={"path": str(photos.write(tmp_path / "data")), "cache": str(tmp_path / "cache")},
        reward={"type": "hps"},
        judges={"hps": {"path": "unused"}, "filter": {"enabled": False}},
    )


def change(config: OnlineDPOConfig, section: str, **values) -> OnlineDPOConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def misses(config: OnlineDPOConfig, manifest: Manifest) -> tuple[int, int]:
    rows = read_data(config).all
    texts, sources = missing(config, rows, prompts_of(config, rows), manifest)
    return len(texts), len(sources)


@pytest.fixture
def full(config) -> Manifest:
    """A manifest in which everything of `config` is present."""
    place = Place(file="", first=0, names=(), checksum="")
    prompts = prompts_of(config, read_data(config).all)
    return Manifest(files={}, places={key: place for p in prompts for key in (p.text_key, p.source_key)})


def test_nothing_changed_is_no_miss_and_an_empty_cache_misses_all(config, full):
    assert misses(config, full) == (0, 0)
    assert misses(config, read_manifest(config.data.cache)) == (3, 3)


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
    assert misses(change(config, "trainer", mixed_precision="no"), full) == (3, 3)


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
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert misses(change(config, "model", path=str(copy)), full) == expected


def test_equal_instructions_and_pictures_count_once(config, tmp_path):
    row = {"prompt": "same", "image": "images/0.png"}
    photos.write_rows(tmp_path / "data", [{**row, "image_id": str(i)} for i in range(3)])
    assert misses(config, read_manifest(config.data.cache)) == (1, 1)


def test_auto_size_is_chosen_per_picture(config, tmp_path):
    photos.write(tmp_path / "wide", size=(30, 90))
    both = change(change(config, "model", size="auto"), "eval", path=str(tmp_path / "wide/train_metadata.jsonl"))
    sizes = [(p.height, p.width) for p in prompts_of(both, read_data(both).all)]
    assert sizes == [(1104, 944)] * 3 + [(672, 1568)] * 3 or sizes == [(1184, 880)] * 3 + [(672, 1568)] * 3


def test_training_and_evaluation_problems_come_together(config, tmp_path):
    photos.write(tmp_path / "eval")
    photos.write_rows(tmp_path / "eval", ["{"])
    (tmp_path / "data/images/2.png").unlink()
    with pytest.raises(BadInput) as caught:
        read_data(change(config, "eval", path=str(tmp_path / "eval/train_metadata.jsonl")))
    assert len(caught.value.problems) == 2


def test_dry_run_starts_nothing_and_says_what_is_missing(config, monkeypatch, capsys):
    argv = ["--model.path", config.model.path, "--data.path", config.data.path, "--data.cache", config.data.cache]
    more = ["--reward.type", "hps", "--judges.hps.path", "x", "--judges.filter.enabled", "false", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["preprocess", *argv, *more])
    before = ray.is_initialized()
    job.main()
    out = capsys.readouterr().out
    assert "3 prompts; to encode: 3 instructions, 3 pictures" in out and '[model]\nfamily = "flux_kontext"' in out
    assert ray.is_initialized() == before and not read_manifest(config.data.cache).files
