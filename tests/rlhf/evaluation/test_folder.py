"""Which folder an evaluation may write to, and when it may go on in one."""

import pytest

from rlhf.errors import Refused
from rlhf.evaluation.config import EvaluateConfig
from rlhf.evaluation.folder import check_out, claim
from rlhf.types import Prompt


@pytest.fixture
def world(tmp_path):
    for name in ("base", "sft", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(name.encode())
    return tmp_path


def recipe(world, seed=0, judge="hps"):
    return EvaluateConfig.model_validate(
        {
            "out": str(world / "out"),
            "seed": seed,
            "model": {"family": "stable_diffusion", "path": str(world / "base"), "denoiser": str(world / "sft")},
            "tuned": {"denoiser": str(world / "tuned")},
            "data": {"path": "unread"},
            "reward": {"weights": {judge: 1}},
            "judges": {judge: {"url": "http://127.0.0.1:1"}},
        }
    )


PROMPT = Prompt(image_id="1", instruction="x", image="", height=64, width=64, text_key="x", source_key="")


def test_the_same_evaluation_goes_on_also_with_another_judge(world):
    with claim(recipe(world), [PROMPT], "first") as out:
        (out / "pictures" / "00000_0_base.png").write_bytes(b"painted")
    with claim(recipe(world, judge="clip"), [PROMPT], "second") as out:
        assert (out / "pictures" / "00000_0_base.png").read_bytes() == b"painted"
        assert (out / "config.toml").read_text() == "second"


def test_other_pictures_are_refused_and_what_differs_is_named(world):
    with claim(recipe(world), [PROMPT], ""):
        pass
    (world / "tuned" / "weights.safetensors").write_bytes(b"trained on")
    other = Prompt(**(vars(PROMPT) | {"instruction": "y"}))
    with (
        pytest.raises(Refused, match="begun with other values of seed, the prompts, the tuned weights;"),
        claim(recipe(world, seed=1), [other], ""),
    ):
        pass


@pytest.mark.parametrize(("folder", "named"), [("base", "model.path"), ("sft", "model.denoiser"), ("tuned", "tuned")])
def test_weights_that_were_replaced_where_they_lie_are_others(world, folder, named):
    with claim(recipe(world), [PROMPT], ""):
        pass
    (world / folder / "weights.safetensors").write_bytes(b"trained on")
    with (
        pytest.raises(Refused, match=rf"begun with other values of the .*{named}"),
        claim(recipe(world), [PROMPT], ""),
    ):
        pass


def test_one_writer_at_a_time(world):
    with (
        claim(recipe(world), [PROMPT], ""),
        pytest.raises(Refused, match="in use"),
        claim(recipe(world), [PROMPT], ""),
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
    with claim(recipe(world), [PROMPT], "") as out:
        (out / "results.json").write_text("{}")
    with pytest.raises(Refused, match="never overwritten"), claim(recipe(world), [PROMPT], ""):
        pass
