"""Wrong model folders are refused by `check_model`, and sound ones are taken, also those of older layouts."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.checks import check_denoiser, check_model
from rlhf.models.tiny import write_stable_diffusion
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from rlhf.shards.files import SafetensorsFolder
from rlhf.tables import ModelTable
from tests.wrong_models import STEM, WRONG, edit, shard, tensors

CASES = [(family, fault) for family, some in WRONG.items() for fault in some]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, kontext):
    models = tmp_path_factory.mktemp("models")
    write_stable_diffusion(models / "xl", xl=True)
    write_qwen_image_edit(models / "qwen", pipeline="QwenImagePipeline")
    return {
        "flux_kontext": kontext,
        "qwen_image_edit": write_qwen_image_edit(models / "edit"),
        "painting": models / "qwen",
        "stable_diffusion": write_stable_diffusion(models / "sd"),
        "xl": models / "xl",
    }


@pytest.fixture
def copy(folders, tmp_path):
    """A table of a copy of a sound folder that a function has changed."""

    def made(name, change=lambda folder: None, **keys):
        folder = shutil.copytree(folders[name], tmp_path / "model")
        change(folder)
        family = {"xl": "stable_diffusion", "painting": "qwen_image_edit"}.get(name, name)
        return ModelTable(family=family, path=str(folder), **keys)

    return made


@pytest.mark.parametrize(("family", "fault"), CASES, ids=[f"{family}: {fault}" for family, fault in CASES])
def test_a_wrong_folder_is_refused_by_name(copy, family, fault):
    change, said = WRONG[family][fault]
    with pytest.raises(Refused, match=rf"(?s)^model\.path = '.*model': .*{said}"):
        check_model(copy(family, change))


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit", "painting", "stable_diffusion", "xl"])
def test_a_sound_folder_is_taken(copy, name):
    table = copy(name)
    assert check_model(table).path == load_family(table).path


@pytest.mark.parametrize("what", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(tmp_path, what):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(Refused, match=r"model\.path = .*: (is a single file|there is no such folder); give the folder"):
        check_model(ModelTable(path=str(tmp_path / what)))


def test_a_kontext_copy_with_devs_index_is_taken_when_the_recipe_says_so(copy):
    assert check_model(copy("flux_kontext", edit("model_index.json", _class_name="FluxPipeline"), accept_index=True))


def test_the_trainer_and_diffusers_read_the_same_bytes_of_shards_beside_an_older_file(copy):
    """And of an fp16 variant: neither the pattern *.safetensors nor the order of names decides."""

    def change(folder):
        denoiser = folder / "transformer"
        old = {name: torch.zeros_like(tensor) for name, tensor in load_file(denoiser / f"{STEM}.safetensors").items()}
        shard(denoiser)
        for name in (STEM, f"{STEM}.fp16", "zzz"):
            save_file(old, denoiser / f"{name}.safetensors")

    table = copy("flux_kontext", change)
    family = check_model(table)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(family.denoiser_path)
    ours = SafetensorsFolder(family.denoiser_path)
    assert ours.where.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.rows(name, 0, tensor.shape[0], tensor.shape), tensor), name
    assert any(tensor.any() for tensor in theirs.state_dict().values())


def test_a_text_encoders_file_wins_over_shards_as_in_transformers(copy):
    def change(folder):
        shutil.copy(folder / "text_encoder_2/model.safetensors", folder / "whole.safetensors")
        shard(folder / "text_encoder_2", "model")
        (folder / "whole.safetensors").rename(folder / "text_encoder_2/model.safetensors")
        next((folder / "text_encoder_2").glob("model-00001*")).unlink()

    family = check_model(copy("flux_kontext", change))
    assert family.load_codec("cpu")._text


def test_text_encoders_and_vaes_of_older_libraries_are_taken_and_load(copy):
    """transformers gave CLIP's text model a prefix, diffusers named the VAE's attention otherwise, both in real checkpoints."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename_vae(found):
        for name in [name for name in found if ".attentions." in name]:
            for new, other in old.items():
                if f".{new}." in name:
                    found[name.replace(f".{new}.", f".{other}.")] = found.pop(name)

    def change(folder):
        file = "text_encoder/model.safetensors"
        tensors(file, lambda t: t.update({f"text_model.{name}": t.pop(name) for name in list(t)}))(folder)
        tensors(f"vae/{STEM}.safetensors", rename_vae)(folder)
        assert "query" in str(load_file(folder / f"vae/{STEM}.safetensors").keys())

    family = check_model(copy("stable_diffusion", change))
    assert family.load_codec("cpu")._text


def test_an_encoder_whose_weights_lack_a_tensor_is_refused_when_it_loads_too(copy):
    table = copy("flux_kontext", tensors("text_encoder_2/model.safetensors", lambda t: t.pop(max(t))))
    with pytest.raises(Refused, match=r"text_encoder_2: the weights lack 2 tensors, the first is encoder\.embed"):
        _ = load_family(table).load_codec("cpu")._text


# --- model.denoiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRONG)
def test_a_trained_denoiser_is_checked_like_the_models_own(folders, copy, tmp_path, family):
    """And the model's own weights are not needed then."""
    denoiser = load_family(ModelTable(family=family, path=str(folders[family]))).denoiser_folder
    trained = shutil.copytree(folders[family] / denoiser, tmp_path / "trained")
    table = copy(family, lambda folder: (folder / denoiser / f"{STEM}.safetensors").unlink(), denoiser=str(trained))
    assert check_model(table).denoiser_path == trained
    for fault in ("no weights", "pointer for weights", "fp8", "cut off", "an index that forgets one", "another shape"):
        whole = shutil.copytree(folders[family], tmp_path / fault)
        change, said = WRONG[family][fault]
        change(whole)
        wrong = table.model_copy(update={"denoiser": str(whole / denoiser)})
        with pytest.raises(Refused, match=rf"(?s)model\.denoiser = '.*': .*{said}"):
            check_model(wrong)


@pytest.mark.parametrize("family", WRONG)
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("vae", r"_class_name = 'AutoencoderKL\w*', but this family takes"),
        ("", r"holds no config\.json; give e\.g\. RUN/final/"),
    ],
)
def test_a_trained_folder_of_something_else_is_refused(folders, family, place, what):
    table = ModelTable(family=family, path=str(folders[family]), denoiser=str(folders[family] / place))
    with pytest.raises(Refused, match=rf"model\.denoiser = .*{what}"):
        check_model(table)


def test_a_trained_folder_with_other_settings_of_equal_shapes_is_refused(folders, tmp_path):
    """The trainer goes by the model's config, samplers by the folder's own."""
    kontext = folders["flux_kontext"]
    trained = shutil.copytree(kontext / "transformer", tmp_path / "transformer")
    family = check_model(ModelTable(path=str(kontext)))
    check_denoiser(family, trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"axes_dims_rope": [8, 4, 4]}))
    with pytest.raises(Refused, match=r"axes_dims_rope = \[8, 4, 4\], but the base model has \[4, 6, 6\]"):
        check_denoiser(family, trained)


def test_a_vision_language_model_of_newer_names_is_taken_and_loads_the_same(copy):
    """transformers 5 saves the older names, and reads both."""
    table = copy("qwen_image_edit")
    file = Path(table.path) / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    before = check_model(table).load_codec("cpu")._reader.state_dict()
    assert any(name.startswith("visual.") for name in stored) and any(
        name.startswith("model.layers.") for name in stored
    )

    def newer(name):
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1)

    save_file({newer(name): tensor for name, tensor in stored.items()}, file)
    after = check_model(table).load_codec("cpu")._reader.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
