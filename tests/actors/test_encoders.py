"""Encoding on a real Ray: the cache it makes, what a second run does, and how it fails."""

import io
import json
import logging
import threading
from pathlib import Path

import jobs  # isort: skip  (first: it makes settings that Ray reads when it is imported)  # noqa: F401
import pytest
import torch
from PIL import Image

from actors.encoders import Encoder, encode, plan
from actors.loading import Picture, Text, load
from actors.streaming import PreprocessFailed
from jobs.preprocess import missing, preprocess, prompts_of
from rlhf.data.cache import ConditionCache, commit, read_manifest
from rlhf.data.media import load_image
from rlhf.data.prompts import read_rows
from rlhf.tables import OnlineDPOConfig
from tests.rlhf.data import photos

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, kontext) -> OnlineDPOConfig:
    return OnlineDPOConfig(
        model={"path": str(kontext), "height": 48, "width": 32},
        data={"path": str(photos.write(tmp_path / "data", 5)), "cache": str(tmp_path / "cache")},
        reward={"type": "hps"},
        judges={"hps": {"path": "unused"}, "filter": {"enabled": False}},
        preprocess={"batch_size": 2, "num_cpus": 0.3, "timeout_s": 240},
    )


@pytest.fixture
def ray_data_log():
    """What Ray Data's loggers say: nothing, the progress lines are ours."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("ray.data").addHandler(handler)
    yield stream
    logging.getLogger("ray.data").removeHandler(handler)


def rows_of(config: OnlineDPOConfig):
    return read_rows(config.data.path).rows


def change(config: OnlineDPOConfig, section: str, **values) -> OnlineDPOConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_preprocess_fills_the_cache_with_what_it_lacks_and_nothing_else(cluster, config, ray_data_log):
    folder = Path(config.data.path).parent
    texts = ["brighter"] * 4 + ["更亮"]
    photos.write_rows(
        folder, [{"image_id": str(i), "prompt": text, "image": f"images/{i}.png"} for i, text in enumerate(texts)]
    )
    (folder / "images/3.png").write_bytes((folder / "images/2.png").read_bytes())
    rows, said = rows_of(config), []
    prompts = preprocess(config, rows, said.append)
    assert [p.image_id for p in prompts] == ["0", "1", "2", "3", "4"]
    assert said[0] == "preprocess: encoding 2 instructions and 4 pictures"  # equal texts and pictures once
    assert any(line.startswith("preprocess: 6/6 rows") for line in said)
    assert "1 instructions (1 of 5 prompts)" in said[-1] and said[-1].endswith("  100% unknown: 更亮")
    manifest = read_manifest(config.data.cache)
    assert len(manifest.places) == 6

    condition = ConditionCache(config.data.cache).condition(prompts)
    assert {name: tuple(tensor.shape) for name, tensor in condition.items()} == {
        "prompt_embeds": (5, 24, 32),
        "pooled_prompt_embeds": (5, 32),
        "source_latents": (5, 4, 6, 4),
    }
    encoder = Encoder(config)
    pixels = [torch.from_numpy(load_image(row.image, 48, 32, "crop")) for row in rows]
    for start in (0, 1, 2, 3):
        want = encoder.codec.encode_source(torch.stack(pixels[start : start + 2]))["source_latents"]
        assert torch.equal(condition["source_latents"][start : start + 2], want)
    want = encoder.codec.encode_text(["brighter", "更亮"])
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert condition[name].dtype == torch.bfloat16
        assert torch.equal(condition[name][[0, 4]], want[name])

    before = {file.name: file.stat().st_mtime_ns for file in Path(config.data.cache).iterdir()}
    said.clear()
    assert preprocess(config, rows, said.append) == prompts
    assert said[0] == f"preprocess: all 5 prompts are in {config.data.cache}" and "100% unknown" in said[1]
    assert {file.name: file.stat().st_mtime_ns for file in Path(config.data.cache).iterdir()} == before

    # One changed picture is encoded alone, to the bytes that it has in the company of others.
    Image.fromarray(photos.picture(77)).save(folder / "images/1.png")
    said.clear()
    changed = preprocess(config, rows_of(config), said.append)
    assert said[0] == "preprocess: encoding 0 instructions and 1 pictures"
    assert [old.source_key == new.source_key for old, new in zip(prompts, changed, strict=True)] == [1, 0, 1, 1, 1]
    pixels[1] = torch.from_numpy(load_image(rows[1].image, 48, 32, "crop"))
    want = encoder.codec.encode_source(torch.stack(pixels[:2]))["source_latents"]
    assert torch.equal(ConditionCache(config.data.cache).condition(changed)["source_latents"][:2], want)
    assert ray_data_log.getvalue() == ""


def test_a_picture_that_changes_under_way_stops_it_with_its_name(cluster, config):
    rows = rows_of(config)
    prompts = prompts_of(config, rows)
    texts, sources = missing(config, rows, prompts, read_manifest(config.data.cache))
    Image.fromarray(photos.picture(78)).save(rows[4].image)
    with pytest.raises(
        PreprocessFailed, match=r"preprocess failed: .*4\.png changed since it was checked; start the job again"
    ):
        encode(config, texts, sources, lambda line: None)
    kept = read_manifest(config.data.cache).places
    assert prompts[4].source_key not in kept


def test_the_deadline_holds_when_the_cluster_has_nothing_free(cluster, config):
    greedy = change(config, "preprocess", num_cpus=50.0, timeout_s=8.0)
    with pytest.raises(PreprocessFailed, match=r"not finished after preprocess.timeout_s = 8 s.* CPUs free"):
        preprocess(greedy, rows_of(config), lambda line: None)
    assert not [thread for thread in threading.enumerate() if thread.name == "preprocess"]  # Ray Data was stopped too


def test_a_picture_of_each_size_goes_into_items_of_its_own():
    texts = [Text(key=f"t{i}", instruction=str(i)) for i in range(5)]
    sources = [
        Picture(key=f"s{i}", role="source", place="", content="", height=16 * (1 + i % 2), width=16, fit="crop")
        for i in range(9)
    ]
    items = [json.loads(item) for item in plan(texts, sources, batch_size=2, encoders=1)]
    assert [row["key"] for item in items for row in item.get("texts", [])] == [t.key for t in texts]
    assert sorted(row["key"] for item in items for row in item.get("pictures", [])) == sorted(s.key for s in sources)
    for item in items:
        assert len({(row["height"], row["width"]) for row in item.get("pictures", [])}) <= 1


def test_loading_gives_the_fitted_pixels(config):
    rows = rows_of(config)
    prompts = prompts_of(config, rows)
    _, sources = missing(config, rows, prompts, read_manifest(config.data.cache))
    [item] = plan([], sources[:2], batch_size=2, encoders=1)
    want = b"".join(load_image(row.image, 48, 32, "crop").tobytes() for row in rows[:2])
    assert load({"item": item})["pixels"] == want


def test_files_that_landed_on_another_node_are_missed_at_once(cluster, config, monkeypatch):
    def elsewhere(folder, parts):
        commit(folder, parts)
        for part in parts:
            (Path(folder) / part.file).unlink()

    monkeypatch.setattr("actors.encoders.commit", elsewhere)
    with pytest.raises(PreprocessFailed, match=r"10 encoded rows are not in data.cache = .*shared folder"):
        preprocess(config, rows_of(config), str)
