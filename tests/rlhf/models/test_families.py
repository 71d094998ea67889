"""The contract of a family, over every entry of FAMILIES: what samplers, the trainer and the cache rely on.

A family's own file compares it with its diffusers pipeline. Here nothing knows a model: a new family adds its tiny
checkpoints to `worlds.WRITERS`.
"""

import math
from typing import get_args

import diffusers
import pytest
import torch
from peft import get_peft_model_state_dict

from rlhf.data.cache import ConditionCache, commit, write_part
from rlhf.diffusion.objectives import SFT
from rlhf.errors import Refused
from rlhf.models import FAMILIES, load_family, lora
from rlhf.models.sampling import sample
from rlhf.shards.files import SafetensorsFolder
from rlhf.tables import CheckpointConfig, ModelConfig, TrainerConfig
from rlhf.training.trainer import Trainer
from rlhf.types import PairBatch, Prompt, noise_from
from tests import worlds

HEIGHT, WIDTH = 48, 32
TEXTS = ["make it warm", "a bowl of soup", ""]
KINDS = pytest.mark.parametrize("kind", worlds.WRITERS)
HOW = pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {kind: write(root / kind.replace(" ", "_")) for kind, write in worlds.WRITERS.items()}


def pictures(count: int) -> torch.Tensor:
    shape = (count, HEIGHT, WIDTH, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def condition_of(codec, count: int):
    return codec.encode_text([TEXTS[i % len(TEXTS)] for i in range(count)]) | codec.encode_source(pictures(count))


def pairs_of(family, count: int) -> PairBatch:
    """Random latents with real conditions, at times that the family's process draws."""
    shape = (count, *family.latent_shape(HEIGHT, WIDTH))
    return PairBatch(
        winner=noise_from(1, shape),
        loser=noise_from(2, shape),
        condition=condition_of(family.load_codec("cpu"), count),
        t=torch.tensor([family.process.draw_t(seed) for seed in range(count)]),
        noise=noise_from(3, shape),
    )


def test_every_family_has_a_tiny_checkpoint_here_and_recipes_name_none_but_these():
    assert {kind.split()[0] for kind in worlds.WRITERS} == set(FAMILIES)
    assert set(get_args(ModelConfig.model_fields["family"].annotation)) <= set(FAMILIES)


@KINDS
def test_the_empty_denoiser_is_the_loaded_one_without_memory(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    empty, real = family.empty_denoiser(torch.float32), family.load_denoiser("cpu")
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float32 for p in empty.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in real.parameters())
    assert not list(empty.buffers()), "the trainer refuses buffers"
    found = [module for module in empty.modules() if isinstance(module, family.blocks)]
    assert {type(module) for module in found} == set(family.blocks)
    whole = sum(p.numel() for p in empty.parameters())
    assert sum(p.numel() for module in found for p in module.parameters()) > whole / 2, "FSDP gathers the rest at once"


@KINDS
def test_folders_exist(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    for folder in (family.denoiser_folder, *family.text_folders, *family.source_folders):
        assert any((folders[kind] / folder).iterdir())


@KINDS
def test_shapes_and_dtypes(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    codec, images = family.load_codec("cpu"), pictures(3)
    latents = codec.encode_target(images)
    assert latents.shape == (3, *family.latent_shape(HEIGHT, WIDTH))
    assert torch.equal(latents, codec.encode_target(images)), "the mode of the posterior, never a sample"
    decoded = codec.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8
    for encoded in (codec.encode_text(TEXTS), codec.encode_source(images)):
        assert all(len(tensor) == 3 and not tensor.requires_grad for tensor in encoded.values())
    assert len(codec.unknown_tokens(TEXTS)) == 3
    height, width = family.nearest_size(480, 640)
    assert height <= width and min(family.latent_shape(height, width)) > 0
    assert family.tokens(latents) > 0


@KINDS
def test_latents_are_scaled_as_the_vae_says(folders, kind):
    """decode and encode_target are inverse in the VAE's own constants: what goes in decodes to what the VAE makes of it."""
    family = worlds.family(folders[kind], torch.float32, kind)
    codec, images = family.load_codec("cpu"), pictures(2)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = codec.vae(pixels, sample_posterior=False).sample
    expected = ((expected + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
    assert (codec.decode(codec.encode_target(images)).float() - expected).abs().max() <= 1


@KINDS
def test_predict_and_guided_treat_every_row_alone(folders, kind):
    family = worlds.family(folders[kind], torch.float32, kind)
    denoiser, batch = family.load_denoiser("cpu"), pairs_of(family, 3)
    for network in (family.predict, family.guided):
        with torch.no_grad():
            whole = network(denoiser, batch.winner, batch.t, batch.condition)
            for i in range(3):
                row = worlds.part(batch, i, i + 1)
                alone = network(denoiser, row.winner, row.t, row.condition)
                assert (alone - whole[i : i + 1]).abs().max() < 1e-5
    assert whole.shape == batch.winner.shape


@KINDS
def test_predict_answers_in_single_precision_and_heeds_its_inputs(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    denoiser, batch = family.load_denoiser("cpu"), pairs_of(family, 3)
    with torch.no_grad():
        base = family.predict(denoiser, batch.winner, batch.t, batch.condition)
        assert base.dtype == torch.float32 and base.isfinite().all()
        turned = {name: tensor.roll(1, 0) for name, tensor in batch.condition.items()}
        for other in (
            family.predict(denoiser, batch.loser, batch.t, batch.condition),
            family.predict(denoiser, batch.winner, batch.t.roll(1), batch.condition),
            family.predict(denoiser, batch.winner, batch.t, turned),
        ):
            assert (other - base).abs().max() > 1e-3


@KINDS
def test_sampling_does_not_depend_on_neighbours(folders, kind):
    family = worlds.family(folders[kind], kind=kind)
    denoiser, condition = family.load_denoiser("cpu"), condition_of(family.load_codec("cpu"), 3)
    noise, order = noise_from(5, (3, *family.latent_shape(HEIGHT, WIDTH))), [2, 0, 1]
    whole = sample(family, denoiser, condition, noise, 3)
    turned = {name: tensor[order] for name, tensor in condition.items()}
    assert torch.equal(sample(family, denoiser, turned, noise[order], 3), whole[order])
    assert whole.dtype == torch.float32 and whole.isfinite().all()


@KINDS
def test_conditions_go_through_the_cache(folders, kind, tmp_path):
    codec = worlds.family(folders[kind], kind=kind).load_codec("cpu")
    text, source = codec.encode_text(TEXTS), codec.encode_source(pictures(3))
    rows = []
    for i in range(3):
        rows.append((f"text{i}", {name: tensor[i] for name, tensor in text.items()}, 0.0))
        rows.append((f"source{i}", {name: tensor[i] for name, tensor in source.items()}, None))
    commit(tmp_path, [write_part(tmp_path, rows)])
    prompts = [
        Prompt(
            image_id=str(i),
            instruction=TEXTS[i],
            image="",
            height=HEIGHT,
            width=WIDTH,
            text_key=f"text{i}",
            source_key=f"source{i}",
        )
        for i in (1, 0)
    ]
    found, expected = ConditionCache(tmp_path).condition(prompts), text | source
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name][[1, 0]]) for name in expected)


# --- on ranks ----------------------------------------------------------------------------------------------------------


def gradients(mesh, path, kind, adapters, batch, checkpointing):
    """Whole gradients of one backward, this rank's share of the batch."""
    trainer = worlds.trainer(
        mesh, path, kind=kind, lora=adapters, dtype=torch.float32, beta=10.0, gradient_checkpointing=checkpointing
    )
    with torch.no_grad():  # away from policy = reference, where LoRA's A has no gradient
        for parameter in trainer.trained.values():
            parameter.to_local().add_(0.01)
    count = len(batch.t) // mesh.size()
    mine = worlds.part(batch, mesh.get_rank() * count, (mesh.get_rank() + 1) * count)
    loss, _ = trainer.objective(trainer.predict, trainer.predict_reference, trainer.family.process, mine)
    loss.backward()
    return {name: p.grad.full_tensor() for name, p in trainer.trained.items()}


@HOW
@KINDS
def test_two_checkpointed_ranks_give_the_gradient_of_one_batch(one_rank, two_ranks, folders, kind, adapters):
    batch = pairs_of(worlds.family(folders[kind], torch.float32, kind), 4)
    (whole,) = one_rank.run(gradients, folders[kind], kind, adapters, batch, False)
    spread, _ = two_ranks.run(gradients, folders[kind], kind, adapters, batch, True)
    difference = math.sqrt(sum((whole[name] - spread[name]).square().sum().item() for name in whole))
    assert difference < 1e-5 * math.sqrt(sum(value.square().sum().item() for value in whole.values()))
    assert all(value.any() for value in whole.values())


def train_and_export(mesh, path, kind, adapters, batch, folder):
    """A few steps in bf16 with checkpointing; losses, the trainer's prediction, and exported weights."""
    trainer = worlds.trainer(mesh, path, kind=kind, lora=adapters)
    mine = worlds.part(batch, mesh.get_rank(), mesh.get_rank() + 1)
    losses = [trainer.step([mine])["loss"] for _ in range(3)]
    trainer.refresh_reference()
    losses.append(trainer.step([mine])["loss"])
    trainer.export(folder)
    with torch.no_grad():
        prediction = trainer.predict(batch.winner, batch.t, batch.condition)
    weights = {name: p.full_tensor().bfloat16() for name, p in trainer.trained.items()}
    return losses, prediction, weights


@pytest.fixture(scope="module")
def trained(two_ranks, folders, tmp_path_factory):
    """Trained once per kind and way: (losses, the trainer's prediction, its weights, the batch, the export's folder)."""
    done = {}

    def train(kind, adapters):
        if (kind, adapters) not in done:
            folder = tmp_path_factory.mktemp("export") / "policy"
            batch = pairs_of(worlds.family(folders[kind], kind=kind), 2)
            results = two_ranks.run(train_and_export, folders[kind], kind, adapters, batch, folder)
            assert results[0][0] == results[1][0], "ranks disagree on the losses"
            done[kind, adapters] = *results[0], batch, folder
        return done[kind, adapters]

    return train


@HOW
@KINDS
def test_training_starts_at_ln2_learns_and_is_back_at_ln2_after_a_refresh(trained, kind, adapters):
    losses = trained(kind, adapters)[0]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses[3] == pytest.approx(math.log(2), abs=1e-7)
    assert losses[2] < math.log(2) - 1e-3, "the same pair again and again must be learnt"


@HOW
@KINDS
def test_a_sampler_with_the_published_weights_predicts_what_the_trainer_does(trained, folders, kind, adapters):
    _, prediction, weights, batch, _ = trained(kind, adapters)
    family = worlds.family(folders[kind], kind=kind)
    plain = family.load_denoiser("cpu")
    if adapters:
        lora.add_adapters(plain, worlds.LORA, family.lora_targets, (lora.POLICY,), torch.bfloat16)
    plain.load_state_dict(weights, strict=not adapters)
    with torch.no_grad():
        assert torch.equal(family.predict(plain, batch.winner, batch.t, batch.condition), prediction)


@KINDS
def test_a_full_export_loads_in_diffusers(trained, folders, kind):
    _, _, weights, _, folder = trained(kind, False)
    plain = worlds.family(folders[kind], kind=kind).load_denoiser("cpu", folder)
    model, report = type(plain).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for loaded in (plain, model):
        assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


def beginning(mesh, family, adapters):
    config = TrainerConfig(learning_rate=1e-3, lora=worlds.LORA if adapters else None)
    trainer = Trainer(family=family, config=config, objective=SFT(), mesh=mesh, seed=1)
    return {
        lora.base_name(name): p.full_tensor()
        for name, p in trainer.policy.named_parameters()
        if not lora.is_adapter(name)
    }


@HOW
@KINDS
def test_training_can_begin_with_a_trained_folder(trained, one_rank, folders, kind, adapters):
    *_, folder = trained(kind, False)
    model = CheckpointConfig(family=kind.split()[0], path=str(folders[kind]), denoiser=str(folder))
    (begun,) = one_rank.run(beginning, load_family(model, "bf16"), adapters)
    saved = SafetensorsFolder(folder)
    exported = {name: saved.rows(name, 0, tensor.shape[0], tensor.shape) for name, tensor in begun.items()}
    assert begun.keys() == saved.names()
    assert all(torch.equal(begun[name], exported[name].to(begun[name].dtype)) for name in begun)


@KINDS
def test_a_trained_folder_of_something_else_is_refused(folders, kind):
    for place, what in (("vae", "is a AutoencoderKL, but the base model has a"), ("nowhere", "holds no config.json")):
        model = CheckpointConfig(family=kind.split()[0], path=str(folders[kind]), denoiser=str(folders[kind] / place))
        with pytest.raises(Refused, match=rf"model.denoiser = .*{place}' {what}"):
            load_family(model, "bf16").empty_denoiser(torch.float32)


@KINDS
def test_a_lora_export_loads_in_the_pipeline_with_no_unmatched_key(trained, folders, kind, caplog, tmp_path):
    _, prediction, weights, batch, folder = trained(kind, True)
    family = worlds.family(folders[kind], kind=kind)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[kind], dtype=torch.bfloat16)
    with caplog.at_level("WARNING"):
        pipeline.load_lora_weights(folder, adapter_name=lora.POLICY)
    assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
    denoiser = getattr(pipeline, family.denoiser_folder)
    loaded = {name: p for name, p in denoiser.named_parameters() if lora.is_adapter(name)}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name].bfloat16(), weights[name]) for name in weights)
    layers = {f"{family.denoiser_folder}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name=lora.POLICY)}
    pipeline.save_lora_weights(tmp_path, **layers)
    assert SafetensorsFolder(folder).names() == SafetensorsFolder(tmp_path).names(), "diffusers names them otherwise"
    with torch.no_grad():  # the scale alpha/rank too
        theirs = family.predict(denoiser.to(torch.bfloat16), batch.winner, batch.t, batch.condition)
        ours = family.predict(family.load_denoiser("cpu", lora=folder), batch.winner, batch.t, batch.condition)
    assert torch.equal(theirs, prediction)
    assert torch.equal(ours, prediction)
