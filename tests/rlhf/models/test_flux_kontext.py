"""The Kontext family against diffusers' own pipeline on the same tiny weights."""

import numpy as np
import pytest
import torch

from rlhf.models.family import sample_batch
from rlhf.models.flux_kontext import pack, position_ids, unpack
from rlhf.tables import SamplingTable
from rlhf.types import Geometry, noise_from
from tests.encoded import condition_of, encode, latents_of, through_the_vae
from tests.worlds import family

SIZES = pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 112)])


def assert_same_up_to_the_order_of_sums(ours, theirs, terms: int):
    """eps × the terms of the longest sum × size. The pipelines' text encoders take a gradient, and so other kernels."""
    rounding = torch.finfo(torch.float32).eps * terms * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding)


@pytest.fixture(scope="module")
def pipeline(kontext):
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(kontext)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@SIZES
def test_sampling_equals_the_pipelines(pipeline, kontext, height, width):
    ours = family(kontext, torch.float32)
    denoiser, codec = ours.load_denoiser("cpu"), ours.load_codec("cpu")
    pictures = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    condition = condition_of(ours, codec, ["make it warm", "blur the background"], pictures)
    noise = noise_from(1, (2, *ours.latent_shape(Geometry(height=height, width=width))))
    expected = pipeline(
        image=pictures.permute(0, 3, 1, 2) / 255,
        prompt_embeds=condition["prompt_embeds"],
        pooled_prompt_embeds=condition["pooled_prompt_embeds"],
        latents=pack(noise),
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        num_inference_steps=6,
        guidance_scale=3.5,
        output_type="latent",
    ).images
    x0 = sample_batch(ours, denoiser, condition, None, noise, SamplingTable(steps=6))
    theirs = unpack(expected, *noise.shape[-2:])
    assert_same_up_to_the_order_of_sums(x0, theirs, terms=32 + 128)  # the last layer of a single block
    assert x0.std() > 0.1


def test_text_embeddings_equal_the_pipelines(pipeline, kontext):
    codec = family(kontext, torch.float32).load_codec("cpu")
    texts = ["make it warm", ""]
    embeds, pooled, text_ids = pipeline.encode_prompt(
        prompt=texts, prompt_2=None, max_sequence_length=pipeline.tokenizer_2.model_max_length
    )
    rows = [row.tensors for row in encode(codec, texts)]
    for name, theirs in (("prompt_embeds", embeds), ("pooled_prompt_embeds", pooled)):
        assert_same_up_to_the_order_of_sums(torch.stack([row[name] for row in rows]), theirs, terms=64)
    assert not text_ids.any(), "text ids are zeros: why they are not stored"


def test_decoding_equals_the_pipelines(pipeline, kontext):
    codec = family(kontext, torch.float32).load_codec("cpu")
    latents = noise_from(2, (2, 4, 12, 8))
    z = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    with torch.no_grad():
        picture = pipeline.image_processor.postprocess(pipeline.vae.decode(z, return_dict=False)[0], output_type="np")
    assert np.array_equal(codec.decode(latents)[:, 0].numpy(), (picture * 255).round())


def test_latents_are_the_posteriors_mode(kontext):
    ours = family(kontext, torch.float32)
    codec = ours.load_codec("cpu")
    pictures = torch.randint(0, 256, (1, 48, 32, 3), dtype=torch.uint8)
    assert torch.equal(latents_of(ours, codec, pictures), latents_of(ours, codec, pictures))


def test_latents_are_scaled_as_the_vae_says(kontext):
    """Encoding and decoding are inverse in the VAE's own constants: what goes in decodes to what the VAE makes of it."""
    ours = family(kontext, torch.float32)
    codec = ours.load_codec("cpu")
    pictures = torch.randint(0, 256, (2, 48, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(3))
    again = codec.decode(latents_of(ours, codec, pictures))[:, 0]
    assert (again.float() - through_the_vae(codec.vae, pictures)).abs().max() <= 1


def test_tokens_at_the_real_size(kontext):
    latents = torch.empty(1, 16, 1312 // 8, 784 // 8, device="meta")
    assert family(kontext).tokens(latents) == 4018
    assert len(position_ids(164, 98, 1, torch.device("cpu"))) == 82 * 49
    assert 4018 + 4018 + 512 == 8548


@SIZES
def test_packing_round_trip(height, width):
    latents = torch.randn(2, 16, height // 8, width // 8)
    assert torch.equal(unpack(pack(latents), height // 8, width // 8), latents)


def test_unknown_and_cut_tokens(kontext):
    codec = family(kontext).load_codec("cpu")
    limit = 24  # tokens of the tiny T5, its end token included; a letter is a token, and so is the space before a word
    rows = encode(codec, ["make it warm", "把商品照片", "", "a" * (limit - 2), "a" * (2 * limit - 2)])
    assert [row.unknown for row in rows] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert [row.cut for row in rows] == [0.0, 0.0, 0.0, 0.0, 0.5]


def test_neighbours_and_padding_do_not_change_a_row_at_its_place(kontext):
    ours = family(kontext)
    denoiser = ours.load_denoiser("cpu")
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 6, 4, generator=g)
    condition = {
        "prompt_embeds": torch.randn(4, 24, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(4, 32, generator=g),
        "source_latents": torch.randn(4, 4, 6, 4, generator=g),
    }
    three = SamplingTable(steps=3)
    whole = sample_batch(ours, denoiser, condition, None, noise, three)
    for row in range(3):  # it keeps its place, on which its last bits may depend, and the others change
        order = torch.tensor([3, 2, 1, 1])
        order[row] = row
        shuffled = {name: tensor[order] for name, tensor in condition.items()}
        padded = noise[order].clone()
        padded[3] = 0
        assert torch.equal(sample_batch(ours, denoiser, shuffled, None, padded, three)[row], whole[row])


def test_a_sampler_may_tell_the_network_another_scale(kontext):
    ours = family(kontext, torch.float32)
    denoiser, codec = ours.load_denoiser("cpu"), ours.load_codec("cpu")
    condition = condition_of(ours, codec, ["x"], torch.zeros(1, 48, 32, 3, dtype=torch.uint8))
    noise = noise_from(1, (1, 4, 6, 4))
    default, same, other = (
        sample_batch(ours, denoiser, condition, None, noise, SamplingTable(steps=2, guidance_scale=scale))
        for scale in (None, 3.5, 1.5)
    )
    assert torch.equal(default, same) and not torch.equal(default, other)


def test_auto_size_follows_the_aspect(kontext):
    made = family(kontext)
    assert made.nearest_size(1312, 784) == (1328, 800)  # what the pipeline's _auto_resize does to this picture
    assert made.nearest_size(500, 500) == (1024, 1024)
    assert made.nearest_size(600, 900) == (832, 1248)
    assert made.nearest_size(10, 1000) == (672, 1568) and made.nearest_size(1000, 10) == (1568, 672)
