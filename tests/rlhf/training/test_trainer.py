"""The trainer on real ranks over gloo: exactness, known losses, and files that the libraries load."""

import math
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.diffusion.objectives import DPO
from rlhf.errors import Refused
from rlhf.models.trainable import ADAPTER, load_for_sampling, load_trainable
from rlhf.training.trainer import LossScale, Trainer
from rlhf.training_tables import TrainableTable, TrainerConfig
from rlhf.types import POLICY, REFERENCE
from tests import worlds
from tests.rlhf.models.test_lora_layouts import adapters
from tests.rlhf.training import tabled

HOW = pytest.mark.parametrize("how", worlds.TRAINABLES)
STATES = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "adafactor": {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
    "adamw_8bit": {"state1", "state2", "absmax1", "absmax2"},
    "prodigy": {"exp_avg", "exp_avg_sq", "s", "p0", "d", "distance"},
    "sgd": {"momentum_buffer"},
}
OPTIMIZERS = pytest.mark.parametrize("optimizer", worlds.OPTIMIZER_NAMES)


def gather(trainer, tensors):
    return {name: tensor.full_tensor().clone() for name, tensor in tensors.items()}


def gradients(mesh, path, how, per_rank, micro):
    """Whole gradients of one accumulated backward over `per_rank` pairs a rank in micro-batches of `micro`.

    And how far another order of sums may move them, relative to their size.
    """
    beta = 10.0
    trainer = worlds.trainer(mesh, path, how=how, dtype=torch.float32, beta=beta)
    with torch.no_grad():  # away from policy = reference, where the gradient's scale is special
        for parameter in trainer.trained.values():
            parameter.to_local().add_(0.01)
    batch = worlds.pairs(4)
    mine = worlds.part(batch, mesh.get_rank() * per_rank, (mesh.get_rank() + 1) * per_rank)
    parts = [worlds.part(mine, i, i + micro) for i in range(0, per_rank, micro)]
    for part in parts:
        loss, scalars = trainer.objective(trainer.predictions, trainer.family.process, part)
        (loss / len(parts)).backward()
    # Errors of random signs: eps × √terms, of the longest sum, over a single block's 32 + 128 values. A gradient has the
    # factor σ(−z), and z is β / 2 times the sum of four errors e, of which each is that uncertain.
    rounding = torch.finfo(torch.float32).eps * math.sqrt(32 + 128)
    rounding *= 1 + beta / 2 * 4 * max(scalars["winner_error"].item(), scalars["loser_error"].item())
    return {name: p.grad.full_tensor() for name, p in trainer.trained.items()}, rounding


def relative(a, b):
    difference = math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))
    return difference / math.sqrt(sum(value.square().sum().item() for value in b.values()))


@HOW
def test_two_ranks_and_accumulation_give_the_gradient_of_one_batch(one_rank, two_ranks, kontext, how):
    ((whole, rounding),) = one_rank.run(gradients, kontext, how, 4, 4)
    ((accumulated, _),) = one_rank.run(gradients, kontext, how, 4, 1)
    (spread, _), _ = two_ranks.run(gradients, kontext, how, 2, 1)
    assert rounding < 1e-3, "what one rounding to bf16 would make"
    assert relative(accumulated, whole) < rounding
    assert relative(spread, whole) < rounding
    assert all(value.abs().sum() > 0 for name, value in whole.items() if "lora_A" not in name)


def ln2_again_and_again(mesh, path, how):
    trainer = worlds.trainer(mesh, path, how=how)
    rank = mesh.get_rank()
    losses = []
    for step in range(7):
        if step in (3, 5):
            trainer.refresh(REFERENCE)
        losses.append(trainer.step([worlds.part(worlds.pairs(4, seed=step), 2 * rank, 2 * rank + 2)]))
    return losses


@HOW
def test_policy_equal_to_reference_is_ln2_at_the_start_and_after_every_refresh(two_ranks, kontext, how):
    results = two_ranks.run(ln2_again_and_again, kontext, how)
    assert results[0] == results[1]
    for step, metrics in enumerate(results[0]):
        if step in (0, 3, 5):
            assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
            assert metrics["implicit_acc"] == 0
            assert metrics["logit"] == 0
        else:
            assert abs(metrics["loss"] - math.log(2)) > 1e-5


def predictions(mesh, path, how, steps):
    """Trained a little, then compared with a sampler's bf16 model that loaded the published buffers."""
    from rlhf.shards import buffers

    trainer = worlds.trainer(mesh, path, how=how)
    for step in range(steps):
        trainer.step([worlds.pairs(2, seed=step)])
    published = list(buffers.pack(trainer.shards(), capacity=20_000))
    batch = worlds.pairs(3, seed=9)
    with torch.no_grad():
        mine = trainer.predict(batch.x0["winner"], batch.t, batch.condition)
    plain = load_for_sampling(trainer.family, trainer.trainable, "cpu")
    parameters, rows = trainer.trainable.trained(plain), Counter()
    everyone = [None] * mesh.size()
    torch.distributed.all_gather_object(everyone, published)
    for some in everyone:
        for buffer, manifest in some:
            buffers.load(parameters, buffer, manifest)
            for piece in manifest.slices:
                rows[piece.name] += piece.stop - piece.start
            assert buffers.checksum(parameters, manifest) == manifest.checksum
    assert rows == {name: len(parameter) for name, parameter in parameters.items()}, "the publication is incomplete"
    with torch.no_grad():
        sampler = trainer.family.predict(plain, batch.x0["winner"], batch.t, batch.condition)
    return mine, sampler


@HOW
def test_prediction_equals_the_samplers_bit_for_bit_after_training_and_publish(two_ranks, kontext, how):
    before, _ = two_ranks.run(predictions, kontext, how, 0)[0]
    for mine, sampler in two_ranks.run(predictions, kontext, how, 3):
        assert torch.equal(mine, sampler)
        assert not torch.equal(mine, before)


def mine(mesh, seed, count=2):
    """This rank's half of `count` pairs."""
    half = count // 2
    return worlds.part(worlds.pairs(count, seed=seed), mesh.get_rank() * half, (mesh.get_rank() + 1) * half)


def train_and_save(mesh, path, folder, how, save_at, steps, **changes):
    trainer = worlds.trainer(mesh, path, how=how, lr_warmup_steps=3, **changes)
    for step in range(steps):
        trainer.step([mine(mesh, step)])
        if step == 1:
            trainer.refresh(REFERENCE)
        if step + 1 == save_at:
            trainer.save(folder)
    return state_of(trainer)


def state_of(trainer):
    files, of_this_rank = trainer._state()
    state = {f"{file}/{s.name}": s.rows.clone() for file, shards in files.items() for s in shards}
    state |= {name: value.clone() for name, value in of_this_rank.items()}
    state["step"] = torch.tensor([float(s.get("step", 0)) for s in trainer.optimizer.state.values()])
    return state


def resume_and_train(mesh, path, folder, how, steps, **changes):
    trainer = worlds.trainer(mesh, path, how=how, lr_warmup_steps=3, **changes)
    trainer.restore(folder)
    for step in range(trainer.steps, steps):
        trainer.step([mine(mesh, step)])
    return state_of(trainer)


def with_(function, **changes):
    return lambda *arguments: function(*arguments, **changes)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@HOW
@OPTIMIZERS
def test_a_restored_trainer_goes_on_exactly(two_ranks, kontext, tmp_path, how, optimizer):
    folder = tmp_path / "state"
    straight = two_ranks.run(with_(train_and_save, optimizer=optimizer), kontext, folder, how, 3, 6)
    resumed = two_ranks.run(with_(resume_and_train, optimizer=optimizer), kontext, folder, how, 6)
    for one, other in zip(straight, resumed, strict=True):
        assert same(one, other)
        files = {name.split("/")[0] for name in one}
        assert files - {"policy", "reference", "ema", "step"} <= STATES[optimizer]
        assert files >= {"policy", "reference", "ema"}
        filled = STATES[optimizer] - {"p0"}  # which is 0 where a LoRA begins
        assert all(value.abs().sum() > 0 for name, value in one.items() if name.split("/")[0] in filled)
        assert optimizer == "sgd" or one["step"].unique().tolist() == [6.0]


def saved_without_one_gradient(mesh, path, folder):
    def unreached():
        trainer = worlds.trainer(mesh, path)
        trainer.trained["context_embedder.bias"].requires_grad_(False)
        return trainer

    straight = unreached()
    for step in range(3):
        straight.step([mine(mesh, step)])
        if step == 1:
            straight.save(folder)
    resumed = unreached()
    resumed.restore(folder)
    resumed.step([mine(mesh, 2)])
    return state_of(straight), state_of(resumed)


def test_a_parameter_that_no_gradient_reaches_stays_without_optimizer_state(two_ranks, kontext, tmp_path):
    for straight, resumed in two_ranks.run(saved_without_one_gradient, kontext, tmp_path / "state"):
        assert "exp_avg/context_embedder.bias" not in straight and "policy/context_embedder.bias" in straight
        assert same(straight, resumed)


def restored_whole(mesh, path, folder, **changes):
    from rlhf.training import optimizers

    trainer = worlds.trainer(mesh, path, **changes)
    try:
        trainer.restore(folder)
    except Refused as error:
        assert trainer.steps == 0
        return str(error)
    whole = gather(trainer, trainer.trained)
    by_rows, _ = optimizers.state_of(trainer.optimizer, trainer.trained)
    for key, values in by_rows.items():
        whole |= {f"{key}/{name}": value.full_tensor() for name, value in values.items()}
    return whole


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy", "sgd"])
def test_state_saved_by_two_ranks_restores_on_one(one_rank, two_ranks, kontext, tmp_path, optimizer):
    restore = with_(restored_whole, optimizer=optimizer)
    two_ranks.run(with_(train_and_save, optimizer=optimizer), kontext, tmp_path / "state", "full", 3, 3)
    (alone,) = one_rank.run(restore, kontext, tmp_path / "state")
    together, _ = two_ranks.run(restore, kontext, tmp_path / "state")
    assert {name.split("/")[0] for name in alone if "/" in name} == STATES[optimizer]
    assert same(alone, together)


@worlds.needs_bitsandbytes
def test_state_per_rank_and_another_optimizers_are_refused_with_the_remedy(one_rank, two_ranks, kontext, tmp_path):
    two_ranks.run(with_(train_and_save, optimizer="adamw_8bit"), kontext, tmp_path / "state", "full", 1, 1)
    (error,) = one_rank.run(with_(restored_whole, optimizer="adamw_8bit"), kontext, tmp_path / "state")
    assert "adamw_8bit state of 2 ranks, which does not fit 1" in error and "trainer.ranks = 2" in error
    for error in two_ranks.run(with_(restored_whole, optimizer="adafactor"), kontext, tmp_path / "state"):
        assert 'of trainer.optimizer = "adamw_8bit", not of "adafactor"' in error


def export(mesh, path, folder, how):
    trainer = worlds.trainer(mesh, path, how=how)
    for step in range(3):
        trainer.step([worlds.pairs(1, seed=step)])
    trainer.export(folder / "policy")
    trainer.export(folder / "ema", which="ema")
    trainer.export(folder / "half", dtype=torch.bfloat16)
    return {name: p.full_tensor() for name, p in trainer.trained.items()}


def test_full_export_loads_in_diffusers(two_ranks, kontext, tmp_path):
    from diffusers import FluxTransformer2DModel

    whole, _ = two_ranks.run(export, kontext, tmp_path, "full")
    model, report = FluxTransformer2DModel.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())
    ema = FluxTransformer2DModel.from_pretrained(tmp_path / "ema")
    assert not all(torch.equal(p, whole[name]) for name, p in ema.named_parameters())
    half = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert half.keys() == whole.keys() and all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)


def test_lora_export_loads_in_the_pipeline(two_ranks, kontext, tmp_path, caplog):
    from diffusers import FluxKontextPipeline

    whole, _ = two_ranks.run(export, kontext, tmp_path, "lora")
    pipeline = FluxKontextPipeline.from_pretrained(kontext, dtype=torch.bfloat16)
    with caplog.at_level("WARNING"):
        pipeline.load_lora_weights(tmp_path / "policy", adapter_name=POLICY)
    assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
    loaded = {n: p for n, p in pipeline.transformer.named_parameters() if ADAPTER.search(n)}
    assert loaded.keys() == whole.keys()
    for name, value in whole.items():  # whoever looks for alpha anywhere, or nowhere, takes alpha = rank
        scale = worlds.ALPHA / worlds.RANK if ".lora_B." in name else 1.0
        assert torch.equal(loaded[name], (value * scale).to(loaded[name].dtype)), name
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling[POLICY] == 1.0

    family = worlds.family(kontext)
    trainable = worlds.trainable("lora", family)
    ours = load_for_sampling(family, trainable, "cpu")
    for name, parameter in trainable.trained(ours).items():
        parameter.copy_(whole[name])
    batch = worlds.pairs(2)
    pipeline.transformer.to(torch.bfloat16)
    with torch.no_grad():
        expected = family.predict(ours, batch.x0["winner"], batch.t, batch.condition)
        actual = family.predict(pipeline.transformer, batch.x0["winner"], batch.t, batch.condition)
    assert torch.equal(expected, actual)


def broken_batches(mesh, path):
    from rlhf.training.trainer import NonFiniteLoss

    trainer = worlds.trainer(mesh, path)
    trainer.step([worlds.pairs(1)])
    before = state_of(trainer)
    bad = worlds.pairs(1)
    if mesh.get_rank() == 0:  # one rank's bad pair must stop the update on all
        bad.x0["winner"].fill_(float("nan"))
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


# --- where the state lies, and what is computed again -------------------------------------------------------------------


def trained_with(mesh, path, how, folder, changes, resumed):
    """Losses and whole weights of three steps under `changes`, saved after the second and resumed under `resumed`."""
    trainer = worlds.trainer(mesh, path, how=how, **changes)
    losses = [trainer.step([mine(mesh, step, 4)])["loss"] for step in range(2)]
    trainer.refresh(REFERENCE)
    trainer.save(folder)
    trainer = worlds.trainer(mesh, path, how=how, **resumed)
    trainer.restore(folder)
    losses += [trainer.step([mine(mesh, step, 4)])["loss"] for step in range(2, 4)]
    trainer.refresh(REFERENCE, decay=0.5)
    sides = {name: p.full_tensor() for name, p in trainer.sides[REFERENCE].items()}
    averages = {name: rows.clone() for name, rows in trainer.ema.rows.items()}
    return losses, gather(trainer, trainer.trained) | {f"side {name}": side for name, side in sides.items()}, averages


@pytest.mark.parametrize(("ranks", "how"), [("one_rank", "full"), ("two_ranks", "full"), ("two_ranks", "lora")])
@pytest.mark.parametrize(
    ("changes", "resumed"),
    [
        ({"offload": "ema"}, {"offload": "reference"}),
        ({"offload": "optimizer"}, {"offload": "none"}),
        ({"gradient_checkpointing": "half"}, {"gradient_checkpointing": "none"}),
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_where_state_lies_and_what_is_recomputed_changes_no_bit(
    request, kontext, tmp_path, ranks, how, changes, resumed
):
    group = request.getfixturevalue(ranks)
    plain = group.run(trained_with, kontext, how, tmp_path / "plain", {}, {})
    other = group.run(trained_with, kontext, how, tmp_path / "other", changes, resumed)
    for (losses, weights, averages), (losses_2, weights_2, averages_2) in zip(plain, other, strict=True):
        assert losses == losses_2 and len(set(losses)) > 2
        assert weights.keys() == weights_2.keys() and averages.keys() == averages_2.keys()
        assert all(torch.equal(weights[name], weights_2[name]) for name in weights)
        assert all(torch.equal(averages[name], averages_2[name]) for name in averages)


# --- buffers and tables ------------------------------------------------------------------------------------------------

PATTERNS = ("mixings.1", "out")


def tabled_trainer(mesh, family, how):
    config = TrainerConfig(learning_rate=1e-2, gradient_checkpointing="none")
    trainable = load_trainable(worlds.TRAINABLES[how](PATTERNS), family)
    return Trainer(family=family, config=config, trainable=trainable, objective=DPO(beta=50.0), mesh=mesh, seed=1)


def train_with_tables(mesh, family, how):
    """Losses, and whether a sampler and the refreshed reference predict what the policy does."""
    trainer, rank = tabled_trainer(mesh, family, how), mesh.get_rank()
    batch = tabled.frames(2 * mesh.size(), seed=3)
    mine = worlds.part(batch, 2 * rank, 2 * rank + 2)
    losses = [trainer.step([mine])["loss"] for _ in range(4)]
    trainer.refresh(REFERENCE)
    losses.append(trainer.evaluate([mine])["loss"])
    sampler = load_for_sampling(family, trainer.trainable, "cpu")
    for name, parameter in trainer.trainable.trained(sampler).items():
        parameter.copy_(trainer.trained[name].full_tensor())
    with torch.no_grad():
        policy, reference = (trainer.predict(mine.noise, mine.t, {}, side) for side in (POLICY, REFERENCE))
        return losses, policy, reference, family.predict(sampler, mine.noise, mine.t, {})


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
@HOW
def test_a_denoiser_with_a_buffer_and_a_table_trains_on_frames(request, tmp_path, how, ranks):
    family = tabled.TabledFamily(denoiser_path=tabled.write(tmp_path / "net"))
    for losses, policy, reference, sampler in request.getfixturevalue(ranks).run(train_with_tables, family, how):
        assert losses[0] == losses[4] == pytest.approx(math.log(2), abs=1e-7) and losses[3] < losses[0]
        assert torch.equal(policy, reference) and torch.equal(policy, sampler)


def unfinished(mesh, family, how):
    try:
        tabled_trainer(mesh, family, how)
    except AssertionError as error:
        return str(error)
    return ""


def test_a_family_that_leaves_a_table_empty_is_told_which(one_rank, tmp_path):
    family = tabled.TabledFamily(denoiser_path=tabled.write(tmp_path / "net"), finishes=False)
    (message,) = one_rank.run(unfinished, family, "full")
    assert message == (
        "TabledFamily.finish leaves these without values: mixings.0.wave, mixings.1.wave, mixings.0.turns, mixings.1.turns"
    )


# --- fp16 --------------------------------------------------------------------------------------------------------------


def fp16(mesh, path, start, **changes):
    trainer = worlds.trainer(mesh, path, dtype=torch.float16, **changes)
    trainer.loss_scale = LossScale(start)
    return trainer


def overflow_and_recover(mesh, path, folder):
    """From a scale far too high to the first good step, saved; with the same step in fp32."""
    exact = worlds.trainer(mesh, path, dtype=torch.float32, max_grad_norm=0.5)
    expected = exact.step([mine(mesh, 0)])
    trainer = fp16(mesh, path, 2.0**40, max_grad_norm=0.5)
    before = {name: p.to_local().clone() for name, p in trainer.trained.items()}
    history = []
    while not history or history[-1]["skipped"] == len(history):
        assert len(history) < 60
        untouched = all(torch.equal(p.to_local(), before[name]) for name, p in trainer.trained.items())
        history.append(trainer.step([mine(mesh, 0)]))
    moment = torch.cat(
        [trainer.optimizer.state[p]["exp_avg"].full_tensor().flatten() for p in trainer.trained.values()]
    )
    trainer.save(folder)
    resumed = worlds.trainer(mesh, path, dtype=torch.float16)
    resumed.restore(folder)
    counters = [(dict(vars(t.loss_scale)), t.steps, t.skipped, t.skipped_in_a_row) for t in (trainer, resumed)]
    after = [t.step([mine(mesh, 1)]) for t in (trainer, resumed)]
    return (
        history,
        untouched,
        moment.norm().item(),
        counters,
        after,
        same(state_of(trainer), state_of(resumed)),
        expected,
    )


def test_fp16_recovers_from_overflow_by_halving_the_scale_on_all_ranks(two_ranks, kontext, tmp_path):
    results = two_ranks.run(overflow_and_recover, kontext, tmp_path / "state")
    assert results[0][0] == results[1][0]
    for history, untouched, moment, counters, after, equal, expected in results:
        assert len(history) > 4 and untouched, "more overflows than the three that stop other runs"
        assert [metrics["loss_scale"] for metrics in history] == [2.0 ** (40 - step) for step in range(len(history))]
        assert "loss_scale" not in expected
        assert history[-1]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02)
        assert expected["grad_norm"] > 0.5 and moment == pytest.approx((1 - 0.9) * 0.5, rel=1e-3), (
            "unscaled, then clipped"
        )
        assert counters[0] == counters[1]
        assert counters[0][0] == {"value": 2.0 ** (41 - len(history)), "good_steps": 1}
        assert counters[0][1:] == (len(history), len(history) - 1, 0)
        assert after[0] == after[1] and equal


def steps_until_stopped(mesh, path, start, beta, broken):
    from rlhf.training.trainer import NonFiniteLoss

    trainer = fp16(mesh, path, start, beta=beta)
    batch = mine(mesh, 0)
    if broken and mesh.get_rank() == 0:
        batch.x0["winner"].fill_(float("nan"))
    for step in range(1, 10):
        try:
            trainer.step([batch])
        except NonFiniteLoss:
            return step
    return None


@pytest.mark.parametrize(
    ("start", "beta", "broken", "stops_at"),
    [(2.0**16, 5000.0, True, 3), (2.0, 1e14, False, 4)],
    ids=["a loss that is not finite", "a scale below 1"],
)
def test_fp16_still_stops_at_the_third_in_a_row_of(two_ranks, kontext, start, beta, broken, stops_at):
    assert two_ranks.run(steps_until_stopped, kontext, start, beta, broken) == [stops_at] * 2


def test_the_loss_scale_doubles_after_2000_good_steps_and_halves_after_a_bad_one():
    scale = LossScale()
    assert scale.value == 65536
    for good, value, good_steps in [
        *[(True, 65536, n) for n in range(1, 2000)],
        (True, 131072, 0),
        (True, 131072, 1),
        (False, 65536, 0),
        (False, 32768, 0),
    ]:
        scale.update(good)
        assert scale == LossScale(value=value, good_steps=good_steps)


# --- evaluation --------------------------------------------------------------------------------------------------------


def train_with_and_without_evaluation(mesh, path, how):
    """Metrics and end states of two equal runs, of which the second is evaluated between its steps."""
    histories, states, seen = [], [], []
    for evaluated in (False, True):
        trainer = worlds.trainer(mesh, path, how=how)
        history = []
        for step in range(3):
            history.append(trainer.step([mine(mesh, step)]))
            if evaluated:
                objective = trainer.objective

                def watched(*arguments, objective=objective):
                    loss, scalars = objective(*arguments)
                    seen.append(torch.is_grad_enabled() or loss.requires_grad)
                    return loss, scalars

                trainer.objective = watched
                trainer.evaluate([mine(mesh, 7), mine(mesh, 8)])
                trainer.objective = objective
                assert all(p.grad is None for p in trainer.policy.parameters())
            if step == 1:
                trainer.refresh(REFERENCE)
        history.append({name: rows.rows.clone() for name, rows in ((s.name, s) for s in trainer.shards())})
        histories.append(history)
        states.append(state_of(trainer))
    return histories, states, seen


@HOW
def test_an_evaluation_between_two_steps_changes_no_bit_of_what_follows(two_ranks, kontext, how):
    for (plain, evaluated), states, seen in two_ranks.run(train_with_and_without_evaluation, kontext, how):
        assert plain[:-1] == evaluated[:-1] and same(plain[-1], evaluated[-1])
        assert same(*states)
        assert seen == [False] * 6


def evaluations(mesh, path):
    trainer = worlds.trainer(mesh, path)
    for step in range(2):
        trainer.step([mine(mesh, step)])
    together = trainer.evaluate([mine(mesh, 5), mine(mesh, 6)])
    everyone = [trainer.evaluate([worlds.part(worlds.pairs(2, seed=s), i, i + 1)]) for s in (5, 6) for i in (0, 1)]
    bad = mine(mesh, 5)
    if mesh.get_rank() == 1:
        bad.x0["winner"].fill_(float("nan"))
    return together, everyone, trainer.evaluate([bad]), trainer.step([mine(mesh, 5), mine(mesh, 6)])


def test_an_evaluation_is_the_mean_over_micro_batches_and_ranks_that_a_step_reports(two_ranks, kontext):
    results = two_ranks.run(evaluations, kontext)
    assert results[0] == results[1]
    together, everyone, bad, step = results[0]
    assert together == {name: value for name, value in step.items() if name not in ("grad_norm", "lr", "skipped")}
    for name, value in together.items():
        assert value == pytest.approx(sum(each[name] for each in everyone) / 4, rel=1e-5, abs=1e-7)
    assert len({each["loss"] for each in everyone}) == 4
    assert bad.keys() == {"implicit_acc", "loser_error", "loser_error_minus_reference"}


# --- learning rates ----------------------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": {"lr_warmup_steps": 2},
    "cosine": {"lr_warmup_steps": 2},
    "cosine_with_restarts": {"lr_warmup_steps": 1, "lr_num_cycles": 2},
    "polynomial": {"lr_warmup_steps": 2, "lr_power": 2.0},
    "constant": {},
    "constant_with_warmup": {"lr_warmup_steps": 3},
    "piecewise_constant": {"lr_step_rules": "1:2,0.5:4,0.25"},
}


def rates(mesh, path, schedules):
    found = {}
    for name, keys in schedules.items():
        trainer = worlds.trainer(mesh, path, how="lora", lr_scheduler=name, max_train_steps=6, scale_lr=True, **keys)
        found[name] = [trainer.step([worlds.pairs(1)])["lr"] for _ in range(6)]
    return found


def test_every_schedule_of_diffusers_is_followed(one_rank, kontext):
    from diffusers.optimization import SchedulerType, get_scheduler

    names = set(get_args(TrainerConfig.model_fields["lr_scheduler"].annotation))
    assert names == {kind.value for kind in SchedulerType} == set(SCHEDULES)
    (found,) = one_rank.run(rates, kontext, SCHEDULES)
    for name, keys in SCHEDULES.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3 * 8)
        schedule = get_scheduler(
            name,
            optimizer,
            step_rules=keys.get("lr_step_rules"),
            num_warmup_steps=keys.get("lr_warmup_steps", 0),
            num_training_steps=6,
            num_cycles=keys.get("lr_num_cycles", 1),
            power=keys.get("lr_power", 1.0),
        )
        expected = []
        for _ in range(6):
            expected += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        assert found[name] == pytest.approx(expected, rel=1e-12), name
    assert found["piecewise_constant"] == pytest.approx([8e-3, 8e-3, 4e-3, 4e-3, 2e-3, 2e-3])
    assert len({tuple(values) for values in found.values()}) == len(SCHEDULES)


def test_scale_lr_multiplies_by_the_pairs_of_a_step():
    settings = {"learning_rate": 1e-8, "train_batch_size": 8, "gradient_accumulation_steps": 16, "ranks": 16}
    assert TrainerConfig(**settings, scale_lr=True).scaled_learning_rate == pytest.approx(2.048e-5, rel=1e-12)
    assert TrainerConfig(**settings).scaled_learning_rate == 1e-8


@pytest.mark.parametrize(
    "rules", ["", "1:10", "1:10,", "0.1:20,1:10,0.01", "1:10:2,0.1", "1:0,0.1", "1:x,0.1", "-1", "nan"]
)
def test_malformed_step_rules_are_refused_with_an_example(rules):
    with pytest.raises(ValueError, match=r"lr_step_rules = .* e\.g\. \"1:10,0\.1:20,0\.01\""):
        TrainerConfig(lr_scheduler="piecewise_constant", lr_step_rules=rules)


def test_schedules_that_lack_what_they_need_say_so():
    with pytest.raises(ValueError, match="needs lr_step_rules"):
        TrainerConfig(lr_scheduler="piecewise_constant")
    with pytest.raises(ValueError, match="1e-08 is not above it"):
        TrainerConfig(lr_scheduler="polynomial", learning_rate=1e-8)
    assert TrainerConfig(lr_scheduler="piecewise_constant", lr_step_rules="0.5").lr_step_rules == "0.5"


def goes_on(mesh, path, file):
    """Predictions of a trainer whose LoRA begins with a file, of its reference, and of a plain model with the file; the loss."""
    family = worlds.family(path, torch.float32)
    trainable = load_trainable(TrainableTable(kind="lora", rank=4, alpha=8.0, start=file), family)
    config = TrainerConfig(learning_rate=1e-3, gradient_checkpointing="none")
    trainer = Trainer(family=family, config=config, trainable=trainable, objective=DPO(beta=10.0), mesh=mesh, seed=7)
    batch = worlds.pairs(2, seed=9)
    with torch.no_grad():
        policy, reference = (
            trainer.predict(batch.x0["winner"], batch.t, batch.condition, s) for s in (POLICY, REFERENCE)
        )
        plain, base = (
            family.predict(family.load_denoiser("cpu", lora=lora), batch.x0["winner"], batch.t, batch.condition)
            for lora in (Path(file), None)
        )
    return policy, reference, plain, base, trainer.step([batch])["loss"]


def test_a_lora_goes_on_from_a_file(two_ranks, kontext, tmp_path):
    denoiser = worlds.family(kontext, torch.float32).load_denoiser("cpu")
    tensors = adapters(denoiser, rank=4, chosen=lambda name: ".attn." in name)
    save_file({key: value / 8 for key, value in tensors.items()}, tmp_path / "begin.safetensors")
    for policy, reference, plain, base, loss in two_ranks.run(goes_on, kontext, str(tmp_path / "begin.safetensors")):
        assert torch.equal(policy, reference) and loss == pytest.approx(math.log(2), abs=1e-7)
        # alpha / rank is a power of two, which rounds nothing; sums of 160 values may come in another order, through 4 blocks.
        bound = 4 * 160 * torch.finfo(torch.float32).eps * plain.abs().max()
        assert (policy - plain).abs().max() <= bound < (policy - base).abs().max()
