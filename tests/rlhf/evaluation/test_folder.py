"""Which folder an evaluation may write to, and when it may go on in one."""

from dataclasses import replace

import pytest

from rlhf.errors import Refused
from rlhf.evaluation import folder
from rlhf.evaluation.folder import check_out, painting
from rlhf.tables import EvaluatedModelTable, EvaluateSamplingTable, TunedTable
from rlhf.types import Geometry, Prompt, Source


@pytest.fixture
def world(tmp_path):
    for name in ("base", "sft", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(name.encode())
    return tmp_path


SOURCE = Source(path="/1.png", content="pixels", height=48, width=32)
PROMPT = Prompt(key="1", instruction="x", sources=(SOURCE,), geometry=Geometry(height=64, width=64))


def claim(world, prompt=PROMPT, recipe="", seed=0, steps=16):
    model = EvaluatedModelTable(family="stable_diffusion", path=str(world / "base"), denoiser=str(world / "sft"))
    tuned = TunedTable(denoiser=str(world / "tuned"))
    ours = painting(model, tuned, EvaluateSamplingTable(steps=steps), [prompt], seed)
    return folder.claim(world / "out", ours, recipe)


def test_the_same_evaluation_goes_on_also_with_another_judge(world):
    """Judges are no part of what `painting` reads: the recipe may name others."""
    with claim(world, recipe="first") as out:
        (out / "pictures" / "00000_0_base.png").write_bytes(b"painted")
    with claim(world, recipe="second") as out:
        assert (out / "pictures" / "00000_0_base.png").read_bytes() == b"painted"
        assert (out / "config.toml").read_text() == "second"


def test_other_pictures_are_refused_and_what_differs_is_named(world):
    with claim(world):
        pass
    (world / "tuned" / "weights.safetensors").write_bytes(b"trained on")
    other = replace(PROMPT, instruction="y")
    with (
        pytest.raises(
            Refused, match=r"begun with other values of sampling\.steps, seed, the prompts, the tuned weights;"
        ),
        claim(world, other, seed=1, steps=8),
    ):
        pass


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (replace(PROMPT, geometry=Geometry(height=64, width=96)), False),
        (replace(PROMPT, sources=(replace(SOURCE, content="other pixels"),)), False),
        (replace(PROMPT, sources=(replace(SOURCE, fit="pad"),)), False),
        (replace(PROMPT, sources=(replace(SOURCE, path="/elsewhere.png"),)), True),
        (replace(PROMPT, item={"city": "Utrecht"}), True),
    ],
)
def test_prompts_are_others_by_what_decides_their_pictures(world, other, same):
    with claim(world):
        pass
    if same:
        with claim(world, other):
            return
    with pytest.raises(Refused, match="begun with other values of the prompts;"), claim(world, other):
        pass


@pytest.mark.parametrize(("place", "named"), [("base", "model.path"), ("sft", "model.denoiser"), ("tuned", "tuned")])
def test_weights_that_were_replaced_where_they_lie_are_others(world, place, named):
    with claim(world):
        pass
    (world / place / "weights.safetensors").write_bytes(b"trained on")
    with (
        pytest.raises(Refused, match=rf"begun with other values of the .*{named}"),
        claim(world),
    ):
        pass


def test_one_writer_at_a_time(world):
    with (
        claim(world),
        pytest.raises(Refused, match="in use"),
        claim(world),
    ):
        pass


def test_a_finished_evaluation_and_foreign_folders_are_left_alone(world):
    check_out(world / "absent")
    (world / "empty").mkdir()
    check_out(world / "empty")
    with pytest.raises(Refused, match="is not empty and holds no evaluation"):
        check_out(world / "base")
    with pytest.raises(Refused, match="is a file"):
        check_out(world / "base" / "weights.safetensors")
    with claim(world) as out:
        (out / "results.json").write_text("{}")
    with pytest.raises(Refused, match="never overwritten"), claim(world):
        pass
