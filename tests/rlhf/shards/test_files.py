"""Rows to files and buffers and back: exact bytes, and refusals that name what is wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import Refused
from rlhf.shards.buffers import checksum, load, pack
from rlhf.shards.files import DIFFUSERS, TRANSFORMERS, SafetensorsFolder, Shard, write_sharded

WHOLE = {
    "a.weight": torch.randn(5, 3, generator=torch.manual_seed(0)).bfloat16(),
    "b.bias": torch.randn(7, generator=torch.manual_seed(1)).bfloat16(),
    "c.one": torch.randn(1, 2, 2, generator=torch.manual_seed(2)).bfloat16(),
}


def rank_shards(rank: int, ranks: int) -> list[Shard]:
    """Uneven rows, as FSDP2 cuts them: the last rank may hold none."""
    shards = []
    for name, tensor in WHOLE.items():
        size = -(-len(tensor) // ranks)
        start = min(rank * size, len(tensor))
        rows = tensor[start : start + size]
        shards.append(Shard(name=name, shape=tuple(tensor.shape), start=start, rows=rows))
    return shards


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_writes_its_rows_and_safetensors_reads_the_whole(tmp_path, ranks):
    file = tmp_path / "w.safetensors"
    for rank in range(ranks):  # the barrier orders rank 0's layout first; here the loop does
        write_sharded(file, lambda: rank_shards(rank, ranks), rank=rank, barrier=lambda: None, metadata={"k": "v"})  # noqa: B023
    loaded = load_file(file)
    assert loaded.keys() == WHOLE.keys()
    assert all(torch.equal(loaded[name], WHOLE[name]) for name in WHOLE)


def write_index(folder, stem, **files):
    where = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_rows_are_read_from_the_shards_that_an_index_names(tmp_path):
    save_file({"a.weight": WHOLE["a.weight"]}, tmp_path / "one.safetensors")
    save_file({"b.bias": WHOLE["b.bias"].float()}, tmp_path / "two.safetensors")
    for left_over in ("diffusion_pytorch_model", "three", "diffusion_pytorch_model.fp16"):
        save_file({"a.weight": torch.zeros(5, 3)}, tmp_path / f"{left_over}.safetensors")
    write_index(tmp_path, "diffusion_pytorch_model", one=["a.weight"], two=["b.bias"])
    folder = SafetensorsFolder(tmp_path)
    assert folder.where.keys() == {"a.weight", "b.bias"}
    assert torch.equal(folder.rows("a.weight", 1, 4, (5, 3)), WHOLE["a.weight"][1:4])
    assert torch.equal(folder.rows("b.bias", 2, 7, (7,)), WHOLE["b.bias"][2:7].float())


def test_without_an_index_the_one_file_is_read_whatever_lies_beside(tmp_path):
    for name in ("model", "model-00001-of-00001", "model.fp16", "model.non_ema", "a", "z"):
        save_file({"a.weight": torch.full((2, 2), float(name != "model"))}, tmp_path / f"{name}.safetensors")
    assert not SafetensorsFolder(tmp_path, TRANSFORMERS).rows("a.weight", 0, 2, (2, 2)).any()
    with pytest.raises(
        Refused, match=r"has neither diffusion_pytorch_model\.safetensors nor its index, but a\.saf.*, …;"
    ):
        SafetensorsFolder(tmp_path)


def test_where_a_file_and_an_index_lie_together_each_library_has_its_way(tmp_path):
    for stem in (DIFFUSERS, TRANSFORMERS):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{stem}.safetensors")
        save_file({"a": torch.ones(1)}, tmp_path / f"{stem}-1.safetensors")
        write_index(tmp_path, stem, **{f"{stem}-1": ["a"]})
    assert SafetensorsFolder(tmp_path, DIFFUSERS).rows("a", 0, 1, (1,)) == 1
    assert SafetensorsFolder(tmp_path, TRANSFORMERS).rows("a", 0, 1, (1,)) == 0


@pytest.mark.parametrize(
    ("files", "promised", "said"),
    [
        ({"one": "a", "two": "b"}, {"one": "a", "two": "b", "three": "c"}, r"names three\.safetensors, which .* lacks"),
        ({"one": "a", "two": "b"}, {"one": "a", "two": "bc"}, r"two\.safetensors has no tensor 'c', though the index"),
        (
            {"one": "a", "two": "ab"},
            {"one": "a", "two": "b"},
            r"a is both in .*one\.safetensors and in .*two\.safetensors",
        ),
        ({"one": "a", "two": "b"}, {"one": "ab", "two": ""}, r"one\.safetensors has no tensor 'b', though the index"),
        ({"one": "a"}, {}, r"has no weight_map from tensors to files"),
        ({"one": "a"}, {"../one": "a"}, r"names \.\./one\.safetensors, which .* lacks"),
    ],
)
def test_an_index_that_is_not_so_is_refused(tmp_path, files, promised, said):
    for file, names in files.items():
        save_file({name: torch.zeros(1) for name in names}, tmp_path / f"{file}.safetensors")
    write_index(tmp_path, DIFFUSERS, **promised)
    with pytest.raises(Refused, match=said):
        SafetensorsFolder(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(WHOLE | {"d": torch.zeros(2, dtype=torch.float8_e4m3fn)}, file)
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(Refused, match=r"no tensor 'x'"):
        folder.rows("x", 0, 1, (1,))
    with pytest.raises(Refused, match=r"a.weight has shape \[5, 3\], the model wants \[5, 4\]"):
        folder.rows("a.weight", 0, 1, (5, 4))
    with pytest.raises(Refused, match=r"d is F8_E4M3; readable: F32, BF16, F16, I64"):
        folder.rows("d", 0, 1, (2,))
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(Refused, match=r"cut off"):
        SafetensorsFolder(tmp_path)
    file.write_bytes(data[: folder.where["c.one"].offset])
    with pytest.raises(Refused, match=r"cut off: .* ends early"):  # after its header was read
        folder.rows("c.one", 0, 1, (1, 2, 2))
    with pytest.raises(Refused, match=r"nowhere is missing"):
        SafetensorsFolder(tmp_path / "nowhere")


@pytest.mark.parametrize("capacity", [1, 20, 10_000])
def test_published_buffers_load_bit_for_bit_and_prove_it(capacity):
    target = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    for rank in range(3):
        for buffer, manifest in pack(rank_shards(rank, 3), capacity=capacity):
            buffer.setflags(write=False)  # as Ray hands it out
            load(target, buffer, manifest)
            assert checksum(target, manifest) == manifest.checksum
    assert all(torch.equal(target[name], WHOLE[name]) for name in WHOLE)
    assert target["a.weight"].untyped_storage().data_ptr() != buffer.ctypes.data


def test_the_checksum_is_of_the_bytes_read_back_not_of_the_manifest():
    target = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    ((buffer, manifest),) = pack(rank_shards(0, 1))
    load(target, buffer, manifest)
    target["b.bias"].view(torch.uint8)[3] ^= 1
    assert checksum(target, manifest) != manifest.checksum


def test_a_buffer_for_another_model_is_refused():
    ((buffer, manifest),) = pack(rank_shards(0, 1))
    with pytest.raises(ValueError, match=r"published a.weight is \(5, 3\) bfloat16, this model has None"):
        load({}, buffer, manifest)
    wrong = {name: tensor.float() for name, tensor in WHOLE.items()}
    with pytest.raises(ValueError, match="float32"):
        load(wrong, np.copy(buffer), manifest)
