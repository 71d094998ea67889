"""What the demo lays out, and what it says of a run, by rows whose answer is known."""

import json
import tomllib

import pytest

from jobs.build_world import MANIFEST
from jobs.demo.__main__ import RECIPE, lay_out, told
from jobs.recipes import OnlineDPORecipe
from jobs.world import learning
from jobs.world.data import PACKAGE
from rlhf.errors import Refused
from rlhf.training_tables import TrainableTable

NULL = 0.02


def rows(tuned: float, kept: float) -> list[dict[str, float]]:
    return [
        {"step": 0, "eval/base_true_rate": 0.2, "eval/base_kept": 0.9},
        {"step": 10, "eval/policy_true_rate": 0.9, "eval/policy_kept": 0.1},
        {"step": 20, "eval/policy_true_rate": tuned, "eval/policy_kept": kept},
    ]


@pytest.mark.parametrize(
    ("tuned", "word"), [(0.2 * (1 + 2 * NULL), "rose"), (0.2 * (1 - 2 * NULL), "fell"), (0.2, "hardly moved")]
)
def test_the_last_evaluation_is_held_against_the_base_and_the_null(tuned, word):
    headline, facts = told(rows(tuned, 0.88), NULL)
    assert f"which nothing is trained on, {word}: 0.200 → {tuned:.3f}" in headline and "kept less" not in headline
    assert "Shuffling the rewards changed it by 2.0% at most" in headline
    assert facts["true_rate_base"] == 0.2 and facts["true_rate_tuned"] == tuned and facts["null_gain"] == NULL
    assert facts["true_rate_gain"] == pytest.approx(tuned / 0.2 - 1)


def test_a_subject_that_is_lost_is_said():
    headline, facts = told(rows(0.3, 0.7), NULL)
    assert "kept less of the subject" in headline and facts["kept_tuned"] == 0.7


def test_where_nothing_passed_the_filter_there_is_nothing_to_compare():
    headline, facts = told([{"step": 0, "eval/base_judged": 1.0}, {"step": 20, "eval/policy_true_rate": 0.3}], NULL)
    assert headline.startswith("No held-out edit passed the filter") and facts == {}


def test_the_null_was_measured_with_the_demos_own_recipe():
    """All but the filter, and more prompts."""
    demo = OnlineDPORecipe.model_validate(tomllib.loads(RECIPE.read_text()))
    null = learning.Recipe(
        trainable=TrainableTable(), steps=json.loads((PACKAGE / MANIFEST).read_text())["null"]["steps"]
    )
    assert (demo.trainer.max_train_steps, demo.trainer.learning_rate, demo.dpo.beta) == (
        null.steps,
        null.learning_rate,
        null.beta,
    )
    assert demo.trainer.pairs_per_step == learning.GROUPS and demo.rollout.num_valid_samples == learning.CANDIDATES
    assert demo.dpo.reference_refresh_every == learning.REFRESH_EVERY and demo.sampling.steps == learning.SAMPLING.steps


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_models_that_are_not_the_packages_are_laid_out_anew_and_a_built_world_stays(tmp_path):
    world = tmp_path / "world"
    lay_out(world)
    first = files(world)
    assert {path.parts[0] for path in first} >= {path.name for path in PACKAGE.iterdir()} | {
        "images",
        "edits",
        "world.json",
    }
    old = world / "ctr" / "config.json"
    assert old.is_file()
    old.write_text("{}")
    (world / "hps" / "hps.safetensors").unlink()
    lay_out(world)
    assert files(world) == first
    (world / "build.json").write_text("{}")
    old.write_text("{}")
    lay_out(world)
    assert old.read_text() == "{}"
    (world / MANIFEST).unlink()
    with pytest.raises(Refused, match=r"is not built to its end: run `python -m jobs.build_world --dir"):
        lay_out(world)
