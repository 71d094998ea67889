"""The audit of an online run: written before a step trains, in any split over ranks, and enough to train on it again."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from rlhf.data.audit import read_pairs, recorded_prompt
from rlhf.data.batches import batches_of, latents_to_array
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.records import BadInput
from rlhf.data.stream import Visit
from rlhf.data.work import OnlineWork, RecordedExamples, check_record, is_record, record_size
from rlhf.runs.folder import Fence, Fenced, RunFolder
from rlhf.training_tables import TrainerConfig
from rlhf.types import Candidate, Cell, Encoded, Geometry, Pair, Prompt, Score, Source, Verdict
from tests.rlhf.data.test_work import FAMILY, SIZE, number, value

PASSED = Verdict(valid=True, pass_probability=0.75)


def prompt(i: int) -> Prompt:
    cell = Cell(part=1, row=i, column="jpg", number=i + 1) if i % 2 else None
    source = Source(
        path=f"/{i}.png",
        cell=cell,
        content=f"bytes {i}",
        fit="pad",
        mirrored=i == 2,
        crop=(0.25, 0.5),
        height=48,
        width=32,
    )
    return Prompt(key=f"id {i}", instruction=f"edit {i}", sources=(source,), item={"a": "b"}, geometry=SIZE)


def pair(i: int) -> Pair:
    def candidate(attempt):
        return Candidate(cursor=i, attempt=attempt, version=7 + attempt, media=None, latents=None)

    winner, loser = (Score(verdict=PASSED, rewards={"hps": high}) for high in (0.5, 0.25))
    return Pair(
        prompt=prompt(i),
        cursor=i,
        winner=candidate(0),
        loser=candidate(3),
        winner_score=winner,
        loser_score=loser,
        margin=0.25,
        margins={"hps": 0.25},
    )


def latents(i: int, side: int) -> np.ndarray:
    """bf16 numbers that tell candidates apart."""
    return latents_to_array(torch.full((4, 2, 2), i + side / 4))


PAIRS = [pair(i) for i in range(4)]
VALUES = [latents(i, side) for i in range(4) for side in (0, 1)]


PRINTS = {"text": "t", "picture": "p"}


@pytest.fixture
def world(tmp_path):
    """A claimed run and the cache of its prompts' encodings."""
    rows, cache = {}, EncodingCache(tmp_path / "cache", PRINTS)
    for one in PAIRS:
        for encoding in FAMILY.encodings(one.prompt):
            name, shape = ("prompt_embeds", (3, 5)) if encoding.text is not None else ("latents", (4, 2, 2))
            rows[cache.key(encoding)] = Encoded(tensors={name: torch.full(shape, number(cache.key(encoding)))})
    commit(cache.folder, [write_part(cache.folder, rows)])
    run = RunFolder.claim(tmp_path, "run", "")
    yield run, cache
    run.release()


def work(world, ranks=1, **changes) -> OnlineWork:
    run, cache = world
    trainer = TrainerConfig(ranks=ranks, train_batch_size=2, gradient_accumulation_steps=2 // ranks)
    settings = dict(seed=5, save_latents=True) | changes
    opened = OnlineWork(trainer, cache, run.path / "pairs", Fence(path=run.path, epoch=run.epoch), **settings)
    opened.open(FAMILY)
    return opened


def test_batches_hold_the_pairs_in_order_with_their_conditions(world):
    first, second = work(world).batches(3, 0, PAIRS, VALUES)
    assert first.x0["winner"][:, 0, 0, 0].tolist() == [0, 1] and second.x0["loser"][:, 0, 0, 0].tolist() == [2.25, 3.25]
    cache = world[1]
    text, source = FAMILY.encodings(PAIRS[2].prompt)
    assert second.condition["prompt_embeds"][0, 0, 0].item() == value(cache, text)
    assert second.condition["source_0"][0, 0, 0, 0].item() == value(cache, source)


def test_ranks_write_and_train_on_the_same_as_one(world):
    whole = work(world).batches(3, 0, PAIRS, VALUES)
    recorded = read_pairs(world[0].path / "pairs")
    for file in (world[0].path / "pairs").iterdir():
        file.unlink()
    split = work(world, ranks=2)
    parts = [b for rank in (0, 1) for b in split.batches(3, rank, PAIRS[2 * rank :][:2], VALUES[4 * rank :][:4])]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.t, other.t)
        assert torch.equal(one.x0["winner"], other.x0["winner"])
    assert read_pairs(world[0].path / "pairs") == recorded
    assert [row["index"] for row in recorded] == [0, 1, 2, 3]
    assert [row["t"] for row in recorded] == pytest.approx(torch.cat([batch.t for batch in whole]).tolist())


def test_the_record_names_everything_that_was_trained_on(world):
    cache, online = world[1], work(world)
    online.batches(3, 0, PAIRS, VALUES)
    for i, row in enumerate(read_pairs(world[0].path / "pairs")):
        assert recorded_prompt(row) == replace(PAIRS[i].prompt, item={})
        assert row["encoding_keys"] == [cache.key(encoding) for encoding in FAMILY.encodings(PAIRS[i].prompt)]
        assert (row["step"], row["cursor"], row["margin"], row["latents_shape"]) == (3, i, 0.25, [4, 2, 2])
        assert (row["winner_version"], row["loser_version"], row["loser_attempt"]) == (7, 10, 3)
        assert row["winner_rewards"] == [("hps", 0.5)] and row["loser_pass_probability"] == 0.75
        assert row["winner_latents"] == VALUES[2 * i].tobytes()
    assert (
        len({row[name] for row in read_pairs(world[0].path / "pairs") for name in ("winner_seed", "loser_seed")}) == 8
    )


@dataclass(frozen=True)
class Sized(type(FAMILY)):
    def latent_shape(self, geometry):
        return 4, geometry.height // 8, geometry.width // 8


def check(world, geometry=SIZE, family=Sized(), folder=None, fingerprints=PRINTS):
    run, cache = world
    check_record(run.path / "pairs", family, EncodingCache(folder or cache.folder, fingerprints), geometry)


def test_a_record_trains_again_on_the_same_latents(world):
    online = work(world).batches(3, 0, PAIRS, VALUES)
    folder = world[0].path / "pairs"
    assert is_record(folder) and record_size(folder) == 4
    check(world)
    examples = RecordedExamples(FAMILY, folder, ("winner", "loser"))
    targets = RecordedExamples(FAMILY, folder, ("target",))
    assert examples.block_sizes == (4,)
    for i in range(4):
        visit = Visit(row=i)
        again = examples.encoded(visit, world[1].row)
        (batch,) = batches_of(FAMILY, [again], 1, seed=0, step=1, first_index=0)
        for role in ("winner", "loser"):
            assert torch.equal(batch.x0[role][0], online[i // 2].x0[role][i % 2])
        assert all(
            torch.equal(batch.condition[name][0], online[i // 2].condition[name][i % 2]) for name in batch.condition
        )
        assert torch.equal(targets.encoded(visit, world[1].row).x0["target"], again.x0["winner"])


@pytest.mark.parametrize(
    ("asked", "field", "what"),
    [
        (
            {"geometry": Geometry(height=16, width=32)},
            "height, width, frames",
            "are 16 × 16 × 1, but model.height × width × frames is 16 × 32 × 1",
        ),
        ({"fingerprints": {"text": "t", "picture": "other"}}, "encoding_keys", "were made by another model"),
        ({"folder": "none"}, "encoding_keys", "are not all in data.cache"),
    ],
)
def test_a_record_that_this_model_cannot_train_on_is_refused_pair_by_pair(world, asked, field, what):
    work(world).batches(3, 0, PAIRS, VALUES)
    with pytest.raises(BadInput) as caught:
        check(world, **asked)
    assert [(problem.line, problem.field) for problem in caught.value.problems] == [(i, field) for i in (1, 2, 3, 4)]
    assert all(problem.what.startswith(what) for problem in caught.value.problems)


def test_a_record_without_latents_cannot_be_trained_on(world):
    work(world, save_latents=False).batches(3, 0, PAIRS, VALUES)
    with pytest.raises(BadInput, match=r"latents: are missing; only a run with run\.save_latents = true"):
        check(world)


def test_nothing_is_written_once_another_driver_has_the_folder(world):
    opened = work(world)
    (epoch,) = [file for file in world[0].path.iterdir() if file.name == "epoch"]
    epoch.write_text(str(world[0].epoch + 1))
    with pytest.raises(Fenced):
        opened.batches(3, 0, PAIRS, VALUES)
    assert not (world[0].path / "pairs").exists()
