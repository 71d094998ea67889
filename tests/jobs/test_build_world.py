"""The whole world is built small, goes on where it was stopped, and what it wrote is what the product loads."""

import hashlib
import json

import pytest

from jobs.build_world import Effort, World
from rlhf.errors import Refused

SMALL = Effort(
    photos=100,
    held_out=22,
    vae_steps=20,
    edits=64,
    edit_steps=10,
    hps_steps=10,
    ctr_epochs=1,
    filter_steps=8,
    sound=32,
    null_steps=2,
    null_prompts=4,
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parts_are_built_once_measured_and_named_in_the_manifest(tmp_path):
    world = World(tmp_path / "world", 0, SMALL)
    manifest = json.loads(world.build().read_text())
    figures, hashes = manifest["figures"], manifest["sha256"]
    assert {
        "vae_db",
        "follows_brighter_trained",
        "hps_pair_accuracy",
        "ctr_pair_accuracy",
        "filter_balanced_accuracy",
    } <= set(figures)
    for file, digest in hashes.items():
        assert hashlib.sha256((world.folder / file).read_bytes()).hexdigest() == digest
    assert {"kontext/transformer/diffusion_pytorch_model.safetensors", "hps/hps.safetensors"} <= set(hashes)
    before = {file: file.stat().st_mtime_ns for name in ("kontext", "hps") for file in (world.folder / name).rglob("*")}
    assert World(world.folder, 0, SMALL).build().read_text() == json.dumps(
        manifest, indent=2
    )  # and measures nothing anew
    (world.folder / "ctr").rename(tmp_path / "away")
    (world.folder / ".ctr.partial").mkdir()
    (world.folder / "manifest.json").unlink()
    again = json.loads(World(world.folder, 0, SMALL).build().read_text())
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again["sha256"] == hashes and again["figures"] == figures


@pytest.mark.slow
def test_a_world_of_another_family_is_built_beside_it(tmp_path):
    for _ in range(2):
        written = World(tmp_path / "world", 0, SMALL, "qwen_image_edit").build()
        manifest = json.loads(written.read_text())
        assert written.name == "qwen_manifest.json" and {"vae_db", "follows_vivid_trained"} <= set(manifest["figures"])
        assert {file.split("/")[0] for file in manifest["sha256"]} == {"qwen"} and "null" not in manifest
    assert not [file for file in written.parent.glob("*/*/config.json") if "_name_or_path" in file.read_text()]
    World(tmp_path / "world", 0, SMALL)._begin()  # the folder takes the other one too


def test_another_seed_and_somebody_elses_folder_are_refused(tmp_path):
    with pytest.raises(Refused, match="is not empty and was not begun by this command"):
        (tmp_path / "mine.txt").write_text("")
        World(tmp_path, 0, SMALL).build()
    folder = tmp_path / "world"
    World(folder, 0, SMALL)._begin()
    World(folder, 0, SMALL)._begin()
    for other in (World(folder, 1, SMALL), World(folder, 0, Effort())):
        with pytest.raises(Refused, match=r"was begun with .*, not with .*: give the same seed, or another --dir"):
            other.build()
    assert [file.name for file in folder.iterdir()] == ["build.json"]
