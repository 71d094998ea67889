"""The edit models predict 0 at first, know the instructions' words, and learn from checked triples."""

import json

import pytest
import torch

from jobs.world import edits
from rlhf.diffusion.objectives import SFT
from rlhf.models import load_family
from rlhf.types import POLICY
from tests.jobs.world.shots import shots


@pytest.fixture(scope="module", params=edits.EDIT_MODELS)
def model(tmp_path_factory, request):
    torch.manual_seed(0)
    found = edits.model_of(tmp_path_factory.mktemp("edits") / request.param, request.param)
    edits.write_untrained(found, edits.EDIT_MODELS[request.param].vae())
    return found


@pytest.fixture(scope="module")
def examples(model, tmp_path_factory):
    triples = edits.write_triples(tmp_path_factory.mktemp("triples"), shots(), 64, seed=0)
    lines = [json.loads(line) for line in triples.read_text().splitlines()]
    assert len(lines) == 64 and {line["prompt"] for line in lines} <= set(edits.texts())
    return edits.encode(load_family(model), triples)


def test_every_word_of_an_instruction_is_a_token_of_kontext_and_chinese_is_unknown(tmp_path):
    model = edits.model_of(tmp_path / "kontext")
    edits.write_untrained(model, edits.EDIT_MODELS[model.family].vae())
    codec = load_family(model).load_codec("cpu")
    clip, _, t5, _ = codec._text
    for text in edits.texts():
        if text.isascii():
            words = text.replace(".", " .").replace(",", " ,").split()
            assert len(t5(text).input_ids) <= len(words) + 1 <= 12
            assert len(clip(text).input_ids) == len(words) + 2
        else:
            assert t5.unk_token_id in t5(text).input_ids


def test_every_word_of_an_instruction_is_a_token_of_qwen(tmp_path):
    model = edits.model_of(tmp_path / "qwen", "qwen_image_edit")
    edits.write_untrained(model, edits.EDIT_MODELS[model.family].vae())
    tokenizer = load_family(model).load_codec("cpu")._tokenizer
    for text in filter(str.isascii, edits.texts()):
        words = text.replace(".", " .").replace(",", " ,").split()
        assert len(tokenizer(text).input_ids) == len(words)


def test_an_untrained_model_predicts_0_and_training_lowers_the_loss(model, examples, tmp_path):
    family = load_family(model)
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
    edits.train_edits(model, examples, tmp_path, steps=60, seed=0)
    rows = [json.loads(line) for line in next(tmp_path.glob("runs/edits/*/metrics.jsonl")).read_text().splitlines()]
    losses = [row["train/loss"] for row in rows]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert loss() < before  # the average of the weights is what is kept, and has only begun to follow
