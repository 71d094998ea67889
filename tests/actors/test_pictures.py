"""An evaluation's pictures with plain objects: which noise, which place, which weights; nothing of it needs a cluster."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors.pictures import batches, painted_file, source_file
from actors.sampler import Sampler
from rlhf.evaluation.prompts import read_evaluation
from rlhf.models import load_family
from rlhf.models.tiny import write_stable_diffusion
from rlhf.tables import EvaluatedModelTable, EvaluateSamplingTable, PromptDataTable, TunedTable, WeightsTable


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


class World:
    """An evaluation in a folder, on one sampler in this process."""

    def __init__(self, folder, family, model, denoiser, data, seed=0):
        (folder / "pictures").mkdir(exist_ok=True)
        self.out, self.seed = folder, seed
        self.model = EvaluatedModelTable(family=family, path=str(model), height=32, width=32, dtype="float32")
        self.tuned = TunedTable(denoiser=str(model / denoiser))
        self.sampling = EvaluateSamplingTable(steps=1, seeds=2, batch_size=3)
        self.prompts = read_evaluation(self.model, self.tuned, PromptDataTable(path=str(folder / data))).prompts
        self.sampler = Sampler(self.model, self.sampling, "cpu")

    def missing(self, side="base"):
        return batches(self.prompts, self.sampling, self.out, side, self.seed, load_family(self.model))

    def paint(self, side="base"):
        weights = self.tuned if side == "tuned" else WeightsTable()
        for batch in self.missing(side):
            assert self.sampler.paint(weights, batch) == {}

    def picture(self, index, variant, side="base"):
        return np.asarray(Image.open(self.out / painted_file(index, variant, side)))


@pytest.fixture
def world(diffusion, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\na pear\na plum\n")
    return World(tmp_path, "stable_diffusion", diffusion, "unet", "prompts.txt")


def test_a_picture_has_its_place_in_a_batch_whatever_else_is_missing(world):
    whole = {request.noise_seed: request.slot for batch in world.missing() for request, _, _ in batch}
    assert len(whole) == 6 and all(len({r.slot for r, _, _ in batch}) == len(batch) for batch in world.missing())
    world.paint()
    first = world.picture(1, 0)
    (world.out / painted_file(1, 0, "base")).unlink()
    (alone,) = world.missing()
    ((request, _, _),) = alone
    assert request.slot == whole[request.noise_seed] == 2
    world.paint()
    assert np.array_equal(world.picture(1, 0), first)
    assert not np.array_equal(world.picture(0, 0), first)
    assert not world.missing(), "what is painted stays"


def test_noise_is_of_seed_prompt_and_variant_and_the_same_for_both_sides(world, diffusion, tmp_path):
    for side in ("base", "tuned"):
        world.paint(side)
    assert np.array_equal(world.picture(0, 0), world.picture(0, 0, "tuned"))  # tuned.denoiser is the base's own here
    assert not np.array_equal(world.picture(0, 0), world.picture(0, 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prompts.txt").write_text("a red apple\n")
    other = World(tmp_path / "other", "stable_diffusion", diffusion, "unet", "prompts.txt", seed=1)
    other.paint()
    assert not np.array_equal(other.picture(0, 0), world.picture(0, 0))
    assert not list(Path(world.out).glob("pictures/.*")), "half-written files stay"


def test_the_source_is_kept_as_the_model_saw_it(kontext, tmp_path):
    Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 32, 3)).save(
        tmp_path / "1.png"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image_id": "1", "prompt": "warm", "image": "1.png"}))
    edit = World(tmp_path, "flux_kontext", kontext, "transformer", "rows.jsonl")
    edit.paint()
    kept, original = (np.asarray(Image.open(file)) for file in (tmp_path / source_file(0), tmp_path / "1.png"))
    assert np.array_equal(kept, original[16:48])  # cropped to the middle
