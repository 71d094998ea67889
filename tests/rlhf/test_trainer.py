"""The trainer on real ranks over gloo: exactness, known losses, and files that the libraries load."""

import math

import pytest
import torch

from tests import worlds

KINDS = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def gather(trainer, tensors):
    return {name: tensor.full_tensor().clone() for name, tensor in tensors.items()}


def gradients(mesh, path, lora, per_rank, micro):
    """Whole gradients of one accumulated backward over `per_rank` pairs a rank in micro-batches of `micro`."""
    trainer = worlds.trainer(mesh, path, lora=lora, dtype=torch.float32, beta=100.0)
    with torch.no_grad():  # away from policy = reference, where the gradient's scale is special
        for parameter in trainer.trained.values():
            parameter.to_local().add_(0.01)
    batch = worlds.pairs(4)
    mine = worlds.part(batch, mesh.get_rank() * per_rank, (mesh.get_rank() + 1) * per_rank)
    parts = [worlds.part(mine, i, i + micro) for i in range(0, per_rank, micro)]
    for part in parts:
        loss, _ = trainer.objective(trainer.predict, trainer.predict_reference, trainer.family.process, part)
        (loss / len(parts)).backward()
    return {name: p.grad.full_tensor() for name, p in trainer.trained.items()}


def relative(a, b):
    difference = math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))
    return difference / math.sqrt(sum(value.square().sum().item() for value in b.values()))


@KINDS
def test_two_ranks_and_accumulation_give_the_gradient_of_one_batch(one_rank, two_ranks, kontext, lora):
    (whole,) = one_rank.run(gradients, kontext, lora, 4, 4)
    (accumulated,) = one_rank.run(gradients, kontext, lora, 4, 1)
    spread, _ = two_ranks.run(gradients, kontext, lora, 2, 1)
    assert relative(accumulated, whole) < 1e-5
    assert relative(spread, whole) < 1e-5
    assert all(value.abs().sum() > 0 for name, value in whole.items() if "lora_A" not in name)


def ln2_again_and_again(mesh, path, lora):
    trainer = worlds.trainer(mesh, path, lora=lora)
    rank = mesh.get_rank()
    losses = []
    for step in range(7):
        if step in (3, 5):
            trainer.refresh_reference()
        losses.append(trainer.step([worlds.part(worlds.pairs(4, seed=step), 2 * rank, 2 * rank + 2)]))
    return losses


@KINDS
def test_policy_equal_to_reference_is_ln2_at_the_start_and_after_every_refresh(two_ranks, kontext, lora):
    results = two_ranks.run(ln2_again_and_again, kontext, lora)
    assert results[0] == results[1]
    for step, metrics in enumerate(results[0]):
        if step in (0, 3, 5):
            assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
            assert metrics["implicit_acc"] == 0
            assert metrics["logit"] == 0
        else:
            assert abs(metrics["loss"] - math.log(2)) > 1e-5


def predictions(mesh, path, lora, steps):
    """Trained a little, then compared with a plain bf16 model that loaded the published buffers."""
    from rlhf import weights
    from rlhf.models import lora as lora_module

    trainer = worlds.trainer(mesh, path, lora=lora)
    for step in range(steps):
        trainer.step([worlds.pairs(2, seed=step)])
    published = list(weights.pack(trainer.shards(), capacity=20_000))
    batch = worlds.pairs(3, seed=9)
    with torch.no_grad():
        mine = trainer.predict(batch.winner, batch.t, batch.condition)
    plain = trainer.family.load_denoiser("cpu")
    if lora:
        lora_module.add_adapters(plain, worlds.LORA, trainer.family.lora_targets, (lora_module.POLICY,), torch.bfloat16)
    parameters = dict(plain.named_parameters())
    everyone = [None] * mesh.size()
    torch.distributed.all_gather_object(everyone, published)
    for buffers in everyone:
        for buffer, manifest in buffers:
            weights.load(parameters, buffer, manifest)
            assert weights.checksum(parameters, manifest) == manifest.checksum
    with torch.no_grad():
        sampler = trainer.family.predict(plain, batch.winner, batch.t, batch.condition)
    return mine, sampler


@KINDS
def test_prediction_equals_the_samplers_bit_for_bit_after_training_and_publish(two_ranks, kontext, lora):
    before, _ = two_ranks.run(predictions, kontext, lora, 0)[0]
    for mine, sampler in two_ranks.run(predictions, kontext, lora, 3):
        assert torch.equal(mine, sampler)
        assert not torch.equal(mine, before)


def train_and_save(mesh, path, folder, lora, save_at, steps):
    trainer = worlds.trainer(mesh, path, lora=lora, lr_warmup_steps=3)
    for step in range(steps):
        trainer.step([worlds.part(worlds.pairs(2, seed=step), mesh.get_rank(), mesh.get_rank() + 1)])
        if step == 1:
            trainer.refresh_reference()
        if step + 1 == save_at:
            trainer.save(folder)
    return state_of(trainer)


def state_of(trainer):
    return {f"{file}/{name}": rows.clone() for file, entries in trainer._state().items() for name, _, rows in entries}


def resume_and_train(mesh, path, folder, lora, steps):
    trainer = worlds.trainer(mesh, path, lora=lora, lr_warmup_steps=3)
    trainer.restore(folder)
    for step in range(trainer.steps, steps):
        trainer.step([worlds.part(worlds.pairs(2, seed=step), mesh.get_rank(), mesh.get_rank() + 1)])
    return state_of(trainer)


@KINDS
def test_a_restored_trainer_goes_on_exactly(two_ranks, kontext, tmp_path, lora):
    straight = two_ranks.run(train_and_save, kontext, tmp_path / "state", lora, 3, 6)
    resumed = two_ranks.run(resume_and_train, kontext, tmp_path / "state", lora, 6)
    for one, other in zip(straight, resumed, strict=True):
        assert one.keys() == other.keys()
        assert {name.split("/")[0] for name in one} == {"policy", "reference", "ema", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def restored_whole(mesh, path, folder, lora):
    trainer = worlds.trainer(mesh, path, lora=lora)
    trainer.restore(folder)
    return gather(trainer, trainer.trained)


def test_state_saved_by_two_ranks_restores_on_one(one_rank, two_ranks, kontext, tmp_path):
    two_ranks.run(train_and_save, kontext, tmp_path / "state", False, 3, 3)
    (alone,) = one_rank.run(restored_whole, kontext, tmp_path / "state", False)
    together, _ = two_ranks.run(restored_whole, kontext, tmp_path / "state", False)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def export(mesh, path, folder, lora):
    trainer = worlds.trainer(mesh, path, lora=lora)
    for step in range(3):
        trainer.step([worlds.pairs(1, seed=step)])
    trainer.export(folder / "policy")
    trainer.export(folder / "ema", which="ema")
    whole = {name: p.full_tensor().bfloat16() for name, p in trainer.trained.items()}
    return whole


def test_full_export_loads_in_diffusers(two_ranks, kontext, tmp_path):
    from diffusers import FluxTransformer2DModel

    whole, _ = two_ranks.run(export, kontext, tmp_path, False)
    model, report = FluxTransformer2DModel.from_pretrained(
        tmp_path / "policy", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())
    ema = FluxTransformer2DModel.from_pretrained(tmp_path / "ema", dtype=torch.bfloat16)
    assert not all(torch.equal(p, whole[name]) for name, p in ema.named_parameters())


def test_lora_export_loads_in_the_pipeline(two_ranks, kontext, tmp_path, caplog):
    from diffusers import FluxKontextPipeline

    from rlhf.models import lora

    whole, _ = two_ranks.run(export, kontext, tmp_path, True)
    pipeline = FluxKontextPipeline.from_pretrained(kontext, dtype=torch.bfloat16)
    with caplog.at_level("WARNING"):
        pipeline.load_lora_weights(tmp_path / "policy", adapter_name=lora.POLICY)
    assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
    loaded = {n: p for n, p in pipeline.transformer.named_parameters() if lora.is_adapter(n)}
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name].bfloat16(), whole[name]) for name in whole)
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling[lora.POLICY] == worlds.LORA.alpha / worlds.LORA.rank

    family = worlds.family(kontext)
    ours = family.load_denoiser("cpu")
    lora.add_adapters(ours, worlds.LORA, family.lora_targets, (lora.POLICY,), torch.bfloat16)
    ours.load_state_dict(whole, strict=False)
    batch = worlds.pairs(2)
    pipeline.transformer.to(torch.bfloat16)
    with torch.no_grad():
        expected = family.predict(ours, batch.winner, batch.t, batch.condition)
        actual = family.predict(pipeline.transformer, batch.winner, batch.t, batch.condition)
    assert torch.equal(expected, actual)


def broken_batches(mesh, path):
    from rlhf.trainer import NonFiniteLoss

    trainer = worlds.trainer(mesh, path)
    trainer.step([worlds.pairs(1)])
    before = state_of(trainer)
    bad = worlds.pairs(1)
    if mesh.get_rank() == 0:  # one rank's bad pair must stop the update on all
        bad.winner.fill_(float("nan"))
    first = trainer.step([bad])
    untouched = all(torch.equal(value, before[name]) for name, value in state_of(trainer).items())
    trainer.step([worlds.pairs(1)])
    trainer.step([bad])
    trainer.step([bad])
    try:
        trainer.step([bad])
    except NonFiniteLoss as error:
        return first["skipped"], untouched, str(error)
    return first["skipped"], untouched, None


def test_a_non_finite_loss_skips_the_step_and_the_third_in_a_row_stops(two_ranks, kontext):
    for skipped, untouched, error in two_ranks.run(broken_batches, kontext):
        assert skipped == 1 and untouched
        assert "three steps in a row" in error
