"""The Qwen-Image family against diffusers' own pipelines on the same tiny weights.

The pipelines are patched in two ways. Their encoder is given `mm_token_type_ids`, which they leave out (diffusers issue 14194);
and the areas that they bring sources to, constants of theirs, are those that ours follow from what is generated.
"""

import math
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from rlhf.data.batches import check_buckets, condition_of, unguided_of
from rlhf.data.encoding import encode_media
from rlhf.data.media import fit_image
from rlhf.errors import Refused
from rlhf.models.family import sample_batch
from rlhf.models.packing import pack, unpack
from rlhf.models.qwen_image_edit import resized
from rlhf.models.qwen_prompts import EDIT, END, PAINT, READ_AREA, padded_text
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from rlhf.tables import SamplingTable
from rlhf.types import Encoding, Geometry, Prompt, Source, noise_from
from tests import worlds
from tests.encoded import tensors_of

HEIGHT, WIDTH = 64, 96
SIZE = Geometry(height=HEIGHT, width=WIDTH)
SIZES = ((40, 100), (90, 50), (64, 64))
"""(H, W) of sources."""
PIPELINES = ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")
NEGATIVE = "blurred, and a good deal longer than what is asked for, so that the two branches have two lengths" * 4
STEPS, SCALE = 4, 4.0
EPS = torch.finfo(torch.float32).eps
TERMS = 32 + 64
"""Of the longest sum in the tiny network."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen")
    return {name: write_qwen_image_edit(root / name, pipeline=name) for name in PIPELINES}


def family(path, dtype=torch.float32):
    return worlds.family(path, dtype, "qwen_image_edit")


def pictures(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES[:count]]


def prompt_of(text: str, count: int, geometry: Geometry = SIZE) -> Prompt:
    sources = (Source(path="", content=str(i), height=h, width=w) for i, (h, w) in enumerate(SIZES[:count]))
    return Prompt(key="a", instruction=text, sources=tuple(sources), geometry=geometry)


def shown(encoding: Encoding) -> list[torch.Tensor]:
    """Its sources at their sizes."""
    whole = pictures(3)
    sizes = zip(encoding.sources, encoding.geometries, strict=True)
    return [torch.from_numpy(fit_image(whole[int(s.content)], g.height, g.width, s.fit))[None] for s, g in sizes]


def rows_of(ours, codec, prompts):
    wanted = [encoding for prompt in prompts for encoding in ours.encodings(prompt)]
    return tensors_of(encode_media(codec, {encoding: shown(encoding) for encoding in wanted}, 2))


@pytest.fixture
def opened(folders, monkeypatch):
    """A pipeline of a folder, patched as above."""

    def opened(name: str):
        pipeline = getattr(diffusers, name).from_pretrained(folders[name])
        pipeline.set_progress_bar_config(disable=True)
        encode, image_token = pipeline.text_encoder.forward, pipeline.text_encoder.config.image_token_id

        def with_types(input_ids, **given):
            return encode(input_ids=input_ids, mm_token_type_ids=(input_ids == image_token).int(), **given)

        monkeypatch.setattr(pipeline.text_encoder, "forward", with_types)
        area, plain = HEIGHT * WIDTH, pipeline_qwenimage_edit.calculate_dimensions
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", area)
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", min(area, READ_AREA))
        monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: plain(area, ratio))
        return pipeline

    return opened


@pytest.mark.parametrize(
    ("name", "count"),
    [("QwenImagePipeline", 0), ("QwenImageEditPipeline", 1), *(("QwenImageEditPlusPipeline", n) for n in (1, 2, 3))],
)
def test_sampling_equals_the_pipelines(folders, opened, name, count):
    ours, pipeline = family(folders[name]), opened(name)
    prompt = prompt_of("make it warm", count)
    noise = noise_from(1, (1, *ours.latent_shape(SIZE)))
    images = [Image.fromarray(picture) for picture in pictures(count)]
    expected = pipeline(
        **({} if not count else {"image": images} if name == PIPELINES[2] else {"image": images[0]}),
        prompt=prompt.instruction,
        negative_prompt=NEGATIVE,
        true_cfg_scale=SCALE,
        height=HEIGHT,
        width=WIDTH,
        latents=pack(noise),
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    codec, sampling = ours.load_codec("cpu"), SamplingTable(steps=STEPS, guidance_scale=SCALE, negative_prompt=NEGATIVE)
    row = rows_of(ours, codec, [prompt, prompt_of(NEGATIVE, count)])
    condition, unguided = condition_of(ours, row, [prompt]), unguided_of(ours, row, [prompt], sampling)
    x0 = sample_batch(ours, ours.load_denoiser("cpu"), condition, unguided, noise, sampling)
    theirs = unpack(expected, *noise.shape[-2:])
    # About what steps × the rounding of a prediction, eps × √terms of its size and 2 × the scale of guidance, come to.
    torch.testing.assert_close(x0, theirs, rtol=0, atol=1e-4)
    plain = sample_batch(
        ours, ours.load_denoiser("cpu"), condition, None, noise, SamplingTable(steps=4, guidance_scale=1)
    )
    assert (plain - x0).abs().max() > 0.01, "guidance does something"


@pytest.mark.parametrize(("name", "count"), [(PIPELINES[0], 0), (PIPELINES[1], 1), (PIPELINES[2], 3)])
@pytest.mark.parametrize("text", ["make it warm", "把背景换成木桌", ""])
def test_a_prompts_row_equals_the_pipelines_embeddings(folders, opened, name, count, text):
    ours, pipeline = family(folders[name]), opened(name)
    (encoding, *_) = ours.encodings(prompt_of(text, count))
    images = [Image.fromarray(picture[0].numpy()) for picture in shown(encoding)]
    given = {} if not count else {"image": images if name == PIPELINES[2] else images[0]}
    theirs, mask = pipeline.encode_prompt(prompt=[text], **given)
    (row,) = ours.load_codec("cpu").encode([encoding], [shown(encoding)])
    assert mask is None and row.unknown == row.cut == 0
    torch.testing.assert_close(
        row.tensors["prompt_embeds"], theirs[0], rtol=0, atol=EPS * 64 * theirs.abs().max().item()
    )


def test_the_places_of_a_pictures_tokens_matter(folders):
    """What the unpatched pipeline gives is something else."""
    ours = family(folders[PIPELINES[2]])
    pipeline = diffusers.QwenImageEditPlusPipeline.from_pretrained(folders[PIPELINES[2]])
    (encoding, *_) = ours.encodings(prompt_of("make it warm", 2))
    images = [Image.fromarray(picture[0].numpy()) for picture in shown(encoding)]
    theirs, _ = pipeline.encode_prompt(prompt=["make it warm"], image=images)
    (row,) = ours.load_codec("cpu").encode([encoding], [shown(encoding)])
    assert (row.tensors["prompt_embeds"] - theirs[0]).abs().max() > 1e-3


def test_pictures_go_through_the_vae_as_in_the_pipelines(folders):
    ours = family(folders[PIPELINES[2]])
    codec, pipeline = ours.load_codec("cpu"), diffusers.QwenImageEditPlusPipeline.from_pretrained(folders[PIPELINES[2]])
    _, encoding = ours.encodings(prompt_of("", 1))
    (picture,) = shown(encoding)
    image = pipeline.image_processor.preprocess(Image.fromarray(picture[0].numpy())).unsqueeze(2)
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(image, None)
    (row,) = codec.encode([encoding], [[picture]])
    torch.testing.assert_close(row.tensors["latents"], theirs[0, :, 0])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (codec.vae.config.latents_mean, codec.vae.config.latents_std))
    with torch.no_grad():
        decoded = codec.vae.decode((row.tensors["latents"] * std + mean)[None, :, None]).sample[:, :, 0]
    decoded = pipeline.image_processor.postprocess(decoded, output_type="np")
    assert np.array_equal(codec.decode(row.tensors["latents"][None])[0].numpy(), (decoded * 255).round())


# --- sizes and lengths -------------------------------------------------------------------------------------------------


def test_sizes_are_the_pipelines_at_about_a_megapixel(folders):
    ours = family(folders[PIPELINES[2]])
    assert ours.nearest_size(1312, 784) == (1312, 800) and ours.nearest_size(500, 500) == (1024, 1024)
    for height, width in ((1312, 784), (333, 1000), (1000, 999), (10, 1000)):
        source = Source(path="", content="", height=height, width=width)
        for area in (1024**2, READ_AREA):
            W, H = pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
            assert (resized(source, area).height, resized(source, area).width) == (max(H, 32), W)


def testtokens_read_of_the_real_sizes(folders):
    """By the real processor's rule, which the tiny one shares: 1:1 is 392² = 14² tokens, 784 × 1312 is 280 × 504."""
    ours = family(folders[PIPELINES[2]])
    for (height, width), tokens in (((1024, 1024), 196), ((1312, 784), 180)):
        source = Source(path="", content="", height=height, width=width)
        prompt = Prompt(key="", instruction="", sources=(source,), geometry=Geometry(height=height, width=width))
        assert ours.tokens_read(ours.encodings(prompt)[0].geometries) == tokens


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("text", ["", "a" * 100, "é" * 60, "木" * 40, "\u0958" * 30, "x9 " * 60])
def test_a_text_never_has_more_tokens_than_it_is_padded_to(folders, count, text):
    """The tiny tokenizer spells what it does not know in bytes: no other can make more of it."""
    ours = family(folders[PIPELINES[2]])
    prompt = prompt_of(text, count)
    encoding = ours.encodings(prompt)[0]
    (row,) = ours.load_codec("cpu").encode([encoding], [shown(encoding)])
    read = ours.tokens_read(encoding.geometries)
    assert len(row.tensors["prompt_embeds"]) - read <= padded_text(text, count)
    assert row.tensors["prompt_embeds"].shape <= ours.empty_row(encoding)["prompt_embeds"].shape
    condition = condition_of(ours, rows_of(ours, ours.load_codec("cpu"), [prompt]), [prompt])
    assert condition["prompt_mask"].sum() == len(row.tensors["prompt_embeds"])


def test_padding_does_not_change_a_prediction(folders):
    ours = family(folders[PIPELINES[2]])
    denoiser, prompt = ours.load_denoiser("cpu"), prompt_of("make it warm", 2)
    condition = condition_of(ours, rows_of(ours, ours.load_codec("cpu"), [prompt]), [prompt])
    x_t, t = noise_from(1, (1, *ours.latent_shape(SIZE))), torch.tensor([0.3])
    there = condition["prompt_mask"][0]
    short = condition | {name: condition[name][:, there] for name in ("prompt_embeds", "prompt_mask")}
    assert not there.all()
    with torch.no_grad():
        long, short = (ours.predict(denoiser, x_t, t, given) for given in (condition, short))
    torch.testing.assert_close(long, short, rtol=0, atol=EPS * TERMS * long.abs().max().item())


def test_a_long_text_is_cut_and_told(folders):
    ours = family(folders[PIPELINES[2]])
    codec, prompt = ours.load_codec("cpu"), prompt_of("9" * 2000, 1)
    encoding = ours.encodings(prompt)[0]
    (row,) = codec.encode([encoding], [shown(encoding)])
    text = len(codec._tokenizer("Picture 1: <|vision_start|><|vision_end|>" + "9" * 2000 + END).input_ids)
    assert len(row.tensors["prompt_embeds"]) == ours.tokens_read(encoding.geometries) + 1024
    assert row.cut == pytest.approx((text - 1024) / text)


def test_what_stands_before_an_instruction_has_the_lengths_that_the_pipelines_count_on(folders):
    codec = family(folders[PIPELINES[2]]).load_codec("cpu")
    assert [len(codec._tokenizer(text).input_ids) for text in (PAINT, EDIT)] == [34, 64]


# --- buckets and refusals ----------------------------------------------------------------------------------------------


def test_prompts_of_other_sizes_and_lengths_share_no_batch(folders):
    ours = family(folders[PIPELINES[2]])
    one = prompt_of("make it warm", 2)
    others = [
        prompt_of("make it cold", 2),
        prompt_of("make it warm", 1),
        prompt_of("make it warm" * 40, 2),
        prompt_of("make it warm", 2, Geometry(height=96, width=64)),
    ]
    assert [ours.bucket(other) == ours.bucket(one) for other in others] == [True, False, False, False]
    with pytest.raises(Refused, match="cannot share a batch"):
        check_buckets(ours, [one, others[1]], 2)


def test_what_a_prompt_may_be(folders):
    with pytest.raises(Refused, match=r"'a' has 2 sources; this model takes at most 1"):
        family(folders[PIPELINES[1]]).bucket(prompt_of("", 2))
    with pytest.raises(Refused, match=r"holds '<\|image_pad\|>', which the model takes for a mark"):
        family(folders[PIPELINES[2]]).bucket(prompt_of("see <|image_pad|>", 1))
    assert [family(folders[name]).source_counts for name in PIPELINES] == [range(1), range(2), range(4)]


def test_an_edit_model_paints_where_there_is_no_source(folders):
    """It is told so as Qwen-Image is."""
    texts = [prompt_of("a bowl", 0)]
    rows = []
    for name in (PIPELINES[0], PIPELINES[2]):
        ours = family(folders[name])
        (encoding,) = ours.encodings(texts[0])
        rows.append(ours.load_codec("cpu").encode([encoding], [[]])[0].tensors["prompt_embeds"])
    assert torch.equal(*rows)


def test_sources_of_a_2511_are_read_at_time_0(tmp_path, folders):
    """zero_cond_t adds no weights: at t = 0 nothing changes, and elsewhere it does."""
    plain, ours = family(folders[PIPELINES[2]]), family(write_qwen_image_edit(tmp_path / "2511", zero_cond_t=True))
    prompt = prompt_of("make it warm", 2)
    condition = condition_of(ours, rows_of(ours, ours.load_codec("cpu"), [prompt]), [prompt])
    x_t, predict = noise_from(1, (1, *ours.latent_shape(SIZE))), []
    for one in (plain, ours):
        predict.append(partial(one.predict, one.load_denoiser("cpu"), x_t))
    with torch.no_grad():
        for t in (0.0, 0.7):
            first, second = (some(torch.tensor([t]), condition) for some in predict)
            same = (first - second).abs().max() <= EPS * TERMS * first.abs().max()
            assert same == (t == 0)


def test_a_guided_prediction_is_as_long_as_the_conditional_one(folders):
    ours = family(folders[PIPELINES[2]])
    denoiser, prompt = ours.load_denoiser("cpu"), prompt_of("make it warm", 1)
    other = ours.unguided(prompt)
    row = rows_of(ours, ours.load_codec("cpu"), [prompt, other])
    condition, unguided = condition_of(ours, row, [prompt]), condition_of(ours, row, [other], [prompt])
    x_t, t = noise_from(1, (1, *ours.latent_shape(SIZE))), torch.tensor([0.5])
    with torch.no_grad():
        c, u = (ours.predict(denoiser, x_t, t, given) for given in (condition, unguided))
        guided = ours.guided(denoiser, x_t, t, condition, unguided, guidance_scale=3.0, step=0, state={})
    lengths = [pack(prediction).norm(dim=-1) for prediction in (c, guided)]
    torch.testing.assert_close(*lengths)
    cosine = torch.nn.functional.cosine_similarity(pack(guided), pack(u + 3 * (c - u)), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert other.instruction == " " and not torch.equal(guided, c)


def test_the_tables_of_rope_are_made_anew(folders):
    """On the meta device they are made without values, and no state dict has them."""
    ours = family(folders[PIPELINES[2]])
    empty, loaded = ours.empty_denoiser(torch.float32), ours.load_denoiser("cpu")
    assert empty.pos_embed.pos_freqs.is_meta
    ours.finish(empty, "cpu")
    for name in ("pos_freqs", "neg_freqs"):
        assert torch.equal(getattr(empty.pos_embed, name), getattr(loaded.pos_embed, name))


def test_the_time_that_sampling_ends_at(folders):
    """The eight times at 1024² that diffusers' scheduler gives, and none of its NaN for one step."""
    process = family(folders[PIPELINES[2]]).process
    times = [1, 0.916, 0.820, 0.7093, 0.5801, 0.4273, 0.2441, 0.02, 0]
    assert process.sigmas(8, 4096).tolist() == pytest.approx(times, abs=1e-4)
    assert process.sigmas(1, 4096).tolist() == [1, 0]
    assert process._shift(1024) == pytest.approx(math.exp(0.5387), rel=1e-4)
