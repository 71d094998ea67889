"""Stable Diffusion 1.5 and XL against diffusers' own pipelines on the same tiny weights."""

import json
import math
import shutil
from functools import cache

import diffusers
import pytest
import torch

from rlhf.diffusion.ddpm import row_generators
from rlhf.errors import Refused
from rlhf.models.checks import check_model
from rlhf.models.family import sample_batch
from rlhf.models.stable_diffusion import StableDiffusion
from rlhf.models.tiny import write_stable_diffusion
from rlhf.tables import ModelTable, SamplingTable
from rlhf.types import Geometry, noise_from
from tests.encoded import condition_of, encode, latents_of, through_the_vae

TEXTS = ["a red bowl of noodles", "soup"]
XL = pytest.mark.parametrize("xl", [False, True], ids=["1.5", "xl"])
SCHEDULERS = [
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("DDIMScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    ("HeunDiscreteScheduler", {}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stable_diffusion")
    return {
        (xl, kind): write_stable_diffusion(root / f"{xl}_{kind}", xl=xl, prediction_type=kind)
        for xl in (False, True)
        for kind in ("epsilon", "v_prediction")
    }


def copy(folder, to, file, **changes):
    """A copy of a model folder with some keys of one of its JSON files changed."""
    shutil.copytree(folder, to)
    config = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(config | changes))
    return to


@cache
def loaded(folder):
    """(the pipeline, our denoiser, our conditions for TEXTS and for empty texts) of a folder with any scheduler."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    family = StableDiffusion(path=folder, dtype=torch.float32)
    codec = family.load_codec("cpu")
    conditions = condition_of(family, codec, TEXTS), condition_of(family, codec, [""] * len(TEXTS))
    return pipeline, family.load_denoiser("cpu"), *conditions


def ours_and_theirs(folder, scheduler=None, height=64, width=64, **options):
    """x0 of our sampler and of the pipeline, from the same texts and noise; `scheduler`: a copy with another one."""
    pipeline, denoiser, condition, empty = loaded(folder)
    guidance = {name: value for name, value in options.items() if name == "guidance_scale"}  # else the pipeline's own
    family = StableDiffusion(path=scheduler or folder, dtype=torch.float32, **guidance)
    config = family.process.config
    pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    noise = noise_from(1, (2, *family.latent_shape(Geometry(height=height, width=width))))
    unguided = empty if family.needs_unguided(None) else None
    ours = sample_batch(family, denoiser, condition, unguided, noise, SamplingTable(steps=6))
    theirs = pipeline(
        prompt=TEXTS,
        latents=noise,
        height=height,
        width=width,
        num_inference_steps=6,
        output_type="latent",
        **options,
    ).images
    return ours, theirs


def assert_same_samples(ours, theirs):
    """Up to the order of sums, which may be another where the batch is, or where a gradient is wanted.

    Errors of random signs: eps × √terms × size, with the terms of the longest sum, a convolution over 3×3 of 64 channels,
    in six steps. Guidance takes 7.5 times the difference of two predictions.
    """
    rounding = torch.finfo(torch.float32).eps * math.sqrt(6 * 9 * 64) * 2 * 7.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * theirs.abs().max().item())


@XL
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("scheduler", "settings"), SCHEDULERS, ids=[f"{n}{i}" for i, (n, _) in enumerate(SCHEDULERS)])
def test_sampling_equals_the_pipelines(folders, tmp_path, xl, kind, scheduler, settings):
    changes = {"_class_name": scheduler, "timestep_spacing": "leading", **settings}
    swapped = copy(folders[xl, kind], tmp_path / "model", "scheduler/scheduler_config.json", **changes)
    ours, theirs = ours_and_theirs(folders[xl, kind], swapped)
    assert_same_samples(ours, theirs)
    assert ours.std() > 0.1


@XL
@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 112)])
def test_pictures_that_are_not_square(folders, xl, height, width):
    ours, theirs = ours_and_theirs(folders[xl, "epsilon"], height=height, width=width)
    assert_same_samples(ours, theirs)


@XL
def test_guidance_of_1_is_the_conditional_branch_alone(folders, xl):
    _, denoiser, *_ = loaded(folders[xl, "epsilon"])
    rows = []
    hook = denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    ours, theirs = ours_and_theirs(folders[xl, "epsilon"], guidance_scale=1.0)
    hook.remove()
    assert set(rows) == {2}, "the other branch is paid for and thrown away"
    assert_same_samples(ours, theirs)
    guided, _ = ours_and_theirs(folders[xl, "epsilon"])
    assert (guided - ours).abs().max() > 1e-2, "guidance does nothing: the test would pass without it"


def test_an_ancestral_schedulers_noise_is_the_pipelines_when_given_our_generators(folders, tmp_path):
    changes = {"_class_name": "EulerAncestralDiscreteScheduler"}
    swapped = copy(folders[False, "epsilon"], tmp_path / "model", "scheduler/scheduler_config.json", **changes)
    family = StableDiffusion(path=swapped)
    generators = row_generators(noise_from(1, (2, *family.latent_shape(Geometry(height=64, width=64)))))
    ours, theirs = ours_and_theirs(folders[False, "epsilon"], swapped, generator=generators)
    assert_same_samples(ours, theirs)


def test_xl_with_empty_text_encoded_instead_of_zeros(folders, tmp_path):
    zeros, _ = ours_and_theirs(folders[True, "epsilon"])
    folder = copy(folders[True, "epsilon"], tmp_path / "model", "model_index.json", force_zeros_for_empty_prompt=False)
    ours, theirs = ours_and_theirs(folder)
    assert_same_samples(ours, theirs)
    assert (ours - zeros).abs().max() > 1e-3


@XL
def test_text_embeddings_equal_the_pipelines(folders, xl):
    pipeline, _, condition, empty = loaded(folders[xl, "epsilon"])
    theirs = pipeline.encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=["", ""]
    )
    names = ["prompt_embeds", "pooled_prompt_embeds"][: len(theirs) // 2]
    assert list(condition) == list(empty) == names
    ours = [tensor for name in names for tensor in (condition[name], empty[name])]
    for mine, expected in zip(ours, theirs, strict=False):
        # The pipeline's would take a gradient, for which attention is computed in another order: eps × terms × size.
        rounding = torch.finfo(torch.float32).eps * 64 * expected.abs().max().item()
        torch.testing.assert_close(mine, expected, rtol=0, atol=rounding)


def test_xls_time_ids_are_the_pictures_own_size(folders):
    family = StableDiffusion(path=folders[True, "epsilon"], dtype=torch.float32)
    _, denoiser, condition, _ = loaded(family.path)
    seen = []
    hook = denoiser.register_forward_pre_hook(
        lambda *call: seen.append(call[-1]["added_cond_kwargs"]), with_kwargs=True
    )
    family.predict(
        denoiser, torch.zeros(2, *family.latent_shape(Geometry(height=96, width=64))), torch.ones(2), condition
    )
    hook.remove()
    assert seen[0]["time_ids"].tolist() == [[96, 64, 0, 0, 96, 64]] * 2
    assert torch.equal(seen[0]["text_embeds"], condition["pooled_prompt_embeds"])


@XL
def test_decoding_equals_the_pipelines(folders, xl):
    codec = StableDiffusion(path=folders[xl, "epsilon"], dtype=torch.float32).load_codec("cpu")
    pipeline, latents = loaded(folders[xl, "epsilon"])[0], noise_from(2, (2, 4, 12, 8))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    picture = pipeline.image_processor.postprocess(decoded, output_type="np")
    assert abs(codec.decode(latents)[:, 0].numpy() - (picture * 255).round()).max() == 0


@XL
def test_latents_are_the_mode_scaled_as_the_vae_says(folders, xl):
    """Encoding and decoding are inverse in the VAE's own constants: what goes in decodes to what the VAE makes of it."""
    ours = StableDiffusion(path=folders[xl, "epsilon"], dtype=torch.float32)
    codec = ours.load_codec("cpu")
    pictures = torch.randint(0, 256, (2, 48, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(3))
    latents = latents_of(ours, codec, pictures)
    assert torch.equal(latents, latents_of(ours, codec, pictures))
    assert (codec.decode(latents)[:, 0].float() - through_the_vae(codec.vae, pictures)).abs().max() <= 1


@XL
def test_a_vae_that_must_be_upcast_is_and_others_are_not(folders, xl):
    codec = StableDiffusion(path=folders[xl, "epsilon"], dtype=torch.bfloat16).load_codec("cpu")
    assert codec.vae.dtype == (torch.float32 if xl else torch.bfloat16)
    assert encode(codec, TEXTS)[0].tensors["prompt_embeds"].dtype == torch.bfloat16


def test_sizes(folders, tmp_path):
    assert StableDiffusion(path=folders[False, "epsilon"]).nearest_size(900, 1600) == (128, 128)
    folder = copy(folders[True, "epsilon"], tmp_path / "xl", "unet/config.json", sample_size=128)
    xl = StableDiffusion(path=folder)
    assert xl.nearest_size(1000, 1000) == (1024, 1024)
    assert xl.nearest_size(1080, 1920) == (768, 1344)
    assert xl.nearest_size(1920, 1080) == (1344, 768)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, r"unet/config.json: class_embed_type = 'timestep'"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, r"unet/config.json: time_cond_proj_dim = 256"),
        ("unet/config.json", {"in_channels": 9}, r"unet/config.json: in_channels = 9, but this family takes 4"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, r"vae/config.json: latents_mean"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, r"scheduler_config.json: prediction_type"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_with_its_file_and_key(folders, tmp_path, file, changes, message):
    path = copy(folders[False, "epsilon"], tmp_path / "model", file, **changes)
    with pytest.raises(Refused, match=message):
        check_model(ModelTable(family="stable_diffusion", path=str(path)))
