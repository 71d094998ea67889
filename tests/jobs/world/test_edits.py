"""The edit model predicts 0 at first, knows the instructions' words, and learns from checked triples."""

import json

import pytest
import torch

from jobs.world import edits, vae
from rlhf.diffusion.objectives import SFT
from rlhf.models import load_family
from rlhf.types import POLICY
from tests.jobs.world.shots import shots


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return edits.write_untrained(tmp_path_factory.mktemp("edits") / "kontext", vae.untrained())


@pytest.fixture(scope="module")
def examples(folder, tmp_path_factory):
    triples = edits.write_triples(tmp_path_factory.mktemp("triples"), shots(), 64, seed=0)
    lines = [json.loads(line) for line in triples.read_text().splitlines()]
    assert len(lines) == 64 and {line["prompt"] for line in lines} <= set(edits.texts())
    return edits.encode(load_family(edits.model_of(folder)), triples)


def test_every_word_of_an_instruction_is_a_token_and_chinese_is_unknown(folder):
    codec = load_family(edits.model_of(folder)).load_codec("cpu")
    clip, _, t5, _ = codec._text
    for text in edits.texts():
        if text.isascii():
            words = text.replace(".", " .").replace(",", " ,").split()
            assert len(t5(text).input_ids) <= len(words) + 1 <= edits.TOKENS
            assert len(clip(text).input_ids) == len(words) + 2
        else:
            assert t5.unk_token_id in t5(text).input_ids


def test_an_untrained_model_predicts_0_and_training_lowers_the_loss(folder, examples, tmp_path):
    family = load_family(edits.model_of(folder))
    work = edits.InMemory(examples, seed=0)
    work.open(family)
    (batch,) = work.batches(1, 0, None, ())

    def loss() -> float:
        denoiser = family.load_denoiser("cpu")
        with torch.no_grad():
            predict = {POLICY: lambda x, t, c: family.predict(denoiser, x, t, c)}
            found, _ = SFT()(predict, family.process, batch)
        return found.item()

    noise, x0 = batch.noise, batch.x0["target"]
    before = loss()
    assert before == pytest.approx((noise - x0).square().mean().item(), rel=1e-4)
    edits.train_edits(folder, examples, tmp_path, steps=60, seed=0)
    rows = [json.loads(line) for line in next(tmp_path.glob("runs/edits/*/metrics.jsonl")).read_text().splitlines()]
    losses = [row["train/loss"] for row in rows]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert loss() < before  # the average of the weights is what is kept, and has only begun to follow
