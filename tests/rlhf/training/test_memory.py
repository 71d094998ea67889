"""The peak of a trainer rank: state that can be counted by hand, and what the keys of a recipe change."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from actors import cards
from jobs.benchmarks.trainer_memory import write_shapes
from rlhf.diffusion.objectives import DPO
from rlhf.models.flux_kontext import FluxKontext
from rlhf.training.memory import trainer_peak
from rlhf.training_tables import TrainerConfig
from rlhf.types import Geometry, Prompt, Source
from tests import worlds

RANKS = 2
PROMPT = Prompt(
    key="",
    instruction="",
    sources=(Source(path="", content="", height=48, width=32),),
    geometry=Geometry(height=128, width=128),
)


def peaks(path, how, tables):
    """Of one rank under each table, in one process."""
    family = worlds.family(path, torch.bfloat16)
    found = []
    for keys in tables:
        config = TrainerConfig(ranks=RANKS, **{"train_batch_size": 2, "gradient_accumulation_steps": 2, **keys})
        trainable = worlds.trainable(how, family)
        found.append(trainer_peak(family, config, trainable, DPO(beta=1.0), PROMPT).kinds)
    trained = sum(p.numel() for p in trainable.trained(_added(family, trainable)).values())
    return trained, found


def _added(family, trainable):
    denoiser = family.empty_denoiser(family.dtype)
    trainable.add(denoiser, ("reference",), torch.float32)
    return denoiser


@pytest.fixture(scope="module")
def traced(kontext):
    """`peaks`, in a process of its own: it starts a process group."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda how, *tables: pool.submit(peaks, kontext, how, tables).result(timeout=300)


def about(count):
    """Rows of an odd count are padded on the first rank."""
    return pytest.approx(count, rel=0.1)


def test_state_is_what_can_be_counted_and_offloading_takes_it_away(traced):
    trained, (plain, reference, optimizer, bits, prodigy, sgd) = traced(
        "full",
        {"ema_decay": 0.9},
        {"ema_decay": 0.9, "offload": "reference"},
        {"ema_decay": 0.9, "offload": "optimizer"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "sgd"},
    )
    shard = 4 * trained / RANKS
    assert plain["parameters"] == plain["gradients"] == plain["average"] == about(shard)
    assert plain["optimizer"] == about(2 * shard) and plain["frozen sides"] == about(shard / 2)
    assert plain["activations"] > 0 and plain["temporaries"] > 0
    assert reference == plain | {"average": 0, "frozen sides": 0}
    state = ("average", "frozen sides", "parameters", "gradients", "optimizer")
    assert optimizer == plain | dict.fromkeys(state, 0)
    assert bits["optimizer"] == about(shard / 2) and "average" not in bits
    assert prodigy["optimizer"] == about(4 * shard) and sgd["optimizer"] == about(shard)


def remedied(folder):
    """(what to set, the peak that it is said to give, the peak of that recipe traced anew), in bytes, of each remedy."""
    family, told = FluxKontext(path=folder), []
    config = TrainerConfig(ranks=4, train_batch_size=2, gradient_accumulation_steps=2, ema_decay=0.9)
    prompt = replace(PROMPT, geometry=Geometry(height=512, width=512))

    def peak_of(changed):
        return trainer_peak(family, changed, worlds.trainable("full", family), DPO(beta=1.0), prompt)

    for what, said in cards.trainer_remedies(config, peak_of(config)):
        key, value = what.removeprefix("trainer.").split(" and ")[0].split(" = ")
        told.append((what, said.nbytes, peak_of(config.model_copy(update={key: json.loads(value)})).nbytes))
    return told


@pytest.mark.slow
def test_a_remedys_figure_is_what_the_recipe_takes_with_it(tmp_path):
    """Blocks of Kontext's own width, and few of them."""
    write_shapes(tmp_path, layers=2, single_layers=4, heads=24, head_dim=128, channels=16)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = pool.submit(remedied, tmp_path).result(timeout=600)
    assert len(told) == 6
    for what, said, traced in told:
        assert said == pytest.approx(traced, rel=0.05), what


@pytest.mark.slow
def test_activations_follow_the_batch_and_what_is_recomputed(traced):
    _, (one, two, half, none) = traced(
        "full",
        {"train_batch_size": 1},
        {"train_batch_size": 2},
        {"train_batch_size": 2, "gradient_checkpointing": "half"},
        {"train_batch_size": 2, "gradient_checkpointing": "none"},
    )
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.25)
    assert two["activations"] < half["activations"] < none["activations"]


def test_lora_keeps_its_base_and_its_sides_in_one_network(traced, kontext):
    trained, (peak,) = traced("lora", {})
    assert peak["gradients"] == pytest.approx(4 * trained / RANKS, rel=0.1)
    sides = 2 * 4 * trained  # policy and reference
    base = 2 * sum(p.numel() for p in worlds.family(kontext).empty_denoiser(torch.bfloat16).parameters())
    assert "frozen sides" not in peak and peak["parameters"] == pytest.approx((base + sides) / RANKS, rel=0.1)
