"""The sampler in this process: numbers that are not finite never become a picture, in files or for judges."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.sampler import Sampler, SampleRequest
from rlhf.data.cache import EncodingCache, commit, write_part
from rlhf.data.encoding import encode_rows
from rlhf.data.fingerprint import fingerprints
from rlhf.data.sampler import encodings_for_sampling
from rlhf.errors import NotFinite
from rlhf.models import load_family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.models.trainable import load_trainable
from rlhf.shards import buffers
from rlhf.shards.files import Shard
from rlhf.tables import ModelTable, SamplingTable, WeightsTable
from rlhf.training_tables import TrainableTable
from rlhf.types import Geometry, Prompt

SAMPLING = SamplingTable(steps=1, batch_size=2)
TEXTS = ("a red apple", "a green pear, " * 3)


@pytest.fixture
def model(tmp_path):
    """A folder of this test's own, whose files it may break."""
    return ModelTable(family="stable_diffusion", path=str(write_stable_diffusion(tmp_path / "sd")), dtype="float32")


def requests():
    geometry = Geometry(height=32, width=32)
    prompts = [Prompt(key=f"p{i}", instruction=text, geometry=geometry) for i, text in enumerate(TEXTS)]
    return [SampleRequest(prompt=prompt, noise_seed=i, slot=i) for i, prompt in enumerate(prompts)]


def break_file(file, name, value=math.nan):
    tensors = load_file(file)
    tensors[next(key for key in tensors if name in key)].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})


def painted(model, folder, weights=None):
    """Paint both prompts into a folder; returns what paint does."""
    paintings = [(request, folder / f"{request.prompt.key}.png", None) for request in requests()]
    return Sampler(model, SAMPLING, "cpu").paint(weights or WeightsTable(), paintings)


def refused(model, folder, says, weights=None):
    with pytest.raises(NotFinite, match=says):
        painted(model, folder, weights)
    assert not list(folder.glob("*.png")), "a picture of numbers that are none"


def test_paint_tells_what_is_not_read_of_an_instruction(model, tmp_path):
    found = painted(model, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 2
    ((key, (unknown, cut)),) = found.items()
    letters = len(TEXTS[1].replace(" ", ""))  # the tiny CLIP reads letters, 24 with the two special tokens
    assert key == ("p1", TEXTS[1]) and unknown == 0 and cut == pytest.approx((letters + 2 - 24) / (letters + 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_that_gives_nan_paints_nothing_and_names_prompts_and_weights(model, tmp_path, value):
    break_file(Path(model.path) / "unet/diffusion_pytorch_model.safetensors", "conv_in.weight", value)
    says = f"no picture of 'p0', 'p1' with model.path = {model.path!r}: the denoiser gives NaN or infinity"
    refused(model, tmp_path, re.escape(says))


def test_a_lora_that_gives_nan_is_named(model, tmp_path):
    weight = load_family(model).load_denoiser("cpu").conv_out.weight
    halves = {"lora_A": torch.ones(2, *weight.shape[1:]), "lora_B": torch.full((len(weight), 2, 1, 1), math.nan)}
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.conv_out.{half}.weight": value for half, value in halves.items()}, file)
    refused(model, tmp_path, re.escape(f"with tuned.lora = {str(file)!r}: "), WeightsTable(lora=str(file)))


def test_a_vae_and_an_encoder_that_give_nan_are_named(model, tmp_path):
    (tmp_path / "pictures").mkdir()
    break_file(Path(model.path) / "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight")
    refused(model, tmp_path / "pictures", "the VAE gives NaN or infinity")
    break_file(Path(model.path) / "text_encoder/model.safetensors", "position_embedding")
    refused(model, tmp_path / "pictures", "what the encoders made of it is NaN or infinite")


def test_a_rollout_with_weights_that_give_nan_is_no_candidate(model, tmp_path):
    family = load_family(model)
    wanted = [e for request in requests() for e in encodings_for_sampling(family, request.prompt, SAMPLING)]
    cache = EncodingCache(tmp_path / "cache", fingerprints(family))
    rows = encode_rows(family.load_codec("cpu"), wanted, 2)
    commit(cache.folder, [write_part(cache.folder, {cache.key(encoding): row for encoding, row in rows.items()})])
    trainable = load_trainable(TrainableTable(kind="modules", patterns=("conv_out",)), family)
    sampler = Sampler(model, SAMPLING, "cpu", trainable=trainable, cache=cache)
    unet = family.load_denoiser("cpu")
    for version, bias in ((0, 0.0), (1, math.nan)):
        values = {"conv_out.weight": unet.conv_out.weight, "conv_out.bias": torch.full_like(unet.conv_out.bias, bias)}
        shards = [Shard(name=name, shape=tuple(v.shape), start=0, rows=v) for name, v in values.items()]
        packed = list(buffers.pack(shards))
        sampler.load(version, [manifest for _, manifest in packed], *(buffer for buffer, _ in packed))
        if version == 0:
            assert sampler.sample(requests())[0] == 0
    with pytest.raises(NotFinite, match=r"no picture of 'p0', 'p1' with published version 1 of the trained weights: "):
        sampler.sample(requests())
