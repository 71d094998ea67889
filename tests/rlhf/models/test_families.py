"""The contract of a family, over tiny checkpoints of every kind: what samplers, the trainer and the cache rely on.

Nothing here knows a model, or more of a family than its protocol says: a new family adds its tiny checkpoints to
`worlds.WRITERS`, and its own file compares it with its diffusers pipeline. Kinds that recipes know by a name of their own
must export what diffusers loads.
"""

import json
import math
import pickle

import diffusers
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rlhf.data.batches import condition_of, unguided_of
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.fingerprint import fingerprints
from rlhf.diffusion.objectives import SFT
from rlhf.errors import NotFinite, Refused
from rlhf.models import FAMILIES, load_family
from rlhf.models.checks import check_model
from rlhf.models.family import sample_batch
from rlhf.models.lora import LORA_FILE, load_modules
from rlhf.models.trainable import ADAPTER, load_for_sampling, owner
from rlhf.shards import buffers, distributed
from rlhf.shards.files import SafetensorsFolder
from rlhf.tables import ModelTable, SamplingTable
from rlhf.training.trainer import Trainer
from rlhf.training_tables import TrainerConfig
from rlhf.types import POLICY, REFERENCE, Batch, Geometry, Source, noise_from
from tests import encoded, worlds

GEOMETRY = Geometry(height=48, width=32)
TEXTS = ["make it warm", "bowl of soup", ""]
"""Short ones, so that a family that pads texts has them in one bucket."""
THREE_STEPS = SamplingTable(steps=3)
EPS = torch.finfo(torch.float32).eps
TERMS = 9 * 64
"""Of the longest sum in the tiny networks: a convolution over 3×3 of the 64 channels that a UNet's upper half joins."""
KINDS = pytest.mark.parametrize("kind", worlds.WRITERS)
DIFFUSERS_KINDS = pytest.mark.parametrize("kind", [kind for kind in worlds.WRITERS if kind.split()[0] in FAMILIES])
HOW = pytest.mark.parametrize("how", worlds.TRAINABLES)
RANKS = pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {kind: write(root / kind.replace(" ", "_")) for kind, write in worlds.WRITERS.items()}


def pictures(count: int) -> list[torch.Tensor]:
    """uint8 (F, H, W, 3) each, of one frame."""
    shape = (count, 1, GEOMETRY.height, GEOMETRY.width, 3)
    return list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3)))


def prompts_of(family, count: int):
    """Prompts of one bucket, with a source each where the family sees one."""
    texts = [TEXTS[i % len(TEXTS)] for i in range(count)]
    prompts = encoded.prompts_of(texts, GEOMETRY, sources=min(1, max(family.source_counts)))
    assert len({family.bucket(prompt) for prompt in prompts}) == 1
    return prompts


def rows_of(family, encodings, count: int):
    """Rows of encodings of `count` prompts."""
    media = {f"{i}.0": picture for i, picture in enumerate(pictures(count))}
    return encoded.encode_all(family.load_codec("cpu"), encodings, media)


def conditions_of(family, count: int):
    """(condition, unguided condition or None) of `count` prompts."""
    prompts = prompts_of(family, count)
    others = [prompt for prompt in map(family.unguided, prompts) if prompt is not None]
    rows = rows_of(family, (e for prompt in (*prompts, *others) for e in family.encodings(prompt)), count)
    handed = encoded.tensors_of(rows)
    return condition_of(family, handed, prompts), unguided_of(family, handed, prompts, SamplingTable())


def picked(condition, order):
    """Rows of a condition in another order; None stays None."""
    return condition and {name: tensor[order] for name, tensor in condition.items()}


def pairs_of(family, count: int) -> Batch:
    """Random latents with real conditions, at times that the family's process draws."""
    shape = (count, *family.latent_shape(GEOMETRY))
    x0 = {"winner": noise_from(1, shape), "loser": noise_from(2, shape)}
    return Batch(
        x0=x0,
        condition=conditions_of(family, count)[0],
        t=torch.tensor([family.process.draw_t(seed, 6) for seed in range(count)]),
        noise=noise_from(3, shape),
        weight={role: torch.ones(count) for role in x0},
    )


def test_every_family_has_a_tiny_checkpoint_here():
    assert {kind.split()[0] for kind in worlds.WRITERS} >= set(FAMILIES)
    assert ModelTable.model_fields["family"].default in FAMILIES


@KINDS
def test_the_empty_denoiser_is_the_loaded_one_without_memory(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    empty, real = family.empty_denoiser(torch.float32), family.load_denoiser("cpu")
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float32 for p in empty.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in real.parameters())
    family.finish(empty, "cpu")
    assert all(name in dict(empty.named_parameters()) for name in distributed.left_on_meta(empty))
    found = [module for module in empty.modules() if isinstance(module, family.blocks)]
    assert {type(module) for module in found} == set(family.blocks)
    whole = sum(p.numel() for p in empty.parameters())
    assert sum(p.numel() for module in found for p in module.parameters()) > whole / 2, "FSDP gathers the rest at once"


@KINDS
def test_folders_exist(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    check_model(ModelTable(family=kind.split()[0], path=str(folders[kind])))
    assert family.denoiser_path == folders[kind] / family.denoiser_folder
    for folder in (family.denoiser_folder, *(folder for what in family.kinds.values() for folder in what.folders)):
        assert any((folders[kind] / folder).iterdir())
    assert fingerprints(family).keys() == family.kinds.keys()


# --- sizes, encodings, conditions --------------------------------------------------------------------------------------


def encodings_of(family, count: int):
    """(prompts, what is encoded of each, targets) of `count` pictures."""
    prompts = prompts_of(family, count)
    targets = [family.target(Source(path="", content=f"{i}.0", height=48, width=32), GEOMETRY) for i in range(count)]
    return prompts, [family.encodings(prompt) for prompt in prompts], targets


@KINDS
def test_sizes(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    height, width = family.nearest_size(480, 640)
    assert height <= width and min(family.latent_shape(Geometry(height=height, width=width))) > 0
    assert family.tokens(torch.empty(2, *family.latent_shape(GEOMETRY))) > 0


@KINDS
def test_encodings_say_all_that_a_codec_is_given(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    prompts, found, targets = encodings_of(family, 3)
    assert found == [family.encodings(prompt) for prompt in prompts], "the same every time, in the same order"
    for encoding in (*targets, *(encoding for some in found for encoding in some)):
        assert encoding.kind in family.kinds
        assert len(encoding.sources) == len(encoding.geometries)
    for prompt, some in zip(prompts, found, strict=True):
        shown = {source.content for encoding in some for source in encoding.sources}
        assert shown == {source.content for source in prompt.sources}
        assert [encoding.kind for encoding in some] == [encoding.kind for encoding in found[0]]
        other = family.unguided(prompt)
        if family.needs_unguided(None):
            assert other is not None
        if other is not None:
            assert other.geometry == prompt.geometry
            assert [encoding.kind for encoding in family.encodings(other)] == [encoding.kind for encoding in some]
    for target, source in zip(targets, ("0.0", "1.0", "2.0"), strict=True):
        assert [source.content for source in target.sources] == [source] and target.geometries == (GEOMETRY,)


@KINDS
def test_a_codecs_rows(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    _, found, targets = encodings_of(family, 3)
    rows, again = (rows_of(family, (*targets, *(e for some in found for e in some)), 3) for _ in range(2))
    for encoding, row in rows.items():
        assert row.tensors and not any(tensor.requires_grad for tensor in row.tensors.values())
        assert row.tensors.keys() == again[encoding].tensors.keys()
        for name, tensor in row.tensors.items():
            assert torch.equal(tensor, again[encoding].tensors[name]), "a mode, never a sample"
        for share in (row.unknown, row.cut):
            assert share is None if encoding.text is None else 0 <= share <= 1
    assert all(rows[target].tensors["latents"].shape == family.latent_shape(GEOMETRY) for target in targets)


@KINDS
def test_a_codecs_rows_do_not_depend_on_their_neighbours(folders, kind):
    """At one place in the batch. No family promises the same bits at another."""
    family = worlds.family(folders[kind], kind=kind)
    codec, (_, found, targets) = family.load_codec("cpu"), encodings_of(family, 3)
    for same in (targets, *zip(*found, strict=True)):
        if len({(encoding.kind, encoding.geometries) for encoding in same}) > 1:
            continue  # a codec is never given such a batch
        media = {
            encoding: [
                encoded.at(geometry, pictures(3)[int(source.content[0])])
                for source, geometry in zip(encoding.sources, encoding.geometries, strict=True)
            ]
            for encoding in same
        }
        first, second = (
            codec.encode(some, [media[encoding] for encoding in some]) for some in (same, [same[0], same[2], same[2]])
        )
        assert all(torch.equal(first[0].tensors[name], second[0].tensors[name]) for name in first[0].tensors)


@KINDS
def test_decoding(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    decoded = family.load_codec("cpu").decode(noise_from(4, (3, *family.latent_shape(GEOMETRY))))
    assert decoded.shape == (3, GEOMETRY.frames, GEOMETRY.height, GEOMETRY.width, 3)
    assert decoded.dtype == torch.uint8 and not decoded.is_cuda


@KINDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_no_picture(folders, kind, value):
    family = worlds.family(folders[kind], kind=kind)
    latents = noise_from(4, (3, *family.latent_shape(GEOMETRY)))
    latents[1].view(-1)[0] = value
    with pytest.raises(NotFinite) as caught:
        family.load_codec("cpu").decode(latents)
    assert caught.value.rows == (1,) and pickle.loads(pickle.dumps(caught.value)).rows == (1,)


@KINDS
def test_a_condition_is_made_row_by_row(folders, kind):
    """A padded length follows from the bucket and not from the neighbours."""
    family = worlds.family(folders[kind], kind=kind)
    prompts, found, _ = encodings_of(family, 3)
    encoded_rows = rows_of(family, (e for some in found for e in some), 3)
    rows = [[encoded_rows[encoding].tensors for encoding in some] for some in found]
    bucket = family.bucket(prompts[0])
    whole = family.condition(rows, bucket)
    assert whole and all(len(tensor) == 3 and not tensor.requires_grad for tensor in whole.values())
    for i, row in enumerate(rows):
        alone = family.condition([row], bucket)
        assert alone.keys() == whole.keys()
        assert all(torch.equal(alone[name], whole[name][i : i + 1]) for name in whole)


@KINDS
def test_conditions_go_through_the_cache(folders, kind, tmp_path):
    family = worlds.family(folders[kind], kind=kind)
    prompts, found, _ = encodings_of(family, 3)
    rows, cache = rows_of(family, (e for some in found for e in some), 3), EncodingCache(tmp_path, fingerprints(family))
    keyed = {cache.key(encoding): row for encoding, row in rows.items()}
    assert len(keyed) == len(rows), "two encodings under one key"
    commit(tmp_path, [write_part(tmp_path, keyed)])
    order, handed = [1, 0], encoded.tensors_of(rows)
    expected = condition_of(family, handed, prompts)
    again = condition_of(family, cache.row, [prompts[i] for i in order])
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name][order]) for name in expected)


# --- predictions and samples -------------------------------------------------------------------------------------------


def with_others_around(row: int, count: int) -> list[int]:
    """An order of `count` rows in which `row` keeps its place, as it must to keep its bits, and no other does."""
    others = [i for i in range(count) if i != row]
    others = [*others[1:], others[0]]
    return [*others[:row], row, *others[row:]]


@KINDS
def test_predict_and_guided_treat_every_row_alone(folders, kind):
    """No bit depends on the neighbours. In a batch of another size a row is the same up to the order of sums.

    That is eps × terms × size for a network; guidance takes up to 7.5 times the difference of two.
    """
    family = worlds.family(folders[kind], torch.float32, kind)
    denoiser, batch = family.load_denoiser("cpu"), pairs_of(family, 3)
    _, unguided = conditions_of(family, 3)

    def guided(denoiser, x_t, t, condition, unguided):
        return family.guided(denoiser, x_t, t, condition, unguided, guidance_scale=None, step=0, state={})

    for network, gain in ((lambda *given: family.predict(*given[:-1]), 1), (guided, 2 * 7.5)):
        with torch.no_grad():
            whole = network(denoiser, batch.x0["winner"], batch.t, batch.condition, unguided)
            for i in range(3):
                order = with_others_around(i, 3)
                condition = picked(batch.condition, order)
                among = network(denoiser, batch.x0["winner"][order], batch.t[order], condition, picked(unguided, order))
                assert torch.equal(among[i], whole[i]) and not torch.equal(among, whole)
                row = worlds.part(batch, i, i + 1)
                alone = network(denoiser, row.x0["winner"], row.t, row.condition, picked(unguided, [i]))
                atol = EPS * TERMS * whole.abs().max().item() * gain
                torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=atol)
        assert whole.shape == batch.x0["winner"].shape


@KINDS
def test_predict_answers_in_single_precision_and_heeds_its_inputs(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    denoiser, batch = family.load_denoiser("cpu"), pairs_of(family, 3)
    with torch.no_grad():
        base = family.predict(denoiser, batch.x0["winner"], batch.t, batch.condition)
        assert base.dtype == torch.float32 and base.isfinite().all()
        turned = {name: tensor.roll(1, 0) for name, tensor in batch.condition.items()}
        for other in (
            family.predict(denoiser, batch.x0["loser"], batch.t, batch.condition),
            family.predict(denoiser, batch.x0["winner"], batch.t.roll(1), batch.condition),
            family.predict(denoiser, batch.x0["winner"], batch.t, turned),
        ):
            assert (other - base).abs().max() > 1e-3


def sampled(family, order):
    """x0 of three prompts with noises of their own, in this order."""
    (condition, unguided), noise = conditions_of(family, 3), noise_from(5, (3, *family.latent_shape(GEOMETRY)))
    denoiser = family.load_denoiser("cpu")
    return sample_batch(family, denoiser, picked(condition, order), picked(unguided, order), noise[order], THREE_STEPS)


@KINDS
def test_a_sample_does_not_depend_on_its_neighbours(folders, kind):
    """At one place in the batch, to the bit. At another one only within fp32 rounding through three guided steps."""
    family = worlds.family(folders[kind], kind=kind)
    whole = sampled(family, [0, 1, 2])
    for row in range(3):
        assert torch.equal(sampled(family, with_others_around(row, 3))[row], whole[row])
    assert whole.dtype == torch.float32 and whole.isfinite().all()
    exact, order = worlds.family(folders[kind], torch.float32, kind), [2, 0, 1]
    assert (sampled(exact, order) - sampled(exact, [0, 1, 2])[order]).abs().max() < 1e-4


@KINDS
def test_what_makes_a_sample_not_finite_is_named(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    (condition, unguided), noise = conditions_of(family, 3), noise_from(5, (3, *family.latent_shape(GEOMETRY)))
    denoiser = family.load_denoiser("cpu")
    name = next(name for name, tensor in condition.items() if tensor.is_floating_point())
    broken = condition | {name: condition[name].clone()}
    broken[name][2].view(-1)[0] = math.nan
    with pytest.raises(NotFinite, match="what the encoders made of it is NaN or infinite") as caught:
        sample_batch(family, denoiser, broken, unguided, noise, THREE_STEPS)
    assert caught.value.rows == (2,)
    next(denoiser.parameters()).fill_(math.nan)
    with pytest.raises(NotFinite, match=r"the denoiser gives NaN or infinity.*model\.dtype") as caught:
        sample_batch(family, denoiser, condition, unguided, noise, THREE_STEPS)
    assert caught.value.rows == (0, 1, 2)


# --- on ranks ----------------------------------------------------------------------------------------------------------


def share(mesh, batch):
    """This rank's rows."""
    count = len(batch.t) // mesh.size()
    return worlds.part(batch, mesh.get_rank() * count, (mesh.get_rank() + 1) * count)


def gradients(mesh, path, kind, how, batch, checkpointing):
    """Whole gradients of one backward, this rank's share of the batch, None where none arrives; how far another order of sums
    may move them.
    """
    beta = 10.0
    trainer = worlds.trainer(
        mesh, path, kind=kind, how=how, dtype=torch.float32, beta=beta, gradient_checkpointing=checkpointing
    )
    with torch.no_grad():  # away from policy = reference, where LoRA's A has no gradient
        for parameter in trainer.trained.values():
            parameter.to_local().add_(0.01)
    loss, scalars = trainer.objective(trainer.predictions, trainer.family.process, share(mesh, batch))
    loss.backward()
    assert all(p.grad is None for side in trainer.sides.values() for p in side.values())
    # Relative to their size: eps × √terms, for errors of random signs. A gradient has the factor σ(−z), and z is β / 2 times
    # the sum of four errors e, of which each is that uncertain.
    rounding = EPS * math.sqrt(TERMS)
    rounding *= 1 + beta / 2 * 4 * max(scalars["winner_error"].item(), scalars["loser_error"].item())
    found = {name: None if p.grad is None else p.grad.full_tensor() for name, p in trainer.trained.items()}
    return found, rounding


@HOW
@KINDS
def test_two_checkpointed_ranks_give_the_gradient_of_one_batch(one_rank, two_ranks, folders, kind, how):
    batch = pairs_of(worlds.family(folders[kind], torch.float32, kind), 4)
    ((whole, rounding),) = one_rank.run(gradients, folders[kind], kind, how, batch, "none")
    (spread, _), _ = two_ranks.run(gradients, folders[kind], kind, how, batch, "half")
    assert rounding < 1e-3, "what one rounding to bf16 would make"
    reached = {name: value for name, value in whole.items() if value is not None and value.any()}
    difference = math.sqrt(sum((value - spread[name]).square().sum().item() for name, value in reached.items()))
    assert difference < rounding * math.sqrt(sum(value.square().sum().item() for value in reached.values()))
    unreached = worlds.UNREACHED.get(kind.split()[0])
    for name in whole.keys() - reached.keys():
        assert unreached and unreached.search(name) and (spread[name] is None or not spread[name].any()), name
    assert not unreached or not any(map(unreached.search, reached)), "they are reached"


def frozen_side(mesh, path, kind, how, batch):
    """The reference's predictions and weights through training, a refresh, and a soft one."""
    trainer, mine = worlds.trainer(mesh, path, kind=kind, how=how), share(mesh, batch)
    x_t, t, condition = mine.x0["winner"], mine.t, mine.condition

    def sides():
        with torch.no_grad():
            return [trainer.predict(x_t, t, condition, side) for side in (POLICY, REFERENCE)]

    def weights(tensors):
        return {name: p.full_tensor().float().clone() for name, p in tensors.items()}

    seen = {"begun": sides()}
    trainer.step([mine])
    trainer.step([mine])
    seen["trained"] = sides()
    trainer.refresh(REFERENCE)
    seen["refreshed"] = sides()
    before = weights(trainer.sides[REFERENCE])
    trainer.step([mine])
    policy = weights(trainer.trained)
    trainer.refresh(REFERENCE, 0.75)
    after = weights(trainer.sides[REFERENCE])
    assert all(torch.equal(p, policy[name]) for name, p in weights(trainer.trained).items()), "the policy has moved"
    published = {side: {shard.name for shard in trainer.shards(side)} for side in (POLICY, REFERENCE)}
    return seen, (before, policy, after), published


@RANKS
@HOW
@KINDS
def test_a_frozen_side_is_the_policy_of_its_refresh_to_the_bit(request, folders, kind, how, ranks):
    batch = pairs_of(worlds.family(folders[kind], kind=kind), 2)
    for seen, (before, policy, after), published in request.getfixturevalue(ranks).run(
        frozen_side, folders[kind], kind, how, batch
    ):
        assert torch.equal(*seen["begun"]) and torch.equal(*seen["refreshed"])
        assert torch.equal(seen["begun"][1], seen["trained"][1]), "the reference learns"
        assert not torch.equal(*seen["trained"])
        assert torch.equal(seen["trained"][0], seen["refreshed"][0]), "a refresh changes the policy"
        assert before.keys() == policy.keys() == after.keys() == published[POLICY] == published[REFERENCE]
        eps = 2**-8 if how == "full" else 1e-6  # a copy of the network is kept in bf16
        for name, value in after.items():
            assert torch.allclose(value, 0.75 * before[name] + 0.25 * policy[name], rtol=eps, atol=1e-8), name
        assert any(not torch.equal(value, before[name]) for name, value in after.items())


def save_and_restore(mesh, path, kind, how, batch, folder):
    """(state, metrics of one step more) of a trainer and of another that took its state over."""
    first = worlds.trainer(mesh, path, kind=kind, how=how)
    for _ in range(2):
        first.step([share(mesh, batch)])
    first.refresh(REFERENCE, 0.5)
    first.save(folder)
    second = worlds.trainer(mesh, path, kind=kind, how=how)
    second.restore(folder)
    results = []
    for trainer in (first, second):
        metrics = trainer.step([share(mesh, batch)])
        state = {
            f"{file}/{shard.name}": shard.rows.clone()
            for file, shards in trainer._state()[0].items()
            for shard in shards
        }
        results.append((state, metrics))
    return results


@HOW
@KINDS
def test_what_was_saved_goes_on_exactly(two_ranks, folders, kind, how, tmp_path):
    batch = pairs_of(worlds.family(folders[kind], kind=kind), 2)
    for (one, metrics), (other, again) in two_ranks.run(
        save_and_restore, folders[kind], kind, how, batch, tmp_path / "state"
    ):
        assert metrics == again and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert {name.split("/")[0] for name in one} >= {"policy", "reference", "ema", "exp_avg"}


def train_and_export(mesh, path, kind, how, batch, folder):
    """A few steps in bf16 with checkpointing; losses, the trainer's prediction, and exported weights.

    Adapters need a rate at which two steps move the logit far beyond the 1 or so that β = 5000 makes of bf16's rounding.
    """
    trainer = worlds.trainer(mesh, path, kind=kind, how=how, learning_rate=1e-2 if how == "lora" else 1e-3)
    mine = share(mesh, batch)
    losses = [trainer.step([mine])["loss"] for _ in range(3)]
    trainer.refresh(REFERENCE)
    losses.append(trainer.step([mine])["loss"])
    trainer.export(folder)
    with torch.no_grad():
        prediction = trainer.predict(batch.x0["winner"], batch.t, batch.condition)
    weights = {name: p.full_tensor().bfloat16() for name, p in trainer.trained.items()}
    published = list(buffers.pack(trainer.shards(), capacity=20_000))
    return losses, prediction, weights, published


@pytest.fixture(scope="module")
def trained(two_ranks, folders, tmp_path_factory):
    """Trained once per kind and way: losses, the trainer's prediction, its weights, the publication, batch, export."""
    done = {}

    def train(kind, how):
        if (kind, how) not in done:
            folder = tmp_path_factory.mktemp("export") / "policy"
            batch = pairs_of(worlds.family(folders[kind], kind=kind), 2)
            first, second = two_ranks.run(train_and_export, folders[kind], kind, how, batch, folder)
            assert first[0] == second[0], "ranks disagree on the losses"
            losses, prediction, weights, published = first
            done[kind, how] = losses, prediction, weights, published + second[3], batch, folder
        return done[kind, how]

    return train


@HOW
@KINDS
def test_training_starts_at_ln2_learns_and_is_back_at_ln2_after_a_refresh(trained, kind, how):
    losses = trained(kind, how)[0]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses[3] == pytest.approx(math.log(2), abs=1e-7)
    assert losses[2] < math.log(2) - 1e-3, "the same pair again and again must be learnt"


@HOW
@KINDS
def test_a_sampler_reads_the_publication_back_and_predicts_what_the_trainer_does(trained, folders, kind, how):
    _, prediction, weights, published, batch, _ = trained(kind, how)
    family = worlds.family(folders[kind], kind=kind)
    trainable = worlds.trainable(how, family, kind)
    plain = load_for_sampling(family, trainable, "cpu")
    parameters = trainable.trained(plain)
    assert parameters.keys() == weights.keys()
    for buffer, manifest in published:
        buffers.load(parameters, buffer, manifest)
        assert buffers.checksum(parameters, manifest) == manifest.checksum
    assert all(torch.equal(parameters[name], weights[name]) for name in weights)
    with torch.no_grad():
        assert torch.equal(family.predict(plain, batch.x0["winner"], batch.t, batch.condition), prediction)


@pytest.mark.parametrize("how", ["modules", "lora_modules"])
@KINDS
def test_exported_modules_have_the_checkpoints_names_and_load(trained, folders, kind, how):
    _, prediction, weights, _, batch, folder = trained(kind, how)
    family = worlds.family(folders[kind], kind=kind)
    plain = family.load_denoiser("cpu")
    exported = load_file(folder / "modules.safetensors")
    wanted = {name for name in weights if not ADAPTER.search(name)}
    assert exported.keys() == wanted < {name for name, _ in plain.named_parameters()}
    assert json.loads((folder / "modules.json").read_text()) == {"patterns": list(worlds.PATTERNS[kind.split()[0]])}
    if how == "modules":
        load_modules(plain, folder)
    else:
        plain = family.load_denoiser("cpu", lora=folder)
    with torch.no_grad():
        assert torch.equal(family.predict(plain, batch.x0["winner"], batch.t, batch.condition), prediction)


@KINDS
def test_a_full_export_loads(trained, folders, kind):
    _, _, weights, *_, folder = trained(kind, "full")
    plain = worlds.family(folders[kind], kind=kind).load_denoiser("cpu", folder)
    assert {name for name, _ in plain.named_parameters()} == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in plain.named_parameters())


@DIFFUSERS_KINDS
def test_a_full_export_loads_in_diffusers(trained, folders, kind):
    _, _, weights, *_, folder = trained(kind, "full")
    network = type(worlds.family(folders[kind], kind=kind).load_denoiser("cpu"))
    model, report = network.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def beginning(mesh, family, kind, how):
    config, trainable = TrainerConfig(learning_rate=1e-3), worlds.trainable(how, family, kind)
    trainer = Trainer(family=family, config=config, trainable=trainable, objective=SFT(), mesh=mesh, seed=1)
    return {
        owner(name)[1]: p.full_tensor() for name, p in trainer.policy.named_parameters() if not ADAPTER.search(name)
    }


@HOW
@KINDS
def test_training_can_begin_with_a_trained_folder(trained, one_rank, folders, kind, how):
    *_, folder = trained(kind, "full")
    model = ModelTable(family=kind.split()[0], path=str(folders[kind]), denoiser=str(folder))
    (begun,) = one_rank.run(beginning, load_family(model), kind, how)
    saved = SafetensorsFolder(folder)
    exported = {name: saved.rows(name, 0, tensor.shape[0], tensor.shape) for name, tensor in begun.items()}
    assert begun.keys() == saved.where.keys()
    assert all(torch.equal(begun[name], exported[name].to(begun[name].dtype)) for name in begun)


@KINDS
def test_a_trained_folder_of_something_else_is_refused(folders, kind, tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "config.json").write_text('{"_class_name": "SomethingElse"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "else" / "model.safetensors")
    for place in ("else", "nowhere"):
        model = ModelTable(family=kind.split()[0], path=str(folders[kind]), denoiser=str(tmp_path / place))
        with pytest.raises(Refused, match=rf"model.denoiser = .*{place}"):
            check_model(model)


@pytest.mark.parametrize("how", ["lora", "lora_modules"])
@KINDS
def test_a_lora_export_loads(trained, folders, kind, how):
    _, prediction, _, _, batch, folder = trained(kind, how)
    family = worlds.family(folders[kind], kind=kind)
    with torch.no_grad():
        ours = family.predict(family.load_denoiser("cpu", lora=folder), batch.x0["winner"], batch.t, batch.condition)
    assert torch.equal(ours, prediction)


@pytest.mark.parametrize("how", ["lora", "lora_modules"])
@DIFFUSERS_KINDS
def test_a_lora_export_loads_in_the_pipeline_with_no_unmatched_key(trained, folders, kind, how, caplog, tmp_path):
    _, prediction, weights, _, batch, folder = trained(kind, how)
    weights = {name: value for name, value in weights.items() if ADAPTER.search(name)}
    family = worlds.family(folders[kind], kind=kind)
    network = type(family.load_denoiser("cpu")).from_pretrained(family.denoiser_path, dtype=torch.bfloat16)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[kind], dtype=torch.bfloat16)
    pipeline.register_modules(**{family.denoiser_folder: network})
    with caplog.at_level("WARNING"):
        pipeline.load_lora_weights(folder, adapter_name=POLICY)
    assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
    denoiser = getattr(pipeline, family.denoiser_folder)
    loaded = {name: p for name, p in denoiser.named_parameters() if ADAPTER.search(name)}
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():  # alpha / rank, a power of two here, is in B
        scale = worlds.ALPHA / worlds.RANK if ".lora_B." in name else 1.0
        assert torch.equal(loaded[name].bfloat16(), value * scale), name
    layers = {f"{family.denoiser_folder}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name=POLICY)}
    pipeline.save_lora_weights(tmp_path, **layers)
    saved, again = (SafetensorsFolder(place / LORA_FILE).where.keys() for place in (folder, tmp_path))
    assert saved == again, "diffusers names them otherwise"
    if how == "lora_modules":
        load_modules(denoiser, folder)
    with torch.no_grad():
        denoiser = denoiser.to(torch.bfloat16)
        family.finish(denoiser, "cpu")  # tables that were rounded too
        theirs = family.predict(denoiser, batch.x0["winner"], batch.t, batch.condition)
    assert torch.equal(theirs, prediction)
