"""From a place in the stream to tensors: the right latents for the right role, whichever way they come."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.data.batches import batches_of, noise_seed, t_seed
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.sizes import Sizes
from rlhf.data.stream import Visit
from rlhf.data.work import ExamplesPlace, IndexedExamples, OfflineWork
from rlhf.diffusion.process import RectifiedFlow, with_times
from rlhf.errors import Refused
from rlhf.models.family import Kind, stacked
from rlhf.tables import HeldOutConfig, PairDataConfig
from rlhf.training_tables import TrainerConfig
from rlhf.types import Encoded, Encoding, Geometry, noise_from
from tests.rlhf.data.pair_tables import encoded, index_of, png, row, write_jsonl, write_parquet

SIZE = Geometry(height=16, width=16)
SIZED = Sizes(sizes=(SIZE,))
KIND = Kind(folders=(), dtype=torch.float32)
PAIR = ("winner", "loser")


@dataclass(frozen=True)
class Plain:
    """What batches ask of a family: a text and each source is an encoding of its own."""

    process = RectifiedFlow()
    kinds = {"text": KIND, "picture": KIND}  # noqa: RUF012

    def encodings(self, prompt):
        return (Encoding(kind="text", text=prompt.instruction), *(self.target(s, SIZE) for s in prompt.sources))

    def target(self, source, geometry):
        return Encoding(kind="picture", sources=(source,), geometries=(geometry,))

    def tokens(self, latents):
        return latents.shape[-2] * latents.shape[-1]

    def unguided(self, prompt):
        return replace(prompt, instruction="")

    def bucket(self, prompt):
        return prompt.geometry, len(prompt.sources)

    def condition(self, rows, bucket):
        texts, *pictures = zip(*rows, strict=True)
        sources = {f"source_{i}": stacked(some)["latents"] for i, some in enumerate(pictures)}
        return stacked(texts) | sources


FAMILY = Plain()


def visit(row, mirrored=False, blank=False):
    return Visit(row=row, mirrored=mirrored, blank=blank, crop=(0.5, 0.5))


def examples_of(file, roles=PAIR, source_counts=range(1)):
    index = index_of(file, source_counts=source_counts, needs_loser="loser" in roles)
    return IndexedExamples(FAMILY, index, (SIZED,), roles)


def shown(examples, row):
    """An example as it is in its files."""
    (example,) = examples.index.examples(range(row, row + 1), SIZED)
    return example


def number(key: str) -> float:
    """A value that tells a key from every other."""
    return int(key[:6], 16) / 1000


def filled(folder, examples):
    """A cache whose every row holds its key's number."""
    cache, rows = EncodingCache(folder, {"text": "t", "picture": "p"}), {}
    for i in range(len(examples.index.table)):
        for mirrored in (False, True):
            for blank in (False, True):
                for encoding in examples.encodings(visit(i, mirrored, blank)):
                    key = cache.key(encoding)
                    name, shape = ("prompt_embeds", (3, 5)) if encoding.text is not None else ("latents", (4, 2, 2))
                    rows[key] = Encoded(tensors={name: torch.full(shape, number(key))})
    commit(folder, [write_part(folder, rows)])
    return cache


def value(cache, encoding) -> float:
    return pytest.approx(number(cache.key(encoding)))


def test_roles_follow_the_label_and_mirrored_pairs_are_other_rows(tmp_path):
    examples = examples_of(write_parquet(tmp_path / "p.parquet", [row(i, label=i % 2) for i in range(4)]))
    cache = filled(tmp_path / "cache", examples)
    for v in (visit(0), visit(1), visit(1, mirrored=True), visit(3, blank=True)):
        encoded = examples.encoded(v, cache.row)
        pictures = shown(examples, v.row).targets
        assert (pictures["winner"].cell.column == "jpg_0") == (v.row % 2 == 1)
        for role in PAIR:
            x0 = encoded.x0[role]
            assert x0.shape == (4, 2, 2) and x0.dtype == torch.float32
            target = FAMILY.target(replace(pictures[role], mirrored=v.mirrored), SIZE)
            assert x0[0, 0, 0].item() == value(cache, target)
        text = Encoding(kind="text", text="" if v.blank else f"a dish {v.row}")
        assert encoded.rows[0]["prompt_embeds"][0, 0].item() == value(cache, text)


def test_a_target_is_what_is_preferred_and_no_loser_is_touched(tmp_path):
    examples = examples_of(write_parquet(tmp_path / "p.parquet", [row(i, label=i % 2) for i in range(2)]), ("target",))
    pairs = examples_of(write_parquet(tmp_path / "q.parquet", [row(i, label=i % 2) for i in range(2)]))
    for i in range(2):
        _, target = examples.encodings(visit(i))  # a text and one picture
        assert target.sources[0].content == shown(pairs, i).targets["winner"].content


def test_edit_families_get_the_source_mirrored_with_its_pair(tmp_path):
    examples = examples_of(write_jsonl(tmp_path, 2, source=True), source_counts=range(1, 2))
    cache = filled(tmp_path / "cache", examples)
    plain, mirrored = (examples.encoded(visit(1, way), cache.row).rows[1]["latents"] for way in (False, True))
    (source,) = shown(examples, 1).prompt.sources
    assert plain[0, 0, 0].item() == value(cache, FAMILY.target(source, SIZE))
    assert mirrored[0, 0, 0].item() == value(cache, FAMILY.target(replace(source, mirrored=True), SIZE))
    assert not torch.equal(plain, mirrored)


def test_handed_rows_take_the_place_of_cached_ones_and_texts_stay(tmp_path):
    examples = examples_of(write_parquet(tmp_path / "p.parquet", [row(i) for i in range(3)]))
    cache = filled(tmp_path / "cache", examples)
    _, *pictures = examples.encodings(visit(2))
    rows = {encoding: {"latents": torch.full((4, 2, 2), float(i))} for i, encoding in enumerate(pictures)}
    encoded = examples.encoded(visit(2), lambda encoding: rows[encoding] if encoding in rows else cache.row(encoding))
    assert [encoded.x0[role][0, 0, 0].item() for role in PAIR] == [0, 1]
    text = examples.encoded(visit(2), cache.row).rows[0]["prompt_embeds"]
    assert torch.equal(encoded.rows[0]["prompt_embeds"], text)


def test_a_batch_has_the_noise_of_its_indices(tmp_path):
    examples = examples_of(write_parquet(tmp_path / "p.parquet", [row(i) for i in range(3)]))
    cache = filled(tmp_path / "cache", examples)
    encoded = [examples.encoded(visit(i), cache.row) for i in (0, 2)]
    (batch,) = batches_of(FAMILY, encoded, 2, seed=5, step=3, first_index=4)
    assert batch.t.tolist() == [pytest.approx(RectifiedFlow().draw_t(t_seed(5, 3, index), 1)) for index in (4, 5)]
    assert torch.equal(batch.noise, torch.stack([noise_from(noise_seed(5, 3, i), (4, 2, 2)) for i in (4, 5)]))
    assert {role: tensor.tolist() for role, tensor in batch.weight.items()} == {role: [1, 1] for role in PAIR}


def test_examples_of_two_buckets_are_no_batch(tmp_path):
    examples = examples_of(write_parquet(tmp_path / "p.parquet", [row(i) for i in range(2)]))
    cache = filled(tmp_path / "cache", examples)
    first, second = (examples.encoded(visit(i), cache.row) for i in range(2))
    with pytest.raises(AssertionError, match="one bucket"):
        batches_of(FAMILY, [first, replace(second, bucket="other")], 2, seed=0, step=1, first_index=0)


def write_masked(folder: Path) -> Path:
    """Two targets, a.png with a mask of which the left half is white."""
    folder.mkdir()
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:, :8] = 255
    for name, content in (("a.png", png(1, 16, 16)), ("b.png", png(2, 16, 16)), ("a_mask.png", encoded(mask))):
        (folder / name).write_bytes(content)
    for stem in "ab":
        (folder / f"{stem}.txt").write_text(stem)
    return folder


def test_a_mask_weighs_the_latents_that_lie_under_it(tmp_path):
    examples = examples_of(write_masked(tmp_path / "set"), roles=("target",))
    cache = filled(tmp_path / "cache", examples)
    masked, mirrored, plain = (examples.encoded(v, cache.row) for v in (visit(0), visit(0, mirrored=True), visit(1)))
    assert (
        masked.mask.tolist() == [[1, 0], [1, 0]] and mirrored.mask.tolist() == [[0, 1], [0, 1]] and plain.mask is None
    )
    (batch,) = batches_of(FAMILY, [masked, mirrored, plain], 3, seed=0, step=1, first_index=0, mask_weight=3.0)
    weights = batch.loss_mask["target"]
    assert weights.shape == (3, 1, 2, 2) and set(batch.loss_mask) == {"target"}
    assert weights[:, 0].tolist() == [[[3, 1], [3, 1]], [[1, 3], [1, 3]], [[1, 1], [1, 1]]]
    (batch,) = batches_of(FAMILY, [plain], 1, seed=0, step=1, first_index=0, mask_weight=3.0)
    assert batch.loss_mask == {}


def test_a_mask_that_changed_after_the_check_is_refused(tmp_path):
    examples = examples_of(write_masked(tmp_path / "set"), roles=("target",))
    cache = filled(tmp_path / "cache", examples)
    (tmp_path / "set/a_mask.png").write_bytes(png(3, 16, 16))
    with pytest.raises(Refused, match=r"a_mask\.png changed since it was checked"):
        examples.encoded(visit(0), cache.row)


def test_offline_work_uses_the_weight_of_the_recipe(tmp_path):
    examples = examples_of(write_masked(tmp_path / "set"), roles=("target",))
    place = ExamplesPlace(path=tmp_path / "set.index", sizes=(SIZED,))
    data = PairDataConfig(path="x", hflip=False, caption_dropout=0, shuffle=False, mask_weight=5.0)
    trainer = TrainerConfig(train_batch_size=2, gradient_accumulation_steps=1)
    held_out = HeldOutConfig(path="x", max_pairs=2, draws=1)
    cache = filled(tmp_path / "cache", examples)
    one = OfflineWork(trainer, data, held_out, cache, place, place, roles=("target",), seed=0)
    one.open(FAMILY)
    for (batch,) in (one.batches(1, 0, None, ()), one.held_out(0)):
        assert batch.loss_mask["target"][:, 0].tolist() == [[[5, 1], [5, 1]], [[1, 1], [1, 1]]]


def work(tmp_path: Path, ranks: int, batch: int) -> OfflineWork:
    examples = examples_of(write_parquet(tmp_path / "p.parquet", [row(i) for i in range(8)]))
    place = filled(tmp_path / "cache", examples)
    there = ExamplesPlace(path=tmp_path / "p.index", sizes=(SIZED,))
    trainer = TrainerConfig(ranks=ranks, train_batch_size=batch, gradient_accumulation_steps=4 // ranks // batch)
    opened = OfflineWork(
        trainer, PairDataConfig(path="p"), HeldOutConfig(draws=2), place, there, there, roles=PAIR, seed=3
    )
    opened.open(FAMILY)
    return opened


def test_an_update_has_the_same_examples_and_noise_however_it_is_split(tmp_path):
    whole = work(tmp_path / "one", 1, 4).batches(2, 0, None, [])
    split = work(tmp_path / "two", 2, 1)
    parts = [batch for rank in range(2) for batch in split.batches(2, rank, None, [])]
    assert [len(batch.t) for batch in (*whole, *parts)] == [4, 1, 1, 1, 1]
    assert torch.equal(torch.cat([batch.noise for batch in parts]), whole[0].noise)
    assert torch.equal(torch.cat([batch.x0["winner"] for batch in parts]), whole[0].x0["winner"])


def test_every_update_and_every_example_has_noise_and_a_time_of_its_own(tmp_path):
    """Where a generator was seeded anew in every update, all updates would train at the same few."""
    places = work(tmp_path, 1, 4)
    batches = [places.batches(step, 0, None, [])[0] for step in range(1, 6)]
    times = torch.cat([batch.t for batch in batches])
    noise = torch.cat([batch.noise for batch in batches]).flatten(1)
    assert len(set(times.tolist())) == 20 == len(noise.unique(dim=0))


def test_training_times_are_those_of_the_recipe(tmp_path):
    places = work(tmp_path, 1, 4)
    own = places.batches(2, 0, None, [])[0].t
    places._trainer = places._trainer.model_copy(update={"timesteps": "uniform", "timestep_shift": "tokens"})
    places.open(FAMILY)
    (batch,) = places.batches(2, 0, None, [])
    process = with_times(RectifiedFlow(), "uniform", "tokens")
    assert batch.t.tolist() == [pytest.approx(process.draw_t(t_seed(3, 2, index), 4)) for index in range(4)]
    assert not torch.equal(batch.t, own)


def test_what_is_held_out_is_always_the_same(tmp_path):
    opened = work(tmp_path, 2, 1)
    first, again = opened.held_out(1), opened.held_out(1)
    assert len(first) == 2 * 4, "two draws of this rank's half of eight pairs"
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.x0["loser"], other.x0["loser"])
    assert not torch.equal(first[0].noise, first[4].noise), "the second draw has other noise"


def test_rows_from_encoders_are_copied(tmp_path):
    """What comes out of the object store cannot be written to."""
    opened = work(tmp_path, 1, 4)
    indexed = examples_of(tmp_path / "p.parquet")
    v = opened._stream[4]
    frozen = np.full((4, 2, 2), 7, np.float32)
    frozen.setflags(write=False)
    handed = {encoding: {"latents": frozen} for encoding in indexed.encodings(v) if encoding.sources}
    (batch,) = opened.batches(2, 0, None, [handed])
    assert (batch.x0["winner"][0] == 7).all() and (batch.x0["winner"][1] != 7).all()
