"""The condition cache: exact bytes, nothing twice, safe against crashes, damage and foreign files."""

import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rlhf.data import cache
from rlhf.data.cache import CacheError, ConditionCache, commit, read_manifest, write_part
from rlhf.types import Prompt


def prompt(text: str, source: str) -> Prompt:
    return Prompt(image_id="1", instruction="", image="", height=16, width=16, text_key=text, source_key=source)


def text_row(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(6, 8, generator=g).bfloat16(),
        "pooled_prompt_embeds": torch.randn(8, generator=g).bfloat16(),
    }


def source_row(seed: int, size: int = 4) -> dict[str, torch.Tensor]:
    return {"source_latents": torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed)).bfloat16()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Texts a, b and sources x, y in two files."""
    folder = tmp_path / "cache"
    texts = write_part(folder, [("a", text_row(0), 0.25), ("b", text_row(1), None)])
    sources = write_part(folder, [("x", source_row(2), None), ("y", source_row(3), None)])
    commit(folder, [texts, sources])
    return folder


def test_conditions_come_back_exactly_and_stacked(folder):
    condition = ConditionCache(folder).condition([prompt("a", "y"), prompt("b", "x"), prompt("a", "y")])
    assert set(condition) == {"prompt_embeds", "pooled_prompt_embeds", "source_latents"}
    for name, rows in {
        "prompt_embeds": [text_row(0), text_row(1), text_row(0)],
        "pooled_prompt_embeds": [text_row(0), text_row(1), text_row(0)],
        "source_latents": [source_row(3), source_row(2), source_row(3)],
    }.items():
        want = torch.stack([row[name] for row in rows])
        assert condition[name].dtype == torch.bfloat16 and torch.equal(condition[name], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_every_bit_pattern_survives(tmp_path, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    tensor = torch.cat([bits, bits, bits, bits]).view(dtype)  # NaNs, infinities, subnormals and −0 included
    scalar = {"one": torch.tensor(3, dtype=dtype)}
    commit(tmp_path, [write_part(tmp_path, [("t", {"values": tensor}, None), ("s", scalar, None)])])
    back = ConditionCache(tmp_path).condition([prompt("t", "s")])
    assert back["values"].dtype == dtype and back["values"].shape == (1, *tensor.shape)
    assert torch.equal(back["values"][0].view(torch.int16), tensor.view(torch.int16))
    assert back["one"].tolist() == [3]


def test_what_is_returned_may_be_written_to_without_touching_the_cache(folder):
    reader = ConditionCache(folder)
    reader.condition([prompt("a", "x")])["prompt_embeds"].zero_()
    assert torch.equal(reader.condition([prompt("a", "x")])["prompt_embeds"][0], text_row(0)["prompt_embeds"])


def test_an_unsupported_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="values of row t is complex64; the cache keeps bfloat16"):
        write_part(tmp_path, [("t", {"values": torch.zeros(1, dtype=torch.complex64)}, None)])
    assert list(tmp_path.iterdir()) == []


def test_rows_of_two_geometries_do_not_stack(folder):
    commit(folder, [write_part(folder, [("wide", source_row(5, size=6), None)])])
    with pytest.raises(ValueError, match=r"source_latents cannot be stacked.*batch prompts of one geometry"):
        ConditionCache(folder).condition([prompt("a", "x"), prompt("a", "wide")])


def test_a_row_that_is_not_there(folder):
    with pytest.raises(CacheError, match=r"row z is not in the cache .*; start again"):
        ConditionCache(folder).condition([prompt("a", "z")])


def test_a_reader_sees_what_is_committed_after_it_started(folder):
    reader = ConditionCache(folder)
    reader.condition([prompt("a", "x")])
    commit(folder, [write_part(folder, [("z", source_row(9), None)])])
    assert torch.equal(reader.condition([prompt("a", "z")])["source_latents"][0], source_row(9)["source_latents"])


def test_a_crash_before_the_manifest_leaves_a_usable_cache(folder):
    write_part(folder, [("z", source_row(9), None)])
    (folder / ".part-half").write_bytes(b"ARROW1")
    assert set(read_manifest(folder).places) == {"a", "b", "x", "y"}
    ConditionCache(folder).condition([prompt("a", "x"), prompt("b", "y")])


def test_a_crash_while_the_manifest_is_written_keeps_the_old_one(folder, monkeypatch):
    before = (folder / "manifest.json").read_bytes()
    part = write_part(folder, [("z", source_row(9), None)])
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        commit(folder, [part])
    assert (folder / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    assert set(commit(folder, [part]).places) == {"a", "b", "x", "y", "z"}


def test_writing_the_same_rows_again_makes_no_second_file(folder):
    before = sorted(folder.iterdir())
    commit(folder, [write_part(folder, [("a", text_row(0), 0.25), ("b", text_row(1), None)])])
    assert sorted(folder.iterdir()) == before


def test_the_unknown_share_is_kept(folder):
    places = read_manifest(folder).places
    assert places["a"].unknown == 0.25 and places["b"].unknown is None


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_rows_of_a_damaged_file_are_missing_and_the_others_are_not(folder, damage):
    file = folder / read_manifest(folder).places["x"].file
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    assert set(read_manifest(folder).places) == {"a", "b"}
    with pytest.raises(CacheError, match="row x is not in the cache"):
        ConditionCache(folder).condition([prompt("a", "x")])
    commit(folder, [write_part(folder, [("x", source_row(2), None), ("y", source_row(3), None)])])
    ConditionCache(folder).condition([prompt("a", "x")])


def test_a_file_cut_short_after_the_manifest_was_read(folder):
    reader = ConditionCache(folder)
    reader.condition([prompt("a", "x")])
    fresh = ConditionCache(folder)
    fresh._manifest = read_manifest(folder)
    file = folder / read_manifest(folder).places["x"].file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"part-.*\.arrow has \d+ bytes, not \d+; delete it and start again"):
        fresh.condition([prompt("a", "x")])


def test_every_flipped_byte_of_a_row_is_an_error_or_harmless(folder):
    """A flipped byte is found, or lies in padding and changes nothing."""
    path = folder / read_manifest(folder).places["x"].file
    good = path.read_bytes()
    found = 0
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            condition = ConditionCache(folder).condition([prompt("a", "x")])
        except CacheError as error:
            assert "delete it and start again" in str(error)
            found += 1
        else:
            assert torch.equal(condition["source_latents"][0], source_row(2)["source_latents"])
    assert found > 20
    path.write_bytes(good)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', '{"format": 1, "files": {}, "rows": {"a": [1]}}'])
def test_a_damaged_manifest_is_a_clear_error(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json is damaged .*; delete it and start again"):
        read_manifest(folder)


def test_a_manifest_of_another_format_is_refused(folder):
    document = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"has format 99, not 1; use another data.cache"):
        read_manifest(folder)


class Tagged(pa.ExtensionType):
    def __init__(self):
        super().__init__(pa.large_binary(), "tests.tagged")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        raise AssertionError("an extension type from a file was made")


@pytest.mark.parametrize("foreign", ["extension type", "extension metadata", "another column"])
def test_files_of_another_schema_are_refused(folder, foreign):
    fields = list(cache.SCHEMA)
    fields[4] = {
        "extension type": pa.field("data", Tagged()),
        "extension metadata": fields[4].with_metadata(
            {b"ARROW:extension:name": b"x", b"ARROW:extension:metadata": b""}
        ),
        "another column": pa.field("data", pa.binary()),
    }[foreign]
    path = folder / read_manifest(folder).places["x"].file
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema(fields)):
        pass
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][path.name] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match="does not have the cache's schema"):
        ConditionCache(folder).condition([prompt("a", "x")])


def test_files_are_let_go(tmp_path):
    for i in range(10):
        commit(tmp_path, [write_part(tmp_path, [(f"t{i}", text_row(i), None), (f"s{i}", source_row(i), None)])])
    reader = ConditionCache(tmp_path, open_files=3)
    for _ in range(2):
        for i in range(10):
            condition = reader.condition([prompt(f"t{i}", f"s{i}")])
            assert torch.equal(condition["source_latents"][0], source_row(i)["source_latents"])
            assert len(reader._files) <= 3


def test_a_read_touches_only_its_rows(tmp_path):
    """Reading one small row beside a large one does not bring the large one into memory."""
    large = {"values": torch.ones(100_000_000, dtype=torch.bfloat16)}
    commit(tmp_path, [write_part(tmp_path, [("l", large, None), ("a", text_row(0), None), ("x", source_row(1), None)])])
    del large
    process = multiprocessing.get_context("spawn").Pool(1)
    with process:
        assert process.apply(_peak_of_a_read, (str(tmp_path),)) < 50_000_000


def _peak_of_a_read(folder: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ConditionCache(folder).condition([prompt("a", "x")])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _commit_rows(folder: str, worker: int) -> None:
    for i in range(10):
        commit(folder, [write_part(folder, [(f"{worker}-{i}", source_row(100 * worker + i), None)])])


def test_two_writers_at_once_lose_nothing(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_commit_rows, [(str(tmp_path), 0), (str(tmp_path), 1)])
    assert set(read_manifest(tmp_path).places) == {f"{w}-{i}" for w in range(2) for i in range(10)}


def test_the_folder_can_be_moved(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    ConditionCache(tmp_path / "moved").condition([prompt("a", "x")])


def test_keys_depend_on_everything_that_goes_in():
    base = dict(content="c", height=32, width=16, fit="crop", fingerprint="f")
    changes = [{}, {"content": "d"}, {"height": 16}, {"width": 32}, {"height": 16, "width": 32}, {"fit": "pad"}]
    keys = {cache.source_key(**{**base, **change}) for change in [*changes, {"fingerprint": "g"}]}
    keys |= {cache.text_key("c", "f"), cache.text_key("d", "f"), cache.text_key("c", "g"), cache.text_key("cf", "")}
    assert len(keys) == 11 and all(len(key) == 32 for key in keys)
