"""Trainables: which names they train, what they refuse, and what a table means. On ranks: `test_families.py`."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.errors import Refused
from rlhf.models.lora import LORA_FILE, MODULES_FILE
from rlhf.models.lora_layouts import from_diffusers
from rlhf.models.trainable import Full, LoRA, Modules, Sided, Trainable, load_trainable, owner
from rlhf.training_tables import TrainableTable
from rlhf.types import POLICY, REFERENCE, seed_from
from tests import worlds
from tests.rlhf.models.test_lora_layouts import adapters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.heads = 2

    def forward(self, x):
        return x + self.mlp(self.attn(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            assert block.heads == 2
            x = block(x)
        return self.out(x)


def lora(*targets: str) -> LoRA:
    return LoRA(rank=2, alpha=4.0, targets=targets)


def added(*parts, sides=(REFERENCE,), dtype=torch.float32) -> tuple[Trainable, Net]:
    torch.manual_seed(0)
    trainable, net = Trainable(parts=parts), Net().to(torch.bfloat16)
    trainable.add(net, sides, dtype)
    return trainable, net


CASES = {
    "full": (Full(),),
    "lora": (lora("attn"),),
    "modules": (Modules(patterns=("blocks.*.mlp", "out")),),
    "lora, then modules": (lora("attn", "mlp.0"), Modules(patterns=("blocks.*.mlp", "out"))),
    "modules, then lora": (Modules(patterns=("blocks.*.mlp", "out")), lora("attn", "mlp.0")),
}
EVERY_CASE = pytest.mark.parametrize("parts", CASES.values(), ids=CASES)


@EVERY_CASE
def test_only_what_is_trained_has_a_gradient_and_is_in_single_precision(parts):
    trainable, net = added(*parts)
    trained = {id(p) for p in trainable.trained(net).values()}
    assert trained
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert id(parameter) not in trained or parameter.dtype == torch.float32, name


@EVERY_CASE
def test_a_sampler_a_trainer_and_a_side_have_the_same_names_in_the_networks_order(parts):
    trainable, net = added(*parts)
    published = list(trainable.trained(net))
    _, sampler = added(*parts, sides=(), dtype=torch.bfloat16)
    assert list(trainable.trained(sampler)) == list(trainable.trained(net, REFERENCE)) == published
    assert all(p.dtype == torch.bfloat16 for p in sampler.parameters())
    order = [id(p) for p in net.parameters()]
    places = [order.index(id(p)) for p in trainable.trained(net).values()]
    assert places == sorted(places)


@EVERY_CASE
def test_every_parameter_has_a_place_in_the_plain_checkpoint_or_a_start(parts):
    trainable, net = added(*parts)
    plain = dict(Net().named_parameters())
    found = set()
    for name, parameter in net.named_parameters():
        start = trainable.start(name, parameter.shape, 3, {})
        if start is None:
            _, stored = owner(name)
            assert plain[stored].shape == parameter.shape
            found.add(stored)
        else:
            assert start.shape == parameter.shape and start.dtype == torch.float32
    assert found == plain.keys()


def test_each_part_trains_its_own_and_lora_leaves_out_what_is_trained_whole():
    for case in ("lora, then modules", "modules, then lora"):
        trainable, net = added(*CASES[case])
        names = set(trainable.trained(net))
        mlp = {f"blocks.{i}.mlp.{j}.{kind}" for i in (0, 1) for j in (0, 2) for kind in ("weight", "bias")}
        attn = {f"blocks.{i}.attn.lora_{ab}.policy.weight" for i in (0, 1) for ab in "AB"}
        assert names == mlp | attn | {"out.weight", "out.bias"}


def test_an_adapter_starts_with_values_that_its_name_decides():
    trainable, net = added(lora("attn"))
    for name, parameter in net.named_parameters():
        if ".lora_B." in name:
            assert not trainable.start(name, parameter.shape, 7, {}).any()
        elif ".lora_A." in name:
            policy = name.replace(f".{REFERENCE}.", f".{POLICY}.")
            generator = torch.Generator().manual_seed(seed_from(7, policy))
            expected = torch.empty(2, 4).uniform_(-1, 1, generator=generator) / 2
            assert torch.equal(trainable.start(name, parameter.shape, 7, {}), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case != "full"])
def test_a_call_goes_to_the_side_in_use_and_after_it_to_the_policy(case):
    trainable, net = added(*CASES[case])
    net = net.float()
    x = torch.randn(3, 4)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            start = trainable.start(name, parameter.shape, 7, {})
            if start is not None:
                parameter.copy_(start)
        before = net(x)
        for parameter in trainable.trained(net).values():
            parameter.add_(0.1)
        changed = net(x)
        with trainable.using(net, REFERENCE):
            reference = net(x)
        assert torch.equal(reference, before) and torch.equal(net(x), changed) and not torch.equal(changed, before)


def test_a_list_that_matches_is_trained_member_by_member_and_stays_a_list():
    trainable, net = added(Modules(patterns=("blocks", "blocks.0.attn")))
    assert [type(block) for block in net.blocks] == [Sided, Sided]
    assert set(trainable.trained(net)) == {name for name, _ in Net().named_parameters() if name.startswith("blocks.")}


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            Modules(patterns=("out", "blok.*", "head")),
            r"trainable.patterns: 'blok.\*', 'head' matches no module .* blocks, out",
        ),
        (
            Modules(patterns=("blocks.*.mlp.1",)),
            r"trainable.patterns: 'blocks.\*.mlp.1' matches no module with parameters",
        ),
        (lora("to_q", "out"), "trainable.targets: no layer's name ends in 'to_q'; leave it out"),
        (lora("mlp.1"), r"trainable.targets = \['mlp.1'\] does not fit this model: "),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(part, says):
    with pytest.raises(Refused, match=says):
        added(part)


def test_lora_targets_that_are_all_trained_whole_are_refused():
    with pytest.raises(Refused, match=r"trainable.targets = \['attn'\] does not fit this model"):
        added(Modules(patterns=("*.attn",)), lora("attn"))


def test_an_exported_lora_has_alpha_equal_to_rank_and_the_rest_of_the_scale_in_b(kontext):
    """Programs look for alpha in different places; whoever finds none takes the rank."""
    family = worlds.family(kontext)
    denoiser, part = family.empty_denoiser(torch.bfloat16), LoRA(rank=3, alpha=5.0, targets=("attn.to_q",))
    trained = Trainable(parts=(part,))
    trained.add(denoiser, (), torch.float32)
    export = part.export(denoiser, trained.trained(denoiser), family)
    assert set(export.scales) == {name for name in export.names if ".lora_B." in name}
    assert set(export.scales.values()) == {5 / 3}
    header = json.loads(export.metadata["lora_adapter_metadata"])
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 3
    assert not any(name.endswith(".alpha") for name in export.names.values())


def test_full_goes_with_no_other_part():
    with pytest.raises(ValueError, match="goes with no other part"):
        Trainable(parts=(Full(), lora("attn")))


def test_buffers_keep_their_dtype():
    net = Net()
    net.register_buffer("table", torch.ones(2))
    Trainable(parts=(Full(),)).add(net, (), torch.bfloat16)
    assert net.table.dtype == torch.float32 and net.out.weight.dtype == torch.bfloat16


# --- from tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rank": 4}, 'rank = 4 belongs to LoRA, but kind = "full": set kind = "lora" or leave rank out'),
        ({"kind": "modules", "patterns": ["a"], "alpha": 2.0}, 'alpha = 2.0 belongs to LoRA, but kind = "modules"'),
        ({"kind": "modules"}, 'kind = "modules" needs patterns'),
        ({"patterns": ["a.*"]}, "patterns = ['a.*'] chooses modules, but kind = \"full\" trains every weight"),
        ({"kind": "lora", "targets": []}, "should have at least 1 item"),
    ],
)
def test_keys_that_do_not_fit_are_named_with_their_kind(values, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        TrainableTable(**values)


@pytest.mark.parametrize("how", worlds.TRAINABLES)
def test_a_table_and_a_family_make_a_trainable(kontext, how):
    family = worlds.family(kontext)
    made = worlds.trainable(how, family)
    assert made.folder(family) == {"full": "transformer"}.get(how, how)
    assert {type(part) for part in made.parts} == {
        "full": {Full},
        "lora": {LoRA},
        "modules": {Modules},
        "lora_modules": {LoRA, Modules},
    }[how]
    if "lora" in how:
        assert made.parts[0] == LoRA(rank=4, alpha=8.0, targets=family.lora_targets)
    own = load_trainable(TrainableTable(kind="lora", targets=("attn.to_q",)), family)
    assert own.parts == (LoRA(rank=16, alpha=16.0, targets=("attn.to_q",)),)


def test_counts(kontext):
    family = worlds.family(kontext)
    whole = sum(p.numel() for p in family.load_denoiser("cpu").parameters())
    full = worlds.trainable("full", family).counts(family, (REFERENCE,))
    assert (full.trained, full.frozen_bytes, full.side_bytes) == (whole, 0, 2 * whole)
    assert worlds.trainable("full", family).counts(family, ()).side_bytes == 0
    for how in ("lora", "modules", "lora_modules"):
        counts = worlds.trainable(how, family).counts(family, (REFERENCE, "old"))
        assert 0 < counts.trained < whole and counts.side_bytes == 2 * 4 * counts.trained
        base = whole if how == "lora" else whole - worlds.trainable("modules", family).counts(family, ()).trained
        assert counts.frozen_bytes == 2 * base


# --- a LoRA that goes on from a file -----------------------------------------------------------------------------------


def written(folder, denoiser, layout="diffusers", rank=4, chosen=lambda name: name.endswith((".to_q", ".proj_mlp"))):
    tensors = adapters(denoiser, rank=rank, chosen=chosen)
    file = folder / f"{layout}.safetensors"
    save_file(tensors if layout == "diffusers" else from_diffusers(tensors, denoiser, "transformer", layout), file)
    return file, {key.removeprefix("transformer."): value for key, value in tensors.items()}


def begun(family, file, **settings):
    table = TrainableTable(kind="lora", start=str(file), **{"rank": 4, "alpha": 8.0} | settings)
    trainable = load_trainable(table, family)
    return trainable, trainable.begun(family)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
def test_a_lora_goes_on_from_a_file_of_any_layout(kontext, tmp_path, layout):
    family = worlds.family(kontext, torch.float32)
    file, tensors = written(tmp_path, family.load_denoiser("cpu"), layout)
    trainable, found = begun(family, file)
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():  # alpha / rank is 2 here and 1 in the file
        assert torch.equal(found[key], value / 2 if "lora_B" in key else value)
    layer = "transformer_blocks.1.attn.to_q"
    for side in (POLICY, REFERENCE):
        name = f"{layer}.lora_B.{side}.weight"
        assert torch.equal(trainable.start(name, (32, 4), 0, found), tensors[f"{layer}.lora_B.weight"] / 2)
    new = trainable.start("transformer_blocks.1.attn.to_k.lora_B.policy.weight", (32, 4), 0, found)
    assert not new.any(), "a layer that the file does not adapt begins anew"


def test_a_file_that_is_not_this_lora_s_is_refused(kontext, tmp_path):
    family = worlds.family(kontext, torch.float32)
    file, _ = written(tmp_path, family.load_denoiser("cpu"))
    with pytest.raises(
        Refused, match=r"trainable.start = .* is of rank 4, but trainable.rank = 8: set it to the file's"
    ):
        begun(family, file, rank=8)
    mixed = load_file(file)
    mixed |= {key: value[:2] if "lora_A" in key else value[:, :2] for key, value in mixed.items() if ".0.attn" in key}
    save_file({key: value.contiguous() for key, value in mixed.items()}, tmp_path / "mixed.safetensors")
    with pytest.raises(Refused, match=r"is of rank 2 and 4, but trainable\.rank = 4: its layers must be of one rank"):
        begun(family, tmp_path / "mixed.safetensors")
    with pytest.raises(Refused, match=r"adapts 4 layers that trainable.targets do not name, .*: add their endings"):
        begun(family, file, targets=["attn.to_k", "proj_mlp"])
    with pytest.raises(Refused, match=r"nothing\.safetensors does not exist"):
        begun(family, tmp_path / "nothing.safetensors")
    save_file({"modules": torch.ones(1)}, tmp_path / MODULES_FILE)
    with pytest.raises(Refused, match="holds whole modules, and no LoRA; give the LoRA of another run"):
        begun(family, tmp_path)
    (tmp_path / LORA_FILE).write_bytes(file.read_bytes())
    with pytest.raises(Refused, match="holds whole modules beside its LoRA, which are not read here"):
        begun(family, tmp_path)
    with pytest.raises(ValueError, match='belongs to LoRA, but kind = "full"'):
        TrainableTable(start=str(file))


def test_a_gaussian_start_is_pefts(kontext):
    """Normal with deviation 1/rank (PEFT's `reset_lora_parameters`); B is zero."""
    table = TrainableTable(kind="lora", rank=4, alpha=4.0, init="gaussian")
    made = load_trainable(table, worlds.family(kontext))
    a = made.start("x.lora_A.policy.weight", (4, 100_000), 3, {})
    assert a.std().item() == pytest.approx(0.25, rel=0.01) and abs(a.mean().item()) < 0.005
    assert a.abs().max() > 0.8, "no uniform one"
    assert torch.equal(a, made.start("x.lora_A.reference.weight", (4, 100_000), 3, {}))
    assert not made.start("x.lora_B.policy.weight", (5, 4), 3, {}).any()
    with pytest.raises(ValueError, match="init = 'gaussian' and start = 'a'"):
        TrainableTable(kind="lora", init="gaussian", start="a")
