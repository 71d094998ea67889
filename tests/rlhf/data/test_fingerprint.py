"""The encoders' fingerprint follows content, not paths or dates."""

import os
import shutil

import pytest

from rlhf.data.fingerprint import IncompleteModel, fingerprint


@pytest.fixture
def model(tmp_path):
    for folder in ("vae", "tokenizer"):
        (tmp_path / "model" / folder).mkdir(parents=True)
        (tmp_path / "model" / folder / "config.json").write_text("{}")
    (tmp_path / "model/vae/weights.safetensors").write_bytes(bytes(1000))
    return tmp_path / "model"


def test_a_copy_elsewhere_with_other_dates_is_the_same(model, tmp_path):
    before = fingerprint(model, ("vae", "tokenizer"))
    shutil.copytree(model, tmp_path / "copy")
    os.utime(tmp_path / "copy/vae/config.json", (1, 1))
    (tmp_path / "copy/vae/.hidden").write_text("x")
    assert fingerprint(tmp_path / "copy", ("vae", "tokenizer")) == before


def test_any_change_is_seen(model):
    seen = [fingerprint(model, ("vae",))]
    weights = model / "vae/weights.safetensors"
    weights.write_bytes(bytes(999) + b"\x01")  # same size: the modification time tells
    os.utime(weights, ns=(10**9, 10**9))
    seen.append(fingerprint(model, ("vae",)))
    (model / "vae/config.json").write_text('{"a": 1}')
    seen.append(fingerprint(model, ("vae",)))
    weights.rename(model / "vae/other.safetensors")
    seen.append(fingerprint(model, ("vae",)))
    seen += [fingerprint(model, ("vae", "tokenizer")), fingerprint(model, ("vae",), "float32")]
    assert len(set(seen)) == 6


def test_other_folders_do_not_matter(model):
    before = fingerprint(model, ("vae",))
    (model / "tokenizer/config.json").write_text('{"a": 1}')
    assert fingerprint(model, ("vae",)) == before


def test_a_missing_or_empty_folder_is_an_error(model):
    (model / "text_encoder").mkdir()
    for folder in ("text_encoder", "nowhere"):
        with pytest.raises(IncompleteModel, match=f"{folder} is missing or empty"):
            fingerprint(model, ("vae", folder))
