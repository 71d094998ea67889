"""A family unlike those of `rlhf.models` goes through conditions, sampling, training, publication and exports.

What every family must do is in `test_families.py`; here is what only `tests.strange` asks of the rest.
"""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from rlhf.data.batches import EncodedExample, batches_of, condition_of, unguided_of
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.encoding import encode_all as encode_files
from rlhf.data.sampler import encodings_for_sampling, sample_prompts
from rlhf.data.sizes import Sizes
from rlhf.data.stream import Visit
from rlhf.data.work import IndexedExamples
from rlhf.diffusion.objectives import DPO, SFT
from rlhf.errors import Refused
from rlhf.models.family import sample_batch
from rlhf.models.lora import load_modules
from rlhf.models.trainable import load_for_sampling
from rlhf.shards import buffers, distributed
from rlhf.tables import SamplingTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainerConfig
from rlhf.types import POLICY, REFERENCE, Geometry, Prompt, Source, noise_from
from tests import strange, worlds
from tests.encoded import encode_all, tensors_of
from tests.rlhf.data.pair_tables import index_of, png

KIND = "tests.strange:Strange"
CLIP = Geometry(height=48, width=32, frames=3)
TEXTS = ("", "warm", "make it warm", "put the soup of the first picture on the table of the second one")
SAMPLING = SamplingTable(steps=3, batch_size=4, guidance_scale=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return strange.write(tmp_path_factory.mktemp("strange") / "model")


@pytest.fixture(scope="module")
def family(folder):
    return worlds.family(folder, kind=KIND)


def medium(name: str, geometry: Geometry) -> torch.Tensor:
    """Noise, uint8 (F, H, W, 3), that the name decides."""
    shape = (geometry.frames, geometry.height, geometry.width, 3)
    seed = sum(name.encode())
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def prompt(i: int, sources: int, geometry: Geometry = CLIP) -> Prompt:
    several = tuple(Source(path="", content=f"{i}.{j}", height=48, width=32) for j in range(sources))
    return Prompt(key=str(i), instruction=TEXTS[i % len(TEXTS)], sources=several, geometry=geometry)


def encoded(family, encodings):
    """Rows of encodings, their media in memory at the sizes that are asked for."""
    codec, rows = family.load_codec("cpu"), {}
    for encoding in encodings:
        media = {s.content: medium(s.content, g) for s, g in zip(encoding.sources, encoding.geometries, strict=True)}
        rows |= encode_all(codec, [encoding], media, 1)
    return rows


def handed(family, prompts):
    wanted = [e for one in prompts for e in encodings_for_sampling(family, one, SAMPLING)]
    return tensors_of(encoded(family, wanted))


def examples_of(family, sources, texts, roles):
    """Examples of three frames of one bucket: the prompts whose texts are `texts`, with so many sources."""
    found = []
    for i in texts:
        one = prompt(i, sources)
        prompts = [e for e in family.encodings(one)]
        targets = {
            role: family.target(Source(path="", content=f"{role} {i}", height=48, width=32), CLIP) for role in roles
        }
        rows = encoded(family, [*prompts, *targets.values()])
        found.append(
            EncodedExample(
                rows=[rows[encoding].tensors for encoding in prompts],
                bucket=family.bucket(one),
                x0={role: rows[encoding].tensors["latents"].float() for role, encoding in targets.items()},
            )
        )
    return found


# --- conditions --------------------------------------------------------------------------------------------------------


def test_rows_are_of_unequal_lengths_and_a_condition_of_the_buckets(family):
    prompts = [prompt(i, 2) for i in (0, 1, 2)]
    assert len({family.bucket(one) for one in prompts}) == 1
    rows = handed(family, prompts)
    lengths = [len(rows(family.encodings(one)[0])["read"]) for one in prompts]
    assert lengths == [1 + 2 * 6, 2 + 2 * 6, 4 + 2 * 6]
    whole = condition_of(family, rows, prompts)
    assert whole["read"].shape == (3, 4 + 2 * 6, strange.READ)
    assert whole["sources"].shape == (3, 2, 4, 1, 6, 4)
    assert whole["there"].sum(1).tolist() == lengths
    for i, one in enumerate(prompts):
        alone = condition_of(family, rows, [one])
        assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)


def test_buckets_tell_numbers_of_sources_and_lengths_apart(family):
    assert len({family.bucket(prompt(i, sources)) for i in (0, 3) for sources in (1, 2)}) == 4
    one, two = (family.encodings(prompt(0, sources)) for sources in (1, 2))
    assert [len(found) for found in (one, two)] == [2, 3]
    assert [[e.kind for e in found] for found in (one, two)] == [["both", "picture"], ["both", "picture", "picture"]]
    with pytest.raises(Refused, match="'7' has 3 sources; Strange edits one or two"):
        family.bucket(prompt(7, 3))


def test_what_is_read_of_a_text_depends_on_the_pictures_and_their_order(family):
    there = prompt(2, 2)
    turned = replace(there, sources=there.sources[::-1])
    (both, *_), (other, *_) = family.encodings(there), family.encodings(turned)
    rows = encoded(family, [both, other])
    cache = EncodingCache("", {both.kind: "x"})
    assert cache.key(both) != cache.key(other)
    assert not torch.equal(rows[both].tensors["read"], rows[other].tensors["read"])


def test_rows_with_whole_numbers_go_through_the_cache(family, tmp_path):
    rows, cache = (
        encoded(family, family.encodings(prompt(1, 2))),
        EncodingCache(tmp_path, dict.fromkeys(family.kinds, "x")),
    )
    commit(tmp_path, [write_part(tmp_path, {cache.key(encoding): row for encoding, row in rows.items()})])
    for encoding, row in rows.items():
        found = cache.row(encoding)
        assert found.keys() == row.tensors.keys()
        assert all(
            found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in row.tensors.items()
        )


def test_the_unguided_condition_is_as_long_as_the_prompts_own(family):
    prompts = [prompt(3, 1), prompt(7, 1)]
    rows = handed(family, prompts)
    condition, unguided = condition_of(family, rows, prompts), unguided_of(family, rows, prompts, SAMPLING)
    assert {name: tensor.shape for name, tensor in condition.items()} == {
        name: tensor.shape for name, tensor in unguided.items()
    }
    assert unguided["there"].sum() < condition["there"].sum()


def test_captions_that_are_dropped_share_the_batch_of_those_that_are_not(family, tmp_path):
    """An empty text is read as fewer words, but its rows go where its prompt's went."""
    lines = []
    for i in range(2):
        for j, role in enumerate(("source", "target")):
            (tmp_path / f"{i}_{role}.png").write_bytes(png(2 * i + j, 48, 32))
        lines.append({"prompt": TEXTS[3], "target": f"{i}_target.png", "source": [f"{i}_source.png"]})
    (tmp_path / "targets.jsonl").write_text("\n".join(map(json.dumps, lines)))
    index = index_of(tmp_path / "targets.jsonl", source_counts=range(1, 3), needs_loser=False)
    examples = IndexedExamples(family, index, (Sizes(sizes=(replace(CLIP, frames=1),)),), ("target",))
    visits = [Visit(row=row, mirrored=False, blank=blank, crop=(0.5, 0.5)) for row, blank in ((0, True), (1, False))]
    rows = encode_files(family.load_codec("cpu"), [e for visit in visits for e in examples.encodings(visit)], 2)
    found = [examples.encoded(visit, rows.__getitem__) for visit in visits]
    (batch,) = batches_of(family, found, 2, seed=0, step=1, first_index=0)
    assert not examples.index.problems and batch.condition["read"].shape == (2, 16 + 6, strange.READ)
    assert batch.condition["there"].sum(1).tolist() == [1 + 6, 15 + 6]


# --- sampling ----------------------------------------------------------------------------------------------------------


def test_guidance_keeps_its_momentum_through_one_sample_and_no_further(family):
    denoiser, prompts = family.load_denoiser("cpu"), [prompt(i, 2) for i in (0, 1, 2)]
    rows = handed(family, prompts)
    condition, unguided = condition_of(family, rows, prompts), unguided_of(family, rows, prompts, SAMPLING)
    noise = noise_from(1, (3, *family.latent_shape(CLIP)))
    x, kept = noise, None
    sigmas = family.process.sigmas(3, family.tokens(noise))
    with torch.no_grad():
        for t, following in itertools.pairwise(sigmas):
            c, u = (family.predict(denoiser, x, t.expand(3), branch) for branch in (condition, unguided))
            kept = c - u if kept is None else torch.lerp(c - u, kept, strange.MOMENTUM)
            x = x + (following - t) * (u + 3.0 * kept)
    once, again = (sample_batch(family, denoiser, condition, unguided, noise, SAMPLING) for _ in range(2))
    assert once.shape == (3, 4, 2, 6, 4)
    assert torch.equal(once, again) and torch.equal(once, x)


def test_prompts_are_sampled_from_encodings_at_their_slots_and_decode_to_frames(family):
    denoiser, prompts = family.load_denoiser("cpu"), [prompt(i, 1) for i in (1, 0)]

    def sampled(prompts, seeds, slots):
        rows = handed(family, prompts)
        return sample_prompts(family, denoiser, rows, SAMPLING, "cpu", prompts=prompts, noise_seeds=seeds, slots=slots)

    both = sampled(prompts, [5, 6], [3, 1])
    assert torch.equal(sampled(prompts[:1], [5], [3])[3], both[3])
    assert not torch.equal(both[3], both[1])
    media = family.load_codec("cpu").decode(both)
    assert media.shape == (4, 3, 48, 32, 3) and media.dtype == torch.uint8


# --- training ----------------------------------------------------------------------------------------------------------

OBJECTIVES = {"dpo": DPO(beta=100.0), "sft": SFT()}


def trainer_of(mesh, path, how, objective, **changes):
    family = worlds.family(path, kind=KIND)
    return Trainer(
        family=family,
        config=TrainerConfig(**{"learning_rate": 5e-3, "gradient_checkpointing": "all", **changes}),
        trainable=worlds.trainable(how, family, KIND),
        objective=OBJECTIVES[objective],
        mesh=mesh,
        seed=7,
    )


def train(mesh, path, how, objective, examples, folder):
    """Steps on a micro-batch of each bucket; what a sampler and an export need to be compared."""
    trainer, rank = trainer_of(mesh, path, how, objective), mesh.get_rank()

    def batches():
        return [
            batch
            for i, bucket in enumerate(examples)
            for batch in batches_of(
                trainer.family, bucket[2 * rank : 2 * rank + 2], 2, seed=3, step=1, first_index=4 * i + 2 * rank
            )
        ]

    assert not distributed.left_on_meta(trainer.policy)
    losses = [trainer.step(batches())["loss"] for _ in range(6)]
    again = batches()
    predictions = []
    for side in (POLICY, *trainer.sides):
        before = [trainer.predict(b.noise, b.t, b.condition, side) for b in again]
        if side != POLICY:
            trainer.refresh(side)
        after = [trainer.predict(b.noise, b.t, b.condition, side) for b in again]
        predictions.append([[p.detach() for p in some] for some in (before, after)])
    trainer.export(folder)
    weights = {name: p.full_tensor().to(trainer.family.dtype) for name, p in trainer.trained.items()}
    return losses, predictions, again, list(buffers.pack(trainer.shards(), capacity=20_000)), weights


@pytest.mark.parametrize("how", worlds.TRAINABLES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_trains_on_two_ranks_and_what_was_trained_loads(two_ranks, folder, family, how, objective, tmp_path):
    roles = OBJECTIVES[objective].roles
    examples = [examples_of(family, 1, (0, 1, 2, 4), roles), examples_of(family, 2, (3, 7, 11, 15), roles)]
    results = two_ranks.run(train, folder, how, objective, examples, tmp_path / "export")
    losses = results[0][0]
    assert losses == results[1][0] and losses[-1] < losses[0]
    if objective == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[-1] < math.log(2) - 1e-3

    trainable = worlds.trainable(how, family, KIND)
    sampler = load_for_sampling(family, trainable, "cpu")
    parameters = trainable.trained(sampler)
    for buffer, manifest in (one for result in results for one in result[3]):
        buffers.load(parameters, buffer, manifest)
    assert all(torch.equal(parameters[name], value) for name, value in results[0][4].items())
    exported = load_export(family, how, tmp_path / "export")
    for _, predictions, batches, *_ in results:
        (_, policy), *frozen = predictions
        for before, after in frozen:
            assert not any(torch.equal(one, mine) for one, mine in zip(before, policy, strict=True))
            assert all(torch.equal(one, mine) for one, mine in zip(after, policy, strict=True))
        for batch, mine in zip(batches, policy, strict=True):
            with torch.no_grad():
                for denoiser in (sampler, exported):
                    assert torch.equal(family.predict(denoiser, batch.noise, batch.t, batch.condition), mine)
    assert len(results[0][1]) == (2 if objective == "dpo" else 1)


def load_export(family, how, folder):
    if how == "full":
        return family.load_denoiser("cpu", folder)
    if how == "modules":
        denoiser = family.load_denoiser("cpu")
        load_modules(denoiser, folder)
        return denoiser
    return family.load_denoiser("cpu", lora=folder)


def saved_and_restored(mesh, path, how, examples, folder):
    family = worlds.family(path, kind=KIND)
    mine = [b for bucket in examples for b in batches_of(family, bucket, len(bucket), seed=3, step=1, first_index=0)]
    first = trainer_of(mesh, path, how, "dpo", ema_decay=0.9)
    first.step(mine)
    first.refresh(REFERENCE, 0.5)
    first.save(folder)
    second = trainer_of(mesh, path, how, "dpo", ema_decay=0.9)
    second.restore(folder)
    return [trainer.step(mine) for trainer in (first, second)]


@pytest.mark.parametrize("how", ["full", "lora_modules"])
def test_what_was_saved_goes_on_exactly(two_ranks, folder, family, how, tmp_path):
    examples = [examples_of(family, sources, (0, 1), ("winner", "loser")) for sources in (1, 2)]
    for straight, resumed in two_ranks.run(saved_and_restored, folder, how, examples, tmp_path / "state"):
        assert straight == resumed
