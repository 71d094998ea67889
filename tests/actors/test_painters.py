"""Painters as plain objects: which noise, which neighbours, which weights; nothing of it needs a cluster."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors.painters import Order, Painter, picture_file, source_file
from rlhf.evaluation.config import EvaluateConfig
from rlhf.evaluation.prompts import read_evaluation
from rlhf.models.tiny import write_stable_diffusion


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def text_recipe(diffusion, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\na pear\na plum\n")
    return recipe(tmp_path, "stable_diffusion", diffusion, "unet", "prompts.txt")


def recipe(folder, family, model, denoiser, data):
    (folder / "out" / "pictures").mkdir(parents=True)
    return EvaluateConfig.model_validate(
        {
            "out": str(folder / "out"),
            "model": {"family": family, "path": str(model), "height": 32, "width": 32, "mixed_precision": "no"},
            "tuned": {"denoiser": str(model / denoiser)},
            "data": {"path": str(folder / data)},
            "sampling": {"steps": 1, "seeds": 2, "batch_size": 3},
            "reward": {"weights": {"hps": 1}},
            "judges": {"hps": {"url": "http://127.0.0.1:1/hpsv2"}},
            "painters": {"num_gpus": 0},
        }
    )


def painted(config, orders, side="base"):
    assert Painter(config, "cpu").paint(side, orders) == len(orders)
    return {o.index: (Image.open(f"{config.out}/{picture_file(o.index, o.variant, side)}")) for o in orders}


def orders_of(config, *places):
    prompts = read_evaluation(config).prompts
    return [Order(index=index, prompt=prompts[index], variant=variant) for index, variant in places]


def test_a_picture_does_not_depend_on_its_neighbours(text_recipe):
    full = painted(text_recipe, orders_of(text_recipe, (0, 0), (1, 0), (2, 0)))
    first = {index: np.asarray(image) for index, image in full.items()}
    alone = painted(text_recipe, orders_of(text_recipe, (1, 0)))
    assert np.array_equal(first[1], np.asarray(alone[1]))
    assert not np.array_equal(first[0], first[1])


def test_noise_is_of_seed_prompt_and_variant_and_the_same_for_both_sides(text_recipe):
    def picture(config, variant, side):
        return np.asarray(painted(config, orders_of(config, (0, variant)), side)[0])

    base = picture(text_recipe, 0, "base")
    assert np.array_equal(base, picture(text_recipe, 0, "tuned"))  # tuned.denoiser is the base's own here
    assert not np.array_equal(base, picture(text_recipe, 1, "base"))
    assert not np.array_equal(base, picture(text_recipe.model_copy(update={"seed": 1}), 0, "base"))
    assert not list(Path(text_recipe.out).glob("pictures/.*")), "half-written files stay"


def test_the_source_is_kept_as_the_model_saw_it(kontext, tmp_path):
    Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 32, 3)).save(
        tmp_path / "1.png"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image_id": "1", "prompt": "warm", "image": "1.png"}))
    config = recipe(tmp_path, "flux_kontext", kontext, "transformer", "rows.jsonl")
    painted(config, orders_of(config, (0, 0)))
    kept, original = (np.asarray(Image.open(file)) for file in (f"{config.out}/{source_file(0)}", tmp_path / "1.png"))
    assert np.array_equal(kept, original[16:48])  # cropped to the middle
