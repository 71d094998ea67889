"""Rows to files and buffers and back: exact bytes, and refusals that name what is wrong."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import Refused
from rlhf.shards.buffers import checksum, load, pack
from rlhf.shards.files import SafetensorsFolder, Shard, write_sharded

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


def test_rows_are_read_from_one_of_many_files(tmp_path):
    save_file({"a.weight": WHOLE["a.weight"]}, tmp_path / "one.safetensors")
    save_file({"b.bias": WHOLE["b.bias"].float()}, tmp_path / "two.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert folder.where.keys() == {"a.weight", "b.bias"}
    assert torch.equal(folder.rows("a.weight", 1, 4, (5, 3)), WHOLE["a.weight"][1:4])
    assert torch.equal(folder.rows("b.bias", 2, 7, (7,)), WHOLE["b.bias"][2:7].float())


def test_variants_of_the_weights_are_passed_over(tmp_path):
    for name in ("m-00001-of-00001", "m.fp16", "m.fp16-00001-of-00001", "m.non_ema"):
        save_file({"a.weight": torch.full((2, 2), float("." in name))}, tmp_path / f"{name}.safetensors")
    assert not SafetensorsFolder(tmp_path).rows("a.weight", 0, 2, (2, 2)).any()


def test_what_cannot_be_read_is_named(tmp_path):
    save_file(WHOLE, tmp_path / "w.safetensors")
    folder = SafetensorsFolder(tmp_path)
    with pytest.raises(Refused, match=r"no tensor 'x'"):
        folder.rows("x", 0, 1, (1,))
    with pytest.raises(Refused, match=r"a.weight has shape \[5, 3\], the model wants \[5, 4\]"):
        folder.rows("a.weight", 0, 1, (5, 4))
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-3])
    with pytest.raises(Refused, match=r"cut off: .* ends early"):
        SafetensorsFolder(tmp_path).rows("c.one", 0, 1, (1, 2, 2))
    with pytest.raises(Refused, match=r"no \*.safetensors"):
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
