"""Encoding on a real Ray: the cache it makes, what a second run does, and how it fails."""

import io
import logging
import pickle
import threading
import time
from pathlib import Path

import jobs  # isort: skip  (first: it makes settings that Ray reads when it is imported)  # noqa: F401
import numpy as np
import pytest
import torch
from PIL import Image

from actors.encoders import CallEncoder, encode, load, load_codec, plan
from actors.streaming import PreprocessFailed, StreamBroken
from jobs.encoding import missing
from jobs.preprocess import cache_place, preprocess, read_data, wanted_encodings
from jobs.recipes import OnlineDPORecipe
from rlhf.data.cache import commit, read_manifest
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.types import Encoding, Geometry, Source
from tests.encoded import media_of
from tests.processes import ray_processes
from tests.rlhf.data import photos

slow = pytest.mark.slow
ENCODER = "MapWorker(Map(Encoder"


@pytest.fixture
def config(tmp_path, kontext) -> OnlineDPORecipe:
    return OnlineDPORecipe(
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


def prompts_of(config: OnlineDPORecipe):
    return read_data(config.data, config.eval, config.model).all


def preprocessed(config: OnlineDPORecipe, prompts, log):
    return preprocess(config.model, config.sampling, config.preprocess, config.data.cache, prompts, log)


def todo_of(config: OnlineDPORecipe) -> dict[str, Encoding]:
    wanted = wanted_encodings(config.model, config.sampling, prompts_of(config))
    return missing(cache_place(config.model, config.data.cache), wanted, read_manifest(config.data.cache))


def change(config: OnlineDPORecipe, section: str, **values) -> OnlineDPORecipe:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def assert_rows(cache, codec, batch) -> None:
    """The cache's rows of encodings are what the codec makes of them in this batch, bit by bit."""
    made = codec.encode(batch, [media_of(encoding) for encoding in batch])
    for encoding, row in zip(batch, made, strict=True):
        kept = cache.row(encoding)
        assert kept.keys() == row.tensors.keys()
        for name, tensor in row.tensors.items():
            assert kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor), (encoding, name)


@pytest.fixture
def one_thread():
    """As Ray's actors have, so that this process sums in their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@slow
def test_preprocess_fills_the_cache_with_what_it_lacks_and_nothing_else(cluster, config, ray_data_log, one_thread):
    folder = Path(config.data.path).parent
    texts = ["brighter"] * 4 + ["更亮"]
    photos.write_rows(
        folder, [{"image_id": str(i), "prompt": text, "image": f"images/{i}.png"} for i, text in enumerate(texts)]
    )
    (folder / "images/3.png").write_bytes((folder / "images/2.png").read_bytes())
    prompts, said = prompts_of(config), []
    cache = preprocessed(config, prompts, said.append)
    assert [prompt.key for prompt in prompts] == ["0", "1", "2", "3", "4"]
    assert said[0] == "preprocess: encoding 2 texts and 4 pictures"  # equal texts and pictures once
    assert any(line.startswith("preprocess: 6/6 rows") for line in said)
    assert "1 instructions (1 of 5 prompts)" in said[-1] and said[-1].endswith("  100% unknown: 更亮 (prompt '4')")
    assert len(read_manifest(config.data.cache).places) == 6

    family, codec = load_family(config.model), load_codec(config.model, config.preprocess)
    rows = [family.encodings(prompt) for prompt in prompts]
    shapes = {name: tuple(tensor.shape) for encoding in rows[0] for name, tensor in cache.row(encoding).items()}
    assert shapes == {"prompt_embeds": (24, 32), "pooled_prompt_embeds": (32,), "latents": (4, 6, 4)}
    assert cache.row(rows[0][0])["prompt_embeds"].dtype == torch.bfloat16
    assert_rows(cache, codec, [rows[0][0], rows[4][0]])
    for first, second in ((0, 1), (2, 4)):
        assert_rows(cache, codec, [rows[first][1], rows[second][1]])
    assert cache.key(rows[2][1]) == cache.key(rows[3][1])

    before = {file.name: file.stat().st_mtime_ns for file in Path(config.data.cache).iterdir()}
    said.clear()
    assert preprocessed(config, prompts, said.append).key(rows[1][1]) == cache.key(rows[1][1])
    assert said[0] == f"preprocess: all 5 prompts are in {config.data.cache}" and "100% unknown" in said[1]
    assert {file.name: file.stat().st_mtime_ns for file in Path(config.data.cache).iterdir()} == before

    # One changed picture is encoded alone, to the bytes that it has at its place in the company of others.
    Image.fromarray(photos.picture(77)).save(folder / "images/1.png")
    said.clear()
    changed = [family.encodings(prompt) for prompt in prompts_of(config)]
    preprocessed(config, prompts_of(config), said.append)
    assert said[0] == "preprocess: encoding 0 texts and 1 pictures"
    same = [cache.key(old[1]) == cache.key(new[1]) for old, new in zip(rows, changed, strict=True)]
    assert same == [1, 0, 1, 1, 1]
    together = codec.encode([changed[1][1], rows[4][1]], [media_of(changed[1][1]), media_of(rows[4][1])])
    assert torch.equal(cache.row(changed[1][1])["latents"], together[0].tensors["latents"])
    assert ray_data_log.getvalue() == ""


@slow
def test_a_picture_that_changes_under_way_stops_it_with_its_name(cluster, config):
    todo, prompts = todo_of(config), prompts_of(config)
    Image.fromarray(photos.picture(78)).save(prompts[4].sources[0].path)
    with pytest.raises(
        PreprocessFailed, match=r"preprocess failed: .*4\.png changed since it was checked; start the job again"
    ):
        encode(config.model, config.preprocess, config.data.cache, todo, lambda line: None)
    kept = read_manifest(config.data.cache).places
    cache = cache_place(config.model, config.data.cache)
    assert cache.key(load_family(config.model).encodings(prompts[4])[1]) not in kept


@slow
def test_an_encoder_that_dies_is_replaced(cluster, config):
    said, earlier = [], {process.pid for process in ray_processes(ENCODER)}

    def kill():
        while not (encoders := [process for process in ray_processes(ENCODER) if process.pid not in earlier]):
            time.sleep(0.05)
        encoders[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    todo = todo_of(config)
    encode(config.model, config.preprocess, config.data.cache, todo, said.append)
    thread.join()
    assert todo.keys() <= read_manifest(config.data.cache).places.keys()
    assert said[1] == "preprocess: an encoder was lost (ActorDiedError); going on with what is missing"


@slow
def test_an_encoder_that_fails_is_no_fault_of_the_input(cluster, config):
    """A kind that the codec has not stands for any defect in a worker."""
    with pytest.raises(StreamBroken, match=r"(?s)preprocess failed: .*KeyError: .nothing"):
        wanted = {"key": Encoding(kind="nothing", text="")}
        encode(config.model, config.preprocess, config.data.cache, wanted, lambda line: None)


@slow
def test_the_deadline_holds_when_the_cluster_has_nothing_free(cluster, config):
    greedy = change(config, "preprocess", num_cpus=50.0, timeout_s=8.0)
    with pytest.raises(PreprocessFailed, match=r"not finished after preprocess.timeout_s = 8 s.* CPUs free"):
        preprocessed(greedy, prompts_of(config), lambda line: None)
    assert not [thread for thread in threading.enumerate() if thread.name == "preprocess"]  # Ray Data was stopped too


def test_a_picture_of_each_size_goes_into_items_of_its_own():
    encodings = [Encoding(kind="text", text=str(i)) for i in range(5)]
    for i in range(9):
        geometry = Geometry(height=16 * (1 + i % 2), width=16)
        encodings.append(
            Encoding(
                kind="picture", sources=(Source(path="", content=str(i), height=48, width=32),), geometries=(geometry,)
            )
        )
    wanted = {f"key of {encoding}": encoding for encoding in encodings}
    work = plan(wanted, batch_size=2, encoders=1)
    assert sorted(key for part in work for key in part.values()) == sorted(wanted)
    assert [encoding.text for part in work for encoding in part if not encoding.sources] == list("01234")
    for part in work:
        assert all(wanted[key] == encoding for encoding, key in part.items())
        assert len({(encoding.kind, encoding.geometries) for encoding in part}) == 1


def test_loading_gives_the_fitted_pixels(config):
    pictures = [encoding for encoding in todo_of(config).values() if encoding.sources][:2]
    [part] = plan({str(i): encoding for i, encoding in enumerate(pictures)}, batch_size=2, encoders=1)
    loaded = load({"work": pickle.dumps(part)})
    want = [photos.load(encoding.sources[0].path, 48, 32, "crop") for encoding in pictures]
    assert np.array_equal(pickle.loads(loaded["media"]), np.array(want)[:, None, None]) and not loaded["error"]


@slow
def test_files_that_landed_on_another_node_are_missed_at_once(cluster, config, monkeypatch):
    def elsewhere(folder, parts):
        commit(folder, parts)
        for file in (file for part in parts for file in part.files):
            (Path(folder) / file).unlink()

    monkeypatch.setattr("actors.encoders.commit", elsewhere)
    with pytest.raises(PreprocessFailed, match=r"10 encoded rows are not in data.cache = .*shared folder"):
        preprocessed(config, prompts_of(config), str)


def test_on_call_the_rows_are_those_of_the_cache_and_a_changed_picture_is_refused(config):
    """In this process: the actor of a feed is this class."""
    encodings = [encoding for encoding in todo_of(config).values() if encoding.sources]
    encoder = CallEncoder(config.model, config.preprocess, blocks_held=1)
    count, rows = encoder.encode(encodings)
    assert count == len(rows) == 5 and rows.keys() == set(encodings)
    codec = load_codec(config.model, config.preprocess)
    made = codec.encode(encodings[:2], [media_of(encoding) for encoding in encodings[:2]])
    for encoding, row in zip(encodings, made, strict=False):
        assert torch.equal(torch.from_numpy(rows[encoding]["latents"]), row.tensors["latents"].float())
    Image.fromarray(photos.picture(79)).save(encodings[0].sources[0].path)
    with pytest.raises(Refused, match=r"0\.png changed since it was checked"):
        encoder.encode(encodings[:1])
