"""The cache of encodings: exact bytes, nothing twice, safe against crashes, damage and foreign files."""

import json
import multiprocessing
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rlhf.data import cache
from rlhf.data.cache import CacheError, EncodingCache, Manifest, commit, read_manifest
from rlhf.types import Encoded, Encoding, Geometry, Source


def text(name: str) -> Encoding:
    return Encoding(kind="text", text=name)


def opened(folder: Path | str) -> EncodingCache:
    return EncodingCache(folder, {"text": ""})


def key(name: str) -> str:
    """Of the row that these tests call `name`: the text of that name has it."""
    return opened("").key(text(name))


def write_part(folder: Path | str, rows: dict[str, Encoded]) -> Manifest:
    return cache.write_part(folder, {key(name): row for name, row in rows.items()})


def read(reader: EncodingCache, *names: str) -> dict[str, torch.Tensor]:
    """The tensors of several rows together."""
    return {tensor: value for name in names for tensor, value in reader.row(text(name)).items()}


def key_of(encoding: Encoding, fingerprint: str) -> str:
    return EncodingCache("", {encoding.kind: fingerprint}).key(encoding)


def row(tensors: dict[str, torch.Tensor], unknown: float | None = None) -> Encoded:
    return Encoded(tensors=tensors, unknown=unknown)


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
    texts = write_part(folder, {"a": row(text_row(0), 0.25), "b": row(text_row(1))})
    sources = write_part(folder, {"x": row(source_row(2)), "y": row(source_row(3))})
    commit(folder, [texts, sources])
    return folder


def test_rows_come_back_exactly(folder):
    reader = opened(folder)
    for name, want in {"a": text_row(0), "b": text_row(1), "x": source_row(2), "y": source_row(3)}.items():
        found = read(reader, name)
        assert found.keys() == want.keys()
        assert all(
            found[tensor].dtype == torch.bfloat16 and torch.equal(found[tensor], want[tensor]) for tensor in want
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_every_bit_pattern_survives(tmp_path, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    tensor = torch.cat([bits, bits, bits, bits]).view(dtype)  # NaNs, infinities, subnormals and −0 included
    scalar = {"one": torch.tensor(3, dtype=dtype)}
    commit(tmp_path, [write_part(tmp_path, {"t": row({"values": tensor}), "s": row(scalar)})])
    back = read(opened(tmp_path), "t", "s")
    assert back["values"].dtype == dtype and back["values"].shape == tensor.shape
    assert torch.equal(back["values"].view(torch.int16), tensor.view(torch.int16))
    assert back["one"].tolist() == 3


def test_what_is_returned_may_be_written_to_without_touching_the_cache(folder):
    reader = opened(folder)
    read(reader, "a", "x")["prompt_embeds"].zero_()
    assert torch.equal(read(reader, "a", "x")["prompt_embeds"], text_row(0)["prompt_embeds"])


def test_an_unsupported_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"values of row {key('t')} is complex64; the cache keeps bfloat16"):
        write_part(tmp_path, {"t": row({"values": torch.zeros(1, dtype=torch.complex64)})})
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_is_not_there(folder):
    with pytest.raises(CacheError, match=f"row {key('z')} is not in the cache .*; start again"):
        read(opened(folder), "a", "z")


def test_a_reader_sees_what_is_committed_after_it_started(folder):
    reader = opened(folder)
    read(reader, "a", "x")
    commit(folder, [write_part(folder, {"z": row(source_row(9))})])
    assert torch.equal(read(reader, "a", "z")["source_latents"], source_row(9)["source_latents"])


def test_a_crash_before_the_manifest_leaves_a_usable_cache(folder):
    write_part(folder, {"z": row(source_row(9))})
    (folder / ".part-half").write_bytes(b"ARROW1")
    assert set(read_manifest(folder).places) == set(map(key, "abxy"))
    read(opened(folder), "a", "x", "b", "y")


def test_a_crash_while_the_manifest_is_written_keeps_the_old_one(folder, monkeypatch):
    before = (folder / "manifest.json").read_bytes()
    part = write_part(folder, {"z": row(source_row(9))})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        commit(folder, [part])
    assert (folder / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    assert set(commit(folder, [part]).places) == set(map(key, "abxyz"))


def test_writing_the_same_rows_again_makes_no_second_file(folder):
    before = sorted(folder.iterdir())
    commit(folder, [write_part(folder, {"a": row(text_row(0), 0.25), "b": row(text_row(1))})])
    assert sorted(folder.iterdir()) == before


def test_the_unknown_and_the_cut_share_are_kept(folder):
    commit(folder, [write_part(folder, {"long": Encoded(tensors=text_row(4), unknown=0.0, cut=0.5)})])
    places = read_manifest(folder).places
    assert places[key("a")].unknown == 0.25 and places[key("b")].unknown is None
    assert (places[key("long")].unknown, places[key("long")].cut) == (0.0, 0.5) and places[key("a")].cut is None


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_rows_of_a_damaged_file_are_missing_and_the_others_are_not(folder, damage):
    file = folder / read_manifest(folder).places[key("x")].file
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    assert set(read_manifest(folder).places) == set(map(key, "ab"))
    with pytest.raises(CacheError, match=f"row {key('x')} is not in the cache"):
        read(opened(folder), "a", "x")
    commit(folder, [write_part(folder, {"x": row(source_row(2)), "y": row(source_row(3))})])
    read(opened(folder), "a", "x")


def test_a_file_cut_short_after_the_manifest_was_read(folder):
    reader = opened(folder)
    read(reader, "a", "x")
    fresh = opened(folder)
    fresh._manifest = read_manifest(folder)
    file = folder / read_manifest(folder).places[key("x")].file
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"part-.*\.arrow has \d+ bytes, not \d+; delete it and start again"):
        read(fresh, "a", "x")


def test_every_flipped_byte_of_a_row_is_an_error_or_harmless(folder):
    """A flipped byte is found, or lies in padding and changes nothing."""
    path = folder / read_manifest(folder).places[key("x")].file
    good = path.read_bytes()
    found = 0
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            condition = read(opened(folder), "a", "x")
        except CacheError as error:
            assert "delete it and start again" in str(error)
            found += 1
        else:
            assert torch.equal(condition["source_latents"], source_row(2)["source_latents"])
    assert found > 20
    path.write_bytes(good)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 2, "files": {}, "rows": {"a": [1]}}'])
def test_a_damaged_manifest_is_a_clear_error(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json is damaged .*; delete it and start again"):
        read_manifest(folder)


def test_a_manifest_of_another_format_is_refused(folder):
    document = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"has format 99, not 2; use another data.cache"):
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
    path = folder / read_manifest(folder).places[key("x")].file
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema(fields)):
        pass
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][path.name] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match="does not have the cache's schema"):
        read(opened(folder), "a", "x")


def test_files_are_let_go(tmp_path, monkeypatch):
    for i in range(10):
        commit(tmp_path, [write_part(tmp_path, {f"t{i}": row(text_row(i)), f"s{i}": row(source_row(i))})])
    monkeypatch.setattr(cache, "OPEN_FILES", 3)
    reader = opened(tmp_path)
    for _ in range(2):
        for i in range(10):
            condition = read(reader, f"t{i}", f"s{i}")
            assert torch.equal(condition["source_latents"], source_row(i)["source_latents"])
            assert len(reader._files) <= 3


def test_a_read_touches_only_its_rows(tmp_path):
    """Reading one small row beside a large one does not bring the large one into memory."""
    large = {"values": torch.ones(100_000_000, dtype=torch.bfloat16)}
    commit(tmp_path, [write_part(tmp_path, {"l": row(large), "a": row(text_row(0)), "x": row(source_row(1))})])
    del large
    process = multiprocessing.get_context("spawn").Pool(1)
    with process:
        assert process.apply(_peak_of_a_read, (str(tmp_path),)) < 50_000_000


def _peak_of_a_read(folder: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(opened(folder), "a", "x")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _commit_rows(folder: str, worker: int) -> None:
    for i in range(10):
        commit(folder, [write_part(folder, {f"{worker}-{i}": row(source_row(100 * worker + i))})])


def test_two_writers_at_once_lose_nothing(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_commit_rows, [(str(tmp_path), 0), (str(tmp_path), 1)])
    assert set(read_manifest(tmp_path).places) == {key(f"{w}-{i}") for w in range(2) for i in range(10)}


def test_the_folder_can_be_moved(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    read(opened(tmp_path / "moved"), "a", "x")


def test_keys_depend_on_everything_that_goes_in_and_not_on_where_a_medium_lies():
    source = Source(path="/here", content="c", height=48, width=32)
    base = Encoding(kind="k", text="t", sources=(source,), geometries=(Geometry(height=32, width=16),))
    others = [
        replace(base, kind="l"),
        replace(base, text="u"),
        replace(base, text=None),
        replace(base, sources=(), geometries=()),
        replace(base, sources=base.sources * 2, geometries=base.geometries * 2),
        *(
            replace(base, sources=(replace(source, **change),))
            for change in ({"content": "d"}, {"fit": "pad"}, {"mirrored": True}, {"crop": (0.5, 0.25)})
        ),
        *(
            replace(base, geometries=(Geometry(**{"height": 32, "width": 16, **change}),))
            for change in ({"height": 16}, {"width": 32}, {"height": 16, "width": 32}, {"frames": 2})
        ),
    ]
    keys = {key_of(encoding, "f") for encoding in (base, *others)} | {key_of(base, "g")}
    assert len(keys) == len(others) + 2 and all(len(key) == 32 for key in keys)
    assert key_of(replace(base, sources=(replace(source, path="/there"),)), "f") == key_of(base, "f")


def test_the_order_of_sources_matters():
    first, second = Source(path="", content="a", height=48, width=32), Source(path="", content="b", height=48, width=32)
    size = (Geometry(height=16, width=16),) * 2
    one, other = (Encoding(kind="k", sources=s, geometries=size) for s in ((first, second), (second, first)))
    assert key_of(one, "f") != key_of(other, "f")
