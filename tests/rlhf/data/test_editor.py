"""Edits from Python are those of the command."""

import sys

import numpy as np
import pytest
from PIL import Image

from jobs import edit
from rlhf.data.editor import Editor
from rlhf.errors import Refused
from rlhf.models.flux_kontext import FluxKontext
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from tests.rlhf.data.pair_tables import png


@pytest.fixture(scope="module")
def folders(tmp_path_factory, kontext):
    return {
        "flux_kontext": kontext,
        "qwen_image_edit": write_qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen"),
    }


@pytest.mark.parametrize(("family", "count"), [("flux_kontext", 1), ("qwen_image_edit", 1), ("qwen_image_edit", 3)])
def test_the_same_picture_as_the_commands(folders, tmp_path, monkeypatch, family, count):
    files = [tmp_path / f"{name}.png" for name in ("dish", "table", "light")[:count]]
    for i, file in enumerate(files):
        file.write_bytes(png(i, 60 + 8 * i, 40))
    given = {"model.family": family, "model.path": folders[family], "model.height": 48, "model.width": 32}
    given |= {"sampling.steps": 2, "edit.image": files[0], "edit.prompt": "warm", "edit.seed": 3, "edit.device": "cpu"}
    given |= {"edit.out": tmp_path / "edits", "edit.references": [str(file) for file in files[1:]]}
    monkeypatch.setattr(sys, "argv", ["edit", *(f"--{key}={value}" for key, value in given.items())])
    edit.main()
    editor = Editor(folders[family], family=family, height=48, width=32)
    made = editor.edit("warm", *files, seed=3, steps=2)
    assert np.array_equal(made, np.asarray(Image.open(tmp_path / "edits" / "dish_0.png")))
    assert not np.array_equal(made, editor.edit("warm", *files, seed=4, steps=2))
    if count > 1:
        assert not np.array_equal(made, editor.edit("warm", files[0], seed=3, steps=2))


def test_what_is_wrong_is_said(folders, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0)[:50])
    editor = Editor(folders["flux_kontext"], height=48, width=32)
    with pytest.raises(Refused, match=r"a\.png: .*is unreadable"):
        editor.edit("warm", tmp_path / "a.png", steps=1)
    with pytest.raises(Refused, match=r"has 0 sources; FLUX\.1 Kontext edits exactly one"):
        editor.edit("warm", steps=1)
    with pytest.raises(Refused, match=r"sampling\.negative_prompt = 'dark' is never read"):
        editor.edit("warm", tmp_path / "a.png", negative_prompt="dark")
    with pytest.raises(Refused, match=r"\[sampling\] unknown key 'step' = 1; did you mean 'steps'\?"):
        editor.edit("warm", tmp_path / "a.png", step=1)
    with pytest.raises(Refused, match=r"\[sampling\] steps = 0: Input should be greater than or equal to 1"):
        editor.edit("warm", tmp_path / "a.png", steps=0)
    with pytest.raises(Refused, match=r"\[model\] dtype = 'half': Input should be 'bfloat16'"):
        Editor(folders["flux_kontext"], dtype="half")
    with pytest.raises(Refused, match=r"\[model\] unknown key 'heigth' = 48; did you mean 'height'\?"):
        Editor(folders["flux_kontext"], heigth=48, width=32)
    with pytest.raises(Refused, match=r"width alone: give height and width, or neither"):
        Editor(folders["flux_kontext"], width=32)
    with pytest.raises(Refused, match=r"leave out height = 48 and width = 32"):
        Editor(folders["flux_kontext"], height=48, width=32, size="auto")
    with pytest.raises(Refused, match=r"denoiser = 'a' and lora = 'b': give one of them"):
        Editor(folders["flux_kontext"], denoiser="a", lora="b")
    for name in ("device", "encoder_device"):
        with pytest.raises(Refused, match=rf"{name} = 'gpu' is no device of this machine"):
            Editor(folders["flux_kontext"], **{name: "gpu"})
    with pytest.raises(Refused, match=r"nothing"):
        Editor(folders["flux_kontext"], denoiser=tmp_path / "nothing")
    with pytest.raises(Refused, match=r"is no file; put the picture at"):
        editor.edit("warm", tmp_path)
    with pytest.raises(Refused, match=r"there is no such folder"):
        Editor(tmp_path / "nothing")


def test_more_pictures_than_the_model_takes_are_refused(folders, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(0))
    given = {"model.path": folders["flux_kontext"], "edit.image": tmp_path / "a.png", "edit.device": "cpu"}
    given |= {"edit.references": [str(tmp_path / "a.png")]}
    monkeypatch.setattr(sys, "argv", ["edit", *(f"--{key}={value}" for key, value in given.items())])
    with pytest.raises(Refused, match=r"edit\.references = \['.*a\.png'\]: this model takes at most 1 pictures in all"):
        edit.main()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["flux_kontext", "qwen_image_edit"])
def test_encoders_and_vae_may_stay_on_the_cpu(folders, tmp_path, family):
    """What differs is rounding: bf16 has 8 bits, and two pictures of 8 bits may round apart."""
    (tmp_path / "a.png").write_bytes(png(0))
    shared = {"family": family, "height": 48, "width": 32, "device": "cuda"}
    split, whole = (Editor(folders[family], **shared, encoder_device=device) for device in ("cpu", None))
    assert split._codec.device == "cpu" and next(split._denoiser.parameters()).is_cuda
    made, other = (editor.edit("warm", tmp_path / "a.png", steps=2).astype(int) for editor in (split, whole))
    assert np.abs(made - other).mean() < 4


def test_the_codec_is_loaded_where_it_is_asked_for(folders, tmp_path, monkeypatch):
    asked = []
    load = FluxKontext.load_codec
    monkeypatch.setattr(FluxKontext, "load_codec", lambda self, device: (asked.append(device), load(self, "cpu"))[1])
    for device in (None, "meta"):
        Editor(folders["flux_kontext"], height=48, width=32, encoder_device=device)
    assert asked == ["cpu", "meta"]
