"""Peaks of samplers and encoders: known weights, and activations that grow with the batch."""

import pytest
import torch

from rlhf.models import FAMILIES, load_family
from rlhf.models.memory import encoder_peak, forward_flops, modules_of, sampler_peak
from rlhf.models.quantised import STORED
from rlhf.models.trainable import load_for_sampling, load_trainable
from rlhf.tables import ModelTable, SamplingTable
from rlhf.training_tables import TrainableTable
from rlhf.types import Geometry, Prompt, Source
from tests import worlds


def prompt_of(family, side=64):
    sources = (Source(path="", content="", height=48, width=32),) * max(family.source_counts)
    return Prompt(key="", instruction="", sources=sources, geometry=Geometry(height=side, width=side))


@pytest.fixture(scope="module", params=[kind for kind in worlds.WRITERS if kind.split()[0] in FAMILIES])
def family(request, tmp_path_factory):
    kind = request.param
    folder = worlds.WRITERS[kind](tmp_path_factory.mktemp("models") / "model")
    return worlds.family(folder, torch.float32, kind)


def full(family):
    (kind,) = (name for name, made in FAMILIES.items() if isinstance(family, made))
    return worlds.trainable("full", family, kind)


def nbytes(network):
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def test_a_sampler_holds_the_denoiser_and_the_vae_and_what_a_batch_needs(family):
    codec, denoiser = family.load_codec("cpu"), family.load_denoiser("cpu")
    peaks = [sampler_peak(family, full(family), SamplingTable(batch_size=size), prompt_of(family)) for size in (2, 4)]
    for peak in peaks:
        assert peak.kinds["parameters"] == nbytes(denoiser) + nbytes(codec.vae)
    small, large = (peak.kinds["activations"] for peak in peaks)
    pixels = 2 * 3 * 64 * 64 * 4
    assert small > 2 * pixels, "two pictures and what they were decoded from"
    assert large == pytest.approx(2 * small, rel=0.1), "all but sizes that belong to no picture"


@pytest.mark.parametrize("base", STORED)
def test_a_quantised_base_takes_what_it_says(kontext, base):
    family = load_family(ModelTable(path=str(kontext), base=base))
    lora = load_trainable(TrainableTable(kind="lora", rank=4), family)
    peak, plain = (
        sampler_peak(found, lora, SamplingTable(batch_size=2), prompt_of(found))
        for found in (family, load_family(ModelTable(path=str(kontext))))
    )
    denoiser = load_for_sampling(family, lora, "cpu")
    assert peak.kinds["parameters"] == nbytes(denoiser) + nbytes(family.load_codec("cpu").vae)
    assert peak.kinds["parameters"] < plain.kinds["parameters"]


def test_an_encoder_holds_what_it_was_asked_for_and_a_batch(family):
    peaks = [encoder_peak(family, size, prompt_of(family)) for size in (2, 4)]
    codec = family.load_codec("cpu")
    for name in ("_text", "_reader", "_seer"):
        getattr(codec, name, None)  # opened when first used
    held = sum(map(nbytes, modules_of(codec)))
    assert [peak.kinds["parameters"] for peak in peaks] == [held, held]
    assert peaks[1].kinds["activations"] > 1.5 * peaks[0].kinds["activations"]


def test_operations_grow_with_the_picture(family):
    """Every weight of a linear layer works on every token, and attention on every two."""
    small, large = (forward_flops(family, prompt_of(family, side)) for side in (256, 512))
    assert 3 * small < large < 16 * small


def test_only_json_files_are_read(family, tmp_path):
    for file in family.path.rglob("*.json"):
        if "safetensors" not in file.name:
            copy = tmp_path / file.relative_to(family.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    bare = type(family)(path=tmp_path, dtype=family.dtype)
    for peak in (
        lambda found: sampler_peak(found, full(found), SamplingTable(batch_size=2), prompt_of(found)),
        lambda found: encoder_peak(found, 2, prompt_of(found)),
    ):
        found, whole = peak(bare).kinds, peak(family).kinds
        assert found["parameters"] == whole["parameters"]
        assert found["activations"] == pytest.approx(
            whole["activations"], rel=0.02
        )  # the first trace has a few kB more
