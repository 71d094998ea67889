"""Frozen layers in 8 and 4 bits: known answers, what they cost, and adapters trained through them."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.diffusion.objectives import SFT
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.quantised import (
    CODES,
    STORED,
    QuantisedLinear,
    quantise,
    quantise_layers,
    restored,
)
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from rlhf.models.trainable import load_for_sampling, load_trainable
from rlhf.shards import buffers
from rlhf.tables import ModelTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainableTable, TrainerConfig
from tests import worlds
from tests.rlhf.models.test_lora_layouts import adapters

BASES = tuple(STORED)
EVERY = pytest.mark.parametrize("base", BASES)
LORA = TrainableTable(kind="lora", rank=4, alpha=8.0)
EPS = torch.finfo(torch.float32).eps


def normal(*shape, seed=0, std=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


# --- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", CODES)
def test_every_value_of_a_code_comes_back_at_any_scale(base):
    values = torch.tensor(CODES[base]).repeat(3, 4) * torch.tensor([[1.0], [0.25], [3.0]])
    found = quantise(values, base)
    assert found["weight"].dtype == torch.uint8 and found["weight"].shape == (3, 32)
    assert found["weight_scale"].tolist() == [[1.0], [0.25], [3.0]]
    assert torch.equal(restored(**named(found), base=base, dtype=torch.float32), values)


def test_whole_numbers_come_back():
    row = torch.tensor([[-127.0, 1, 2, 126], [0, 0, 0, 0], [63.5, -1, 0.5, 10]])
    found = quantise(row, "int8")
    assert found["weight"].tolist() == [[-127, 1, 2, 126], [0, 0, 0, 0], [127, -2, 1, 20]]
    assert found["weight_scale"].flatten().tolist() == [1.0, 1.0, 0.5]
    assert torch.equal(
        restored(**named(found), base="int8", dtype=torch.float32), found["weight"] * found["weight_scale"]
    )


@pytest.mark.parametrize(("base", "error"), [("fp8", 0.026), ("int8", 0.0075), ("nf4", 0.09), ("fp4", 0.12)])
@pytest.mark.parametrize("std", [0.05, 0.005])
def test_the_error_of_normal_weights_does_not_depend_on_their_size(base, error, std):
    """Relative, as root of mean squares; int8: a step of 2 × 3.9σ / 254 over √12, for 1,024 values a row."""
    weight = normal(256, 1024, std=std)
    back = restored(**named(quantise(weight, base)), base=base, dtype=torch.float32)
    found = ((back - weight).square().mean() / weight.square().mean()).sqrt().item()
    assert found == pytest.approx(error, rel=0.15)


def named(found):
    return {"weight": found["weight"], "scale": found["weight_scale"]}


# --- a layer -----------------------------------------------------------------------------------------------------------


def layer(base, dtype=torch.float32):
    plain = nn.Linear(128, 48)
    with torch.no_grad():
        plain.weight.copy_(normal(48, 128))
    block = nn.Sequential(plain).to(dtype).requires_grad_(False)
    (quantised,) = quantise_layers(block, (nn.Sequential,), base)
    return quantised


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_linear_one_of_what_it_restores(base, dtype):
    found = layer(base, dtype)
    matrix = restored(found.weight, found.weight_scale, base, dtype)
    x = normal(3, 5, 128, std=1.0).to(dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = found(mine), nn.functional.linear(theirs, matrix) + found.bias
    assert isinstance(found, QuantisedLinear) and torch.equal(y, expected)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@EVERY
def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass(base):
    found, kept = layer(base), []
    x = normal(2, 128).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found(x)
    assert {tensor.dtype for tensor in kept} == {STORED[base], torch.float32}
    assert sum(tensor.nbytes for tensor in kept) == found.weight.nbytes + found.weight_scale.nbytes


@EVERY
def test_a_base_takes_the_memory_that_it_says(base, kontext):
    """Of the real width: a layer of the tiny one has no whole blocks of 64."""
    plain = nn.Linear(3072, 3072, bias=False, dtype=torch.bfloat16, device="meta")
    (found,) = quantise_layers(nn.Sequential(plain), (nn.Sequential,), base)
    share = (found.weight.nbytes + found.weight_scale.nbytes) / plain.weight.nbytes
    scales = 1 / 64 if base in CODES else 1 / 3072
    assert share == pytest.approx({"fp8": 0.5, "int8": 0.5}.get(base, 0.25) + scales, rel=1e-6)


# --- training through it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, kontext):
    root = tmp_path_factory.mktemp("models")
    return {"flux_kontext": kontext, "qwen_image_edit": write_qwen_image_edit(root / "qwen")}


FAMILIES = pytest.mark.parametrize("kind", ["flux_kontext", "qwen_image_edit"])


def on_base(path, kind, base, dtype="float32"):
    return load_family(ModelTable(family=kind, path=str(path), base=base, dtype=dtype))


def trainer_of(mesh, path, kind, base, dtype="float32"):
    family = on_base(path, kind, base, dtype)
    config = TrainerConfig(learning_rate=1e-2, gradient_checkpointing="all", lr_warmup_steps=0)
    return Trainer(
        family=family, config=config, trainable=load_trainable(LORA, family), objective=SFT(), mesh=mesh, seed=7
    )


def restored_folder(path, folder, kind, base):
    """A copy whose denoiser has the weights that the quantised one restores."""
    family = on_base(path, kind, base)
    denoiser = family.load_denoiser("cpu")
    file = next((path / family.denoiser_folder).glob("*.safetensors"))
    weights = load_file(file)
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantisedLinear):
            weights[f"{name}.weight"] = restored(module.weight, module.weight_scale, base, torch.float32)
    assert any(isinstance(module, QuantisedLinear) for module in denoiser.modules())
    (folder / family.denoiser_folder).mkdir(parents=True)
    for other in path.rglob("*"):
        if other.is_file() and other != file:
            (folder / other.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
            (folder / other.relative_to(path)).write_bytes(other.read_bytes())
    save_file(weights, folder / file.relative_to(path))
    return folder


def batch_of(path, kind, count):
    from tests.rlhf.models.test_families import pairs_of

    family = worlds.family(path, torch.float32, kind)
    pairs = pairs_of(family, count)
    return replace(pairs, x0={"target": pairs.x0["winner"]}, weight={"target": torch.ones(count)})


def gradients(mesh, path, kind, base, batch):
    trainer = trainer_of(mesh, path, kind, base)
    with torch.no_grad():  # where B is zero, A has no gradient
        for parameter in trainer.trained.values():
            parameter.to_local().add_(0.01)
    count = len(batch.t) // mesh.size()
    mine = worlds.part(batch, mesh.get_rank() * count, (mesh.get_rank() + 1) * count)
    loss, _ = trainer.objective(trainer.predictions, trainer.family.process, mine)
    loss.backward()
    dtypes = {str(parameter.dtype) for parameter in trainer.policy.parameters()}
    found = {name: p.grad.full_tensor() for name, p in trainer.trained.items() if p.grad is not None}
    return found, dtypes


@EVERY
@FAMILIES
def test_adapters_get_the_gradient_of_the_restored_model_on_one_and_two_ranks(
    one_rank, two_ranks, folders, tmp_path, kind, base
):
    batch = batch_of(folders[kind], kind, 4)
    ((expected, _),) = one_rank.run(
        gradients, restored_folder(folders[kind], tmp_path / "plain", kind, base), kind, "bf16", batch
    )
    ((alone, dtypes),) = one_rank.run(gradients, folders[kind], kind, base, batch)
    (together, _), _ = two_ranks.run(gradients, folders[kind], kind, base, batch)
    assert str(STORED[base]) in dtypes, "the base is not kept as it says"
    size = math.sqrt(sum(value.square().sum().item() for value in expected.values()))
    # Relative to their size: eps × √terms, of the longest sum, over a single block's 32 + 128 values, there and back.
    rounding = 4 * EPS * math.sqrt(32 + 128)
    for found in (alone, together):
        assert found.keys() == expected.keys()
        difference = math.sqrt(sum((found[name] - expected[name]).square().sum().item() for name in expected))
        assert difference < rounding * size


@EVERY
@FAMILIES
def test_the_gradient_is_near_that_of_the_plain_base(one_rank, folders, kind, base):
    """As far off as the weights are: 3 % in 8 bits, 13 % in 4, and no more than doubled by four layers."""
    batch = batch_of(folders[kind], kind, 2)
    ((plain, _),) = one_rank.run(gradients, folders[kind], kind, "bf16", batch)
    ((found, _),) = one_rank.run(gradients, folders[kind], kind, base, batch)
    size = math.sqrt(sum(value.square().sum().item() for value in plain.values()))
    difference = math.sqrt(sum((found[name] - plain[name]).square().sum().item() for name in plain))
    assert 1e-4 < difference / size < (0.26 if base in CODES else 0.06)


def learn_and_publish(mesh, path, kind, base, batch):
    """Losses of a few steps in bf16, the trainer's prediction after them, the publication."""
    trainer = trainer_of(mesh, path, kind, base, "bfloat16")
    count = len(batch.t) // mesh.size()
    mine = worlds.part(batch, mesh.get_rank() * count, (mesh.get_rank() + 1) * count)
    losses = [trainer.step([mine])["loss"] for _ in range(8)]
    with torch.no_grad():
        prediction = trainer.predict(batch.x0["target"], batch.t, batch.condition)
    return losses, prediction, list(buffers.pack(trainer.shards(), capacity=20_000))


@EVERY
@FAMILIES
def test_it_learns_and_a_sampler_predicts_what_the_trainer_does_to_the_bit(two_ranks, folders, kind, base):
    batch = batch_of(folders[kind], kind, 2)
    (losses, prediction, published), (_, _, others) = two_ranks.run(learn_and_publish, folders[kind], kind, base, batch)
    assert losses[-1] < losses[0]
    family = on_base(folders[kind], kind, base, "bfloat16")
    trainable = load_trainable(LORA, family)
    plain = load_for_sampling(family, trainable, "cpu")
    parameters = trainable.trained(plain)
    for buffer, manifest in (*published, *others):
        buffers.load(parameters, buffer, manifest)
    with torch.no_grad():
        assert torch.equal(family.predict(plain, batch.x0["target"], batch.t, batch.condition), prediction)


@EVERY
def test_a_lora_of_a_file_is_applied_to_it_unrounded(kontext, tmp_path, base):
    """As on a plain base with the weights that the quantised one restores."""
    lora = tmp_path / "lora.safetensors"
    plain = on_base(kontext, "flux_kontext", "bf16").load_denoiser("cpu")
    save_file({name: value / 8 for name, value in adapters(plain).items()}, lora)
    folder = restored_folder(kontext, tmp_path / "plain", "flux_kontext", base)
    pairs = worlds.pairs(2)
    found = []
    for path, kept, file in ((kontext, base, lora), (folder, "bf16", lora), (kontext, base, None)):
        family = on_base(path, "flux_kontext", kept)
        denoiser = family.load_denoiser("cpu", lora=file)
        with torch.no_grad():
            found.append(family.predict(denoiser, pairs.x0["winner"], pairs.t, pairs.condition))
        dtypes = {p.dtype for name, p in denoiser.named_parameters() if "lora_" in name}
        assert dtypes <= {torch.float32} and not any(p.requires_grad for p in denoiser.parameters())
    mine, theirs, without = found
    torch.testing.assert_close(mine, theirs, rtol=0, atol=4 * EPS * 160 * theirs.abs().max().item())
    assert (mine - without).abs().max() > 0.01


@pytest.mark.parametrize("table", [TrainableTable(), TrainableTable(kind="modules", patterns=("norm_out",))])
def test_what_cannot_be_trained_is_refused(kontext, table):
    with pytest.raises(
        Refused, match=r'model\.base = "nf4" keeps weights that cannot be trained.*kind = "lora" without'
    ):
        load_trainable(table, on_base(kontext, "flux_kontext", "nf4"))
