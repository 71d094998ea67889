"""Training learns what decides the clicks, keeps the best epoch, and refuses what it cannot use."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.errors import Refused
from rlhf.rewards.ctr import build as ctr_build
from rlhf.rewards.ctr.batches import Batches, Update
from rlhf.rewards.ctr.build import small_config, small_tokenizer
from rlhf.rewards.ctr.clicks import Rows
from rlhf.rewards.ctr.config import CTRDataConfig, CTRModelSection, CTRTrainConfig, TrainCTRConfig
from rlhf.rewards.ctr.model import CTRModel, describe, encode_items, load, save
from rlhf.rewards.ctr.training import Learner, fit
from tests.rlhf.rewards.clicks import write_backbones, write_clicks

SMALL = CTRModelSection(image_size=32, max_tokens=40)
ROUNDING = 4 * 256 * torch.finfo(torch.float32).eps
"""How far another order of sums may move a result, in units of its size: eps × the terms of the longest, in the fusion."""


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    return write_clicks(tmp_path_factory.mktemp("clicks"))


@pytest.fixture(scope="module")
def backbones(clicks, tmp_path_factory):
    torch.manual_seed(3)
    return write_backbones(tmp_path_factory.mktemp("backbones"), clicks)


def settings(**config):
    return CTRTrainConfig(**{"epochs": 12, "batch_size": 16, **config})


def train(rows, held_out=(), validation=(), seed=0, section=SMALL, folder=None, **config):
    """The learner as one rank in this process trained it, and its figures with those of the held-out rows."""
    rows = Rows(train=rows, validation=validation, held_out=held_out)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as temporary:
        made = Learner(rows, section, settings(**config), seed=seed)
        figures = fit(made.epoch, made.keep, made.config, lambda line: None)
        return made, made.finish(folder or Path(temporary)) | figures


def learner(rows, section, validation=(), **config):
    return Learner(Rows(train=rows, validation=validation), section, settings(**config), seed=0)


def without_noise(made):
    """No dropout, and plain steps: Adam makes a whole step of a gradient that is rounding noise."""
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    made.optimizer = torch.optim.SGD([{"params": parameters, "lr": 1.0, "initial_lr": 1.0}])
    return made


def weights(made):
    return {name: value.detach().clone() for name, value in made.model.named_parameters()}


# --- what it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["binomial", "compound"])
def test_it_learns_picture_and_item_on_held_out_rows(clicks, loss):
    _, metrics = train(clicks[40:], clicks[:40], loss=loss)
    assert metrics["correlation"] > 0.9 and metrics["pair_accuracy"] > 0.9 and metrics["rows"] == 40
    assert metrics["mse"] < 0.25 * np.var([click.rate for click in clicks[:40]])


def test_shuffled_rates_teach_nothing(clicks):
    rates = np.random.default_rng(1).permutation([click.rate for click in clicks[40:]])
    shuffled = [replace(click, rate=rate, impressions=500) for click, rate in zip(clicks[40:], rates, strict=True)]
    _, metrics = train(shuffled, clicks[:40])
    # Not 1.0: by chance 120 shuffled rates go with the brightness a little, and the cause is nothing but brightness.
    assert metrics["mse"] > 0.5 * np.var([click.rate for click in clicks[:40]])


def test_the_same_seed_gives_the_same_weights(clicks, tmp_path):
    made, _ = train(clicks[:32], epochs=1)
    again, _ = train(clicks[:32], epochs=1)
    other, _ = train(clicks[:32], epochs=1, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(made.model.parameters(), other.model.parameters(), strict=True))
    loaded, _ = load(save(tmp_path / "ctr", made.model, made.tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), loaded.parameters(), strict=True))


def test_binomial_loss_needs_impressions(clicks):
    bare = [replace(click, impressions=None) for click in clicks[:32]]
    with pytest.raises(Refused, match="impressions and clicks"):
        train(bare, loss="binomial")
    assert "binomial_loss" not in train(bare, bare, epochs=1)[1]


def test_a_non_finite_loss_stops(clicks):
    with pytest.raises(Refused, match=r"learning_rate"):
        train(clicks[:64], learning_rate=1e30, max_grad_norm=1e30, epochs=4)


def test_the_first_prediction_is_the_mean_rate(clicks):
    model, _ = ctr_build.create(clicks, SMALL)
    mean = np.mean([click.rate for click in clicks])
    assert torch.sigmoid(model.head[-1].bias).item() == pytest.approx(mean, abs=1e-6)


# --- early stopping ------------------------------------------------------------------------------------------------------


class Script:
    """Epochs whose validation losses are known beforehand."""

    def __init__(self, losses):
        self.losses, self.trained, self.kept = losses, [], []

    def epoch(self, index):
        self.trained.append(index)
        return {"loss": 1.0 / (index + 1), "validation_loss": self.losses[index]}

    def keep(self):
        self.kept.append(self.trained[-1])


def test_it_stops_after_patience_and_keeps_the_best_epoch():
    script, lines = Script([5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.2, 1.0]), []
    figures = fit(script.epoch, script.keep, CTRTrainConfig(epochs=8, patience=3), lines.append)
    assert script.trained == [0, 1, 2, 3, 4, 5, 6] and script.kept == [0, 1, 3]
    assert (figures["best_epoch"], figures["epochs"], figures["validation_loss"]) == (4, 7, 3.0)
    assert figures["train_loss"] == 1 / 4 and "train.patience = 3" in lines[-1] and lines[0].endswith("best")


def test_it_goes_to_the_end_while_it_gets_better():
    script = Script([5.0, 6.0, 4.0, 5.0])
    assert fit(script.epoch, script.keep, CTRTrainConfig(epochs=4, patience=2), lambda line: None)["epochs"] == 4
    assert script.kept == [0, 2]


def test_without_validation_rows_all_epochs_are_trained(clicks):
    _, figures = train(clicks[:32], epochs=3, patience=1)
    assert figures["epochs"] == figures["best_epoch"] == 3 and "validation_loss" not in figures
    assert "rows" not in figures, "nor are there held-out rows"


def test_the_kept_weights_are_what_is_finished(clicks, tmp_path):
    made = learner(clicks[:32], SMALL, clicks[32:64])
    first = made.epoch(0)
    made.keep()
    kept = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.epoch(1)
    assert not all(torch.equal(kept[name], value) for name, value in made.model.state_dict().items())
    assert made.finish(tmp_path) == {}
    assert all(torch.equal(kept[name], value) for name, value in made.model.state_dict().items())
    written = load(tmp_path)[0].state_dict()
    assert all(torch.equal(kept[name], written[name]) for name in kept if kept[name].is_floating_point())
    assert made._validation_loss().item() == first["validation_loss"]


@pytest.mark.parametrize("counted", [True, False])
def test_the_validation_loss_is_that_of_its_rows(clicks, counted):
    rows = [click if counted else replace(click, impressions=None) for click in clicks]
    made = learner(rows[:32], SMALL, rows[32:43])
    said = made.predict(rows[32:43])
    p, y, n = said.predicted, said.rate.double(), said.impressions.double()
    if counted:
        expected = -(n * (y * p.log() + (1 - y) * (1 - p).log())).sum() / n.sum()
    else:
        expected = (torch.where(y > 0, 10.0, 1.0) * (p - y) ** 2).mean()
    assert made._validation_loss().item() == pytest.approx(expected.item(), rel=1e-5)


# --- updates -------------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch(clicks, backbones):
    """Also where one batch has far more impressions than the other."""
    rows = sorted(clicks[:16], key=lambda click: click.impressions)
    views = float(sum(click.impressions for click in rows))
    whole, parts = (without_noise(learner(rows, backbones, max_grad_norm=1e9)) for _ in range(2))
    before = weights(whole)

    def batches(made, size):
        return list(replace_size(made, size).ordered(rows))

    loss = whole.step(Update(batches=batches(whole, 16), count=1, impressions=views))
    again = parts.step(Update(batches=batches(parts, 4), count=4, impressions=views))
    assert again == pytest.approx(loss, rel=ROUNDING)
    moved = max((value - before[name]).abs().max().item() for name, value in weights(whole).items())
    assert moved > 1e-2
    for name, value in weights(parts).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=ROUNDING * moved, rtol=0)


def replace_size(made, size):
    return Batches(made.tokenizer, made.model.config, settings(batch_size=size))


def test_an_epoch_has_each_row_once_in_updates_of_accumulated_batches(clicks, backbones):
    made = learner(clicks[:43], backbones, batch_size=8, gradient_accumulation_steps=2)
    counts, rates, views = [], [], 0.0
    for update in made.batches.epoch(clicks[:43], seed=5):
        counts.append(update.count)
        views += update.impressions
        for batch in update.batches:
            rates += batch.rate.tolist()
            views -= batch.impressions.sum().item()
    assert counts == [2, 2, 1] and made.batches.updates(43) == 3 and views == 0
    assert len(rates) == 40  # the last three make no full batch
    known = sorted(click.rate for click in clicks[:43])
    assert all(min(abs(rate - k) for k in known) < 1e-6 for rate in rates)
    again = [rate for u in made.batches.epoch(clicks[:43], seed=5) for b in u.batches for rate in b.rate.tolist()]
    other = [rate for u in made.batches.epoch(clicks[:43], seed=6) for b in u.batches for rate in b.rate.tolist()]
    assert again == rates != other


def test_padding_that_no_row_needs_is_left_out_and_changes_nothing(clicks):
    made = learner(clicks[:8], SMALL)
    ids, mask = encode_items(made.tokenizer, [click.item for click in clicks[:8]], 40)
    batch = next(made.batches.ordered(clicks[:8]))
    assert batch.ids.shape[1] < 40
    with torch.inference_mode():
        full = made.model.eval()(batch.pixels, ids, mask)
    torch.testing.assert_close(made.predict(clicks[:8]).logit, full, atol=ROUNDING * full.abs().max().item(), rtol=0)


@pytest.mark.parametrize("frozen", [("text",), ("image",), ("text", "image")])
def test_frozen_backbones_do_not_move(clicks, tmp_path, frozen):
    """Neither their weights nor the running statistics of the ResNet's batch norms."""
    tokenizer = small_tokenizer(describe(click.item) for click in clicks)
    source = CTRModel(small_config(tokenizer, image_size=32, max_tokens=40))
    for name in ("text", "image"):
        getattr(source, name).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "text")
    section = CTRModelSection(text=str(tmp_path / "text"), image=str(tmp_path / "image"), image_size=32, max_tokens=40)
    made = learner(clicks[:32], section, freeze=frozen, text_learning_rate=1e-2, image_learning_rate=1e-2)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.epoch(0)
    moved = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    for name in ("text", "image"):
        assert any(key.startswith(f"{name}.") for key in moved) == (name not in frozen)
    assert any(key.startswith("head.") for key in moved)
    assert ("image.embedder.embedder.normalization.running_mean" in moved) == ("image" not in frozen)
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for name in frozen for p in getattr(made.model, name).parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_computes_in_it_and_steps_in_fp32(clicks, backbones, precision):
    exact = without_noise(learner(clicks[:16], backbones))
    mixed = without_noise(learner(clicks[:16], backbones, mixed_precision=precision))
    before = weights(mixed)
    seen = []
    mixed.model.head[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert mixed.epoch(0)["loss"] == pytest.approx(exact.epoch(0)["loss"], rel=2e-2)
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    moved = {name: value - before[name] for name, value in weights(mixed).items()}
    exactly = {name: value - before[name] for name, value in weights(exact).items()}
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    difference = sum((moved[name] - exactly[name]).square().sum() for name in moved)
    assert difference.sqrt() < 0.1 * sum(value.square().sum() for value in exactly.values()).sqrt()


def test_an_update_that_overflows_in_fp16_is_skipped(clicks, backbones):
    made = without_noise(learner(clicks[:16], backbones, mixed_precision="fp16"))
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = weights(made)
    assert math.isfinite(made.epoch(0)["loss"])
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert made.scaler.get_scale() == 2.0**99


# --- pretrained backbones ------------------------------------------------------------------------------------------------


def test_pretrained_backbones_are_loaded_and_learn_at_their_own_rates(clicks, backbones):
    model, _ = ctr_build.create(clicks, backbones)
    for name in ("text", "image"):
        state = type(getattr(model, name)).from_pretrained(getattr(backbones, name)).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(model, name).state_dict().items())
    assert model.wide is None, "FEAST's architecture has no wide part"
    rates = [group["lr"] for group in ctr_build.parameter_groups(model, backbones, CTRTrainConfig())]
    assert rates == [1e-3, 2e-5, 5e-6]
    scratch, _ = ctr_build.create(clicks, SMALL)
    groups = ctr_build.parameter_groups(scratch, SMALL, CTRTrainConfig())
    assert [group["lr"] for group in groups] == [3e-3] * 3
    assert sum(len(group["params"]) for group in groups) == len(list(scratch.parameters()))


def test_pretrained_backbones_train_and_load_back(clicks, backbones, tmp_path):
    made, figures = train(
        clicks[:32], clicks[32:48], clicks[48:64], section=backbones, folder=tmp_path, epochs=2, mixed_precision="bf16"
    )
    assert figures["rows"] == 16 and math.isfinite(figures["validation_loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration.png", "config.json", "model.safetensors", "predicted_vs_actual.png", "tokenizer",
    ]  # fmt: skip
    loaded, tokenizer = load(tmp_path)
    ids, mask = encode_items(tokenizer, [click.item for click in clicks[32:48]], 40)
    pixels = next(Batches(tokenizer, loaded.config, settings()).ordered(clicks[32:48])).pixels
    with torch.inference_mode():
        again = loaded.eval()(pixels, ids, mask)
    torch.testing.assert_close(
        again, made.predict(clicks[32:48]).logit, atol=ROUNDING * again.abs().max().item(), rtol=0
    )


def test_keys_that_do_not_fit_each_other():
    data = CTRDataConfig(path="x.csv")
    with pytest.raises(ValueError, match=r"train.batch_size = 32 .* train.ranks = 3"):
        TrainCTRConfig(data=data, train={"ranks": 3})
    with pytest.raises(ValueError, match=r"train.freeze = \['text'\] without model.text"):
        TrainCTRConfig(data=data, train={"freeze": ["text"]})


# --- ranks ---------------------------------------------------------------------------------------------------------------


def one_update(mesh, rank, world, rows, section, **config):
    """Train some updates without noise; every rank returns its weights and what the epoch said."""
    made = Learner(rows, section, settings(**config, ranks=world), seed=0, rank=rank)
    figures = without_noise(made).epoch(0)
    return weights(made), figures


def on_rank(mesh, *arguments):
    rows, section, config = arguments
    return one_update(mesh, mesh.get_rank(), mesh.size(), rows, section, **config)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_two_ranks_make_the_updates_of_one(two_ranks, clicks, backbones, precision):
    rows = Rows(train=clicks[:40], validation=clicks[40:51])
    config = dict(batch_size=8, gradient_accumulation_steps=2, mixed_precision=precision)
    start = weights(learner(clicks[:40], backbones))
    alone, figures = one_update(None, 0, 1, rows, backbones, **config)
    ranks = two_ranks.run(on_rank, rows, backbones, config)
    tolerance = 2e-5 if precision == "no" else 5e-3
    # The figures: in fp32 only sums are in another order; fp16 rounds some sixteen results in a row by up to eps / 2 each.
    rounding = ROUNDING if precision == "no" else 16 * torch.finfo(torch.float16).eps / 2
    for name, value in alone.items():
        assert torch.equal(ranks[0][0][name], ranks[1][0][name]), f"{name} differs between the ranks"
        torch.testing.assert_close(ranks[0][0][name], value, atol=tolerance, rtol=1e-3)
    assert max((value - start[name]).abs().max().item() for name, value in alone.items()) > 0.02
    assert ranks[0][1] == ranks[1][1] == pytest.approx(figures, rel=rounding)


def test_ranks_of_the_compound_loss_and_of_batch_norm_stay_together(two_ranks, clicks):
    rows = Rows(train=[replace(click, impressions=None) for click in clicks[:32]], validation=clicks[32:35])
    ranks = two_ranks.run(on_rank, rows, SMALL, dict(batch_size=8))
    assert all(torch.equal(value, ranks[1][0][name]) for name, value in ranks[0][0].items())
    assert ranks[0][1] == ranks[1][1]


def test_more_ranks_than_rows(two_ranks, clicks, backbones):
    with pytest.raises(AssertionError, match=r"1 training rows cannot be shared by train\.ranks = 2"):
        two_ranks.run(on_rank, Rows(train=clicks[:1]), backbones, dict(batch_size=8))
