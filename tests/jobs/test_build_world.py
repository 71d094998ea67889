"""The whole world is built small, goes on where it was stopped, and what it wrote is what the product loads."""

import hashlib
import json

import pytest

from jobs.build_world import Effort, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
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
    (world.folder / "ctr").rename(tmp_path / "away")
    (world.folder / ".ctr.partial").mkdir()
    again = json.loads(World(world.folder, 0, SMALL).build().read_text())
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again["sha256"] == hashes and again["figures"] == figures
