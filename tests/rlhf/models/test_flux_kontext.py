"""The Kontext family against diffusers' own pipeline on the same tiny weights."""

import pytest
import torch

from rlhf.errors import Refused
from rlhf.models.flux_kontext import pack, position_ids, unpack
from rlhf.models.sampling import sample
from rlhf.types import noise_from
from tests.worlds import family

SIZES = pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 112)])


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
    condition = codec.encode_text(["make it warm", "blur the background"]) | codec.encode_source(pictures)
    noise = noise_from(1, (2, *ours.latent_shape(height, width)))
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
    x0 = sample(ours, denoiser, condition, noise, 6)
    assert (unpack(expected, *noise.shape[-2:]) - x0).abs().max() <= 1e-5
    assert x0.std() > 0.1


def test_text_embeddings_equal_the_pipelines(pipeline, kontext):
    codec = family(kontext, torch.float32).load_codec("cpu")
    texts = ["make it warm", ""]
    embeds, pooled, text_ids = pipeline.encode_prompt(
        prompt=texts, prompt_2=None, max_sequence_length=pipeline.tokenizer_2.model_max_length
    )
    ours = codec.encode_text(texts)
    torch.testing.assert_close(ours["prompt_embeds"], embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-6)
    assert not text_ids.any(), "text ids are zeros: why they are not stored"


def test_decoding_equals_the_pipelines(pipeline, kontext):
    codec = family(kontext, torch.float32).load_codec("cpu")
    latents = noise_from(2, (2, 4, 12, 8))
    z = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    with torch.no_grad():
        picture = pipeline.image_processor.postprocess(pipeline.vae.decode(z, return_dict=False)[0], output_type="np")
    assert (codec.decode(latents).numpy() - (picture * 255).round()).max() <= 0


def test_source_latents_are_the_posteriors_mode(kontext):
    codec = family(kontext, torch.float32).load_codec("cpu")
    pictures = torch.randint(0, 256, (1, 48, 32, 3), dtype=torch.uint8)
    assert torch.equal(codec.encode_target(pictures), codec.encode_target(pictures))


def test_tokens_at_the_real_size(kontext):
    latents = torch.empty(1, 16, 1312 // 8, 784 // 8, device="meta")
    assert family(kontext).tokens(latents) == 4018
    assert len(position_ids(164, 98, 1, torch.device("cpu"))) == 82 * 49
    assert 4018 + 4018 + 512 == 8548


@SIZES
def test_packing_round_trip(height, width):
    latents = torch.randn(2, 16, height // 8, width // 8)
    assert torch.equal(unpack(pack(latents), height // 8, width // 8), latents)


def test_unknown_tokens(kontext):
    codec = family(kontext).load_codec("cpu")
    assert codec.unknown_tokens(["make it warm", "把商品照片", ""]) == [0.0, 1.0, 0.0]


def test_a_folder_that_is_no_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(Refused, match=r"model.path = .*no Flux Kontext folder.*config.json is missing"):
        family(tmp_path).load_denoiser("cpu")


def test_neighbours_and_padding_do_not_change_a_row(kontext):
    ours = family(kontext)
    denoiser = ours.load_denoiser("cpu")
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, 6, 4, generator=g)
    condition = {
        "prompt_embeds": torch.randn(4, 24, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(4, 32, generator=g),
        "source_latents": torch.randn(4, 4, 6, 4, generator=g),
    }
    whole = sample(ours, denoiser, condition, noise, 3)
    order = torch.tensor([2, 0, 3, 3])
    shuffled = {name: tensor[order] for name, tensor in condition.items()}
    padded = noise[order].clone()
    padded[3] = 0
    assert torch.equal(sample(ours, denoiser, shuffled, padded, 3)[:3], whole[order[:3]])
