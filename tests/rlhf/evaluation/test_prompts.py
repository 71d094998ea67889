"""The input of an evaluation: every bad row and every wrong folder in one message, before anything loads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.evaluation import prompts
from rlhf.models.tiny import write_stable_diffusion
from rlhf.tables import EvaluatedModelTable, PromptDataTable, TunedTable
from rlhf.types import Geometry


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def recipe(model, data, tuned=None, family="stable_diffusion", size=(None, None), **settings):
    tuned = tuned or {"denoiser": str(model / ("unet" if family == "stable_diffusion" else "transformer"))}
    table = EvaluatedModelTable(family=family, path=str(model), height=size[0], width=size[1])
    return table, TunedTable(**tuned), PromptDataTable(path=str(data), **settings)


def read_evaluation(tables):
    return prompts.read_evaluation(*tables)


def lines(path, *rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def test_a_text_file_is_a_prompt_a_line(diffusion, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red apple\r\n\n  一个苹果  \na red apple\n".encode())
    found = read_evaluation(recipe(diffusion, file)).prompts
    assert [(p.key, p.instruction) for p in found] == [
        ("line 1", "a red apple"),
        ("line 3", "一个苹果"),
        ("line 4", "a red apple"),
    ]
    assert {(p.geometry, p.sources) for p in found} == {(Geometry(height=128, width=128), ())}  # 16 latents × 8 pixels
    assert len(read_evaluation(recipe(diffusion, file, max_prompts=2)).prompts) == 2
    sized = read_evaluation(recipe(diffusion, file, size=(64, 96))).prompts
    assert {p.geometry for p in sized} == {Geometry(height=64, width=96)}


def test_every_bad_line_at_once(diffusion, tmp_path):
    file = lines(
        tmp_path / "prompts.jsonl",
        {"image_id": "1", "prompt": "an apple"},
        {"image_id": "2", "prompt": " "},
        {"image_id": "3"},
        b"{not json",
        b'["a list"]',
        {"image_id": "1", "prompt": "a pear"},
        {"image_id": 7, "prompt": "a plum"},
        {"prompt": 7},
        b'{"prompt": "\xff"}',
        {"prompt": "named after its line"},
        b'{"prompt": "\\ud800"}',
    )
    tuned = {"denoiser": str(tmp_path / "nowhere")}
    with pytest.raises(BadInput) as caught:
        read_evaluation(recipe(diffusion, file, tuned))
    problems = caught.value.problems
    assert [p.line for p in problems] == [None, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert [p.field for p in problems] == [
        *("tuned.denoiser", "prompt", "prompt", None, None, "image_id", "image_id", "prompt", None, "prompt")
    ]
    assert all(p.what and p.remedy for p in problems)
    assert "is empty" in problems[1].what and "is missing" in problems[2].what and "line 1" in problems[5].what

    found = read_evaluation(recipe(diffusion, file, on_bad_row="skip"))
    assert [p.key for p in found.prompts] == ["1", "line 10"]
    assert [p.line for p in found.left_out] == [2, 3, 4, 5, 6, 7, 8, 9, 11]


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_no_prompts_is_a_problem_also_when_bad_rows_are_skipped(diffusion, tmp_path, content):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match="1 problem"):
        read_evaluation(recipe(diffusion, file, on_bad_row="skip"))


def test_items_go_to_their_prompts_and_a_missing_one_is_said(diffusion, tmp_path):
    items = tmp_path / "items.csv"
    items.write_text("image_id,food_name,food_type,city_name,shop_name\na,Apple,Fruit,Utrecht,Shop\n")
    file = lines(tmp_path / "prompts.jsonl", {"image_id": "a", "prompt": "x"})
    (prompt,) = read_evaluation(recipe(diffusion, file, item_metadata=str(items))).prompts
    assert prompt.item["food_name"] == "Apple"
    lines(file, {"image_id": "a", "prompt": "x"}, {"image_id": "b", "prompt": "y"})
    with pytest.raises(BadInput, match=r"prompts.jsonl:2: image_id: 'b' has no row"):
        read_evaluation(recipe(diffusion, file, item_metadata=str(items)))
    found = read_evaluation(recipe(diffusion, file, item_metadata=str(items), on_bad_row="skip"))
    assert [prompt.key for prompt in found.prompts] == ["a"] and [p.line for p in found.left_out] == [2]
    items.write_text("image_id,food_name,food_type,city_name,shop_name\n")
    with pytest.raises(BadInput, match="'a' has no row"):
        read_evaluation(recipe(diffusion, file, item_metadata=str(items)))
    with pytest.raises(BadInput, match=r"1 problem"):
        read_evaluation(recipe(diffusion, file, item_metadata=str(tmp_path / "none.csv")))


def test_edits_need_pictures(kontext, tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "1.png")
    file = lines(tmp_path / "rows.jsonl", {"image_id": "1", "prompt": "", "image": "1.png"})
    (prompt,) = read_evaluation(recipe(kontext, file, family="flux_kontext", size=(48, 32))).prompts
    assert prompt.geometry == Geometry(height=48, width=32)
    assert [source.path for source in prompt.sources] == [str((tmp_path / "1.png").resolve())]
    (prompt,) = read_evaluation(recipe(kontext, file, family="flux_kontext")).prompts
    assert prompt.geometry == Geometry(height=832, width=1248)  # Kontext's size nearest to 2 : 3
    with pytest.raises(BadInput, match="edits pictures"):
        read_evaluation(recipe(kontext, tmp_path / "rows.txt", family="flux_kontext"))


def test_wrong_weights_are_found_before_anything_loads(diffusion, kontext, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("an apple")
    with pytest.raises(
        BadInput, match="_class_name = 'FluxTransformer2DModel', but this family takes UNet2DConditionModel"
    ):
        read_evaluation(recipe(diffusion, file, {"denoiser": str(kontext / "transformer")}))
    with pytest.raises(BadInput, match=r"tuned\.denoiser: .*holds no config\.json; give e\.g\. RUN/final/unet"):
        read_evaluation(recipe(diffusion, file, {"denoiser": str(diffusion)}))  # like RUN/final for RUN/final/unet
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    for lora, says in (
        (
            tmp_path,
            r"tuned.lora: has 1 of 1 keys that are not read: 1 in the diffusers layout of a transformer .* 'transformer.x",
        ),
        (tmp_path / "none.safetensors", "tuned.lora: does not exist"),
        (file, "cannot be read"),
    ):
        with pytest.raises(BadInput, match=says):
            read_evaluation(recipe(diffusion, file, {"lora": str(lora)}))
    with pytest.raises(Refused, match=r"model_index\.json is missing"):
        read_evaluation(recipe(tmp_path, file))
