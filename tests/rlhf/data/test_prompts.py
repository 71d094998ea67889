"""Bad input: one test per way to be wrong, all problems in one message; and the prompt stream."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlhf.data.prompts import PromptStream, read_items, read_prompts
from rlhf.data.records import BadInput
from rlhf.types import Geometry, Prompt
from tests.rlhf.data import photos


@pytest.fixture
def folder(tmp_path) -> Path:
    return photos.write(tmp_path / "data").parent


def row(image_id="1", prompt="edit 1", image="images/1.png", **more) -> dict:
    return {"image_id": image_id, "prompt": prompt, "image": image, **more}


def read(file: Path, **options):
    """The prompts of a file, each of the size of its first source."""
    return read_prompts(file, "crop", lambda height, width: Geometry(height=height, width=width), **options)


def found(folder: Path, **options) -> list[str]:
    """The message's lines, without the folder's own path."""
    with pytest.raises(BadInput) as caught:
        read(folder / "train_metadata.jsonl", item_metadata=folder / "ctr_metadata.csv", **options)
    head, *lines = str(caught.value).splitlines()
    count = len(caught.value.problems)
    assert head == (f"the input has {count} problems:" if count > 1 else "the input has 1 problem:")
    assert len(lines) in (count, count + 1)
    return [line.strip().replace(f"{folder}/", "") for line in lines[:count]]


def only(folder: Path, **options) -> str:
    [line] = found(folder, **options)
    return line


def test_good_rows(folder):
    (folder / "ctr_metadata.csv").write_text((folder / "ctr_metadata.csv").read_text(), encoding="utf-8-sig")
    result = read(folder / "train_metadata.jsonl", item_metadata=folder / "ctr_metadata.csv")
    assert [r.key for r in result.prompts] == ["0", "1", "2"] and result.left_out == () and result.report() == ""
    first = result.prompts[0]
    assert first.item == {"food_name": "food 0", "food_type": "type", "city_name": "上海", "shop_name": "shop, the"}
    [image] = first.sources
    assert (first.instruction, first.geometry) == ("edit 0", Geometry(height=48, width=40))
    assert image.path == str((folder / "images/0.png").resolve())
    assert len({r.sources[0].content for r in result.prompts}) == 3
    assert read(folder / "train_metadata.jsonl").prompts[0].item == {}


def test_bom_blank_lines_windows_line_ends_and_further_fields_are_fine(folder):
    text = "\r\n".join([json.dumps(row(prompt="", extra=[1])), "", "  "])
    (folder / "train_metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [r.instruction for r in read(folder / "train_metadata.jsonl").prompts] == [""]


def test_another_prompt_column(folder):
    photos.write_rows(folder, [{"image_id": "1", "caption": "hello", "image": "images/1.png"}])
    assert read(folder / "train_metadata.jsonl", prompt_column="caption").prompts[0].instruction == "hello"
    line = only(folder, prompt_column="prompt")
    assert line.startswith("train_metadata.jsonl:1: prompt: is missing; ") and "data.prompt_column" in line
    assert only(folder) == 'train_metadata.jsonl:1: prompt: is missing; add "prompt": "Make it brighter."', (
        "a job without it"
    )


def test_missing_image(folder):
    photos.write_rows(folder, [row(), row("2", image="images/none.png")])
    assert only(folder).startswith(
        "train_metadata.jsonl:2: image: 'images/none.png' does not exist; put the picture at"
    )


def test_a_folder_is_no_image(folder):
    photos.write_rows(folder, [row(image="images")])
    assert "image: 'images' is no file" in only(folder)


def test_unreadable_image(folder):
    good = (folder / "images/1.png").read_bytes()
    (folder / "images/1.png").write_bytes(good[: len(good) // 2])
    line = only(folder)
    assert line.startswith("train_metadata.jsonl:2: image: 'images/1.png' is unreadable: ")
    assert line.endswith("; replace the file")


def test_a_picture_whose_header_is_fine_but_whose_pixels_are_not_is_found(folder):
    data = bytearray((folder / "images/1.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "images/1.png").write_bytes(bytes(data))
    assert "is unreadable" in only(folder)


def test_unsupported_image(folder):
    Image.fromarray(photos.picture(1)).save(folder / "images/1.gif")
    photos.write_rows(folder, [row(image="images/1.gif")])
    line = only(folder)
    assert "'images/1.gif' is of a kind that is not read: " in line and "PNG, JPEG or WEBP" in line


def test_oversized_image(folder):
    Image.new("L", (8000, 5001)).save(folder / "images/1.png")
    assert "'images/1.png' is too large: " in only(folder)


@pytest.mark.parametrize("line", ["{", "not json", '{"image_id": "1",}', "1" * 5000, "[" * 100_000])
def test_not_json(folder, line):
    photos.write_rows(folder, [row("0", image="images/0.png"), line])
    assert re.match(
        r"train_metadata.jsonl:2: is not (JSON: .+; write one JSON object per line|an object)", only(folder)
    )


@pytest.mark.parametrize(("line", "kind"), [("[]", "an array"), ("null", "null"), ("3", "a number"), ("true", "true")])
def test_json_that_is_no_object(folder, line, kind):
    photos.write_rows(folder, [line])
    assert only(folder).startswith(f"train_metadata.jsonl:1: is {kind}, not an object; write ")


def test_not_utf8(folder):
    (folder / "train_metadata.jsonl").write_bytes(json.dumps(row()).encode() + b"\n" + '"é"'.encode("latin-1"))
    assert only(folder).startswith("train_metadata.jsonl:2: is not UTF-8")


@pytest.mark.parametrize("field", ["image_id", "prompt", "image"])
def test_missing_field(folder, field):
    broken = row()
    del broken[field]
    photos.write_rows(folder, [broken])
    assert only(folder).startswith(f'train_metadata.jsonl:1: {field}: is missing; add "{field}": "')


@pytest.mark.parametrize("field", ["image_id", "prompt", "image"])
@pytest.mark.parametrize(
    ("value", "kind"), [(7, "a number"), (None, "null"), ({"a": 1}, "an object"), (False, "false")]
)
def test_wrong_type(folder, field, value, kind):
    value = [value] if field == "image" and kind == "an array" else value  # an image may be a list, but not of lists
    photos.write_rows(folder, [row(**{field: value})])
    assert only(folder).startswith(f"train_metadata.jsonl:1: {field}: is {kind}, not a string; write it in quotes")


@pytest.mark.parametrize("field", ["image_id", "prompt"])
def test_only_sources_may_be_an_array(folder, field):
    photos.write_rows(folder, [row(**{field: ["a"]})])
    assert only(folder).startswith(f"train_metadata.jsonl:1: {field}: is an array, not a string; write it in quotes")


@pytest.mark.parametrize("field", ["image_id", "image"])
def test_empty_field(folder, field):
    photos.write_rows(folder, [row(**{field: ""})])
    assert only(folder).startswith(f"train_metadata.jsonl:1: {field}: is empty; write for example ")


def test_half_a_surrogate_pair(folder):
    photos.write_rows(folder, ['{"image_id": "1", "prompt": "\\ud800", "image": "images/1.png"}'])
    assert only(folder).startswith("train_metadata.jsonl:1: prompt: holds half of a surrogate pair")


def test_two_problems_of_one_row_are_both_told(folder):
    photos.write_rows(folder, [{"image_id": 1, "image": "images/1.png"}])
    assert [line.split(": ")[1] for line in found(folder)] == ["image_id", "prompt"]


def test_duplicate_image_id(folder):
    photos.write_rows(folder, [row(), row("2", image="images/2.png"), row(image="images/0.png")])
    assert only(folder) == (
        "train_metadata.jsonl:3: image_id: '1' is already on line 1; give every row its own image_id"
    )


def test_image_id_without_metadata(folder):
    photos.write_rows(folder, [row(), row("99", image="images/2.png")])
    line = only(folder)
    assert line.startswith("train_metadata.jsonl:2: image_id: '99' has no row in ")
    assert line.endswith("; add its row there or remove this one")


@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "linked folder"])
def test_path_outside_the_data_root(folder, kind):
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.copy(folder / "images/1.png", outside / "x.png")
    (folder / "link.png").symlink_to(outside / "x.png")
    (folder / "linked").symlink_to(outside)
    path = {"dots": "images/../../outside/x.png", "absolute": str(outside / "x.png")}
    image = path.get(kind, {"link": "link.png", "linked folder": "linked/x.png"}.get(kind))
    photos.write_rows(folder, [row(image=image)])
    assert f"image: {image!r} lies outside the data root {folder}".replace(f"{folder}/", "") in only(folder)


def test_links_and_absolute_paths_inside_the_data_root_are_fine(folder):
    (folder / "link.png").symlink_to(folder / "images/1.png")
    photos.write_rows(folder, [row(image="link.png"), row("2", image=str(folder / "images/2.png"))])
    assert len(read(folder / "train_metadata.jsonl").prompts) == 2


def test_the_data_root_may_itself_be_a_link(folder):
    (folder.parent / "alias").symlink_to(folder)
    assert len(read(folder.parent / "alias/train_metadata.jsonl").prompts) == 3


@pytest.mark.parametrize("image", ["\x00", "a" * 5000])
def test_a_path_that_is_no_path(folder, image):
    photos.write_rows(folder, [row(image=image)])
    assert re.search(r"cannot be read|does not exist", only(folder))


def test_a_url_is_not_fetched(folder):
    photos.write_rows(folder, [row(image="https://example.com/1.png")])
    assert "'https://example.com/1.png' is a URL; pictures are never fetched" in only(folder)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_zero_rows(folder, text):
    (folder / "train_metadata.jsonl").write_text(text)
    for on_bad_row in ("stop", "skip"):
        assert only(folder, on_bad_row=on_bad_row) == "train_metadata.jsonl: has no rows; add one JSON object per line"


def test_missing_files(folder):
    (folder / "train_metadata.jsonl").unlink()
    (folder / "ctr_metadata.csv").unlink()
    for on_bad_row in ("stop", "skip"):
        assert found(folder, on_bad_row=on_bad_row) == [
            "train_metadata.jsonl: no such file; set data.path to an existing file",
            "ctr_metadata.csv: no such file; set data.item_metadata to an existing file",
        ]


def test_metadata_without_a_column(folder):
    photos.write_items(folder, [["1", "a", "b"]], header=("image_id", "food_name", "city_name"))
    line = only(folder)
    assert line.startswith("ctr_metadata.csv: has no column food_type, shop_name; the first line must name image_id,")


def test_metadata_rows_of_the_wrong_length_or_twice(folder):
    good = [["0", "a", "b", "c", "d"], ["1", "a", "b", "c", "d"], ["2", "a", "b", "c", "d"]]
    photos.write_items(folder, [*good, ["3", "a"], ["1", "x", "x", "x", "x"], ["", "a", "b", "c", "d"]])
    assert found(folder) == [
        "ctr_metadata.csv:5: has 2 fields, the header 5; add the missing; quote fields that hold commas",
        "ctr_metadata.csv:6: image_id: '1' is already on line 3; give every row its own image_id",
        "ctr_metadata.csv:7: image_id: is empty; give the image_id of a JSONL row",
    ]


def test_metadata_that_is_not_utf8_or_has_open_quotes(folder):
    (folder / "ctr_metadata.csv").write_bytes(",".join(photos.COLUMNS).encode() + b"\n1,caf\xe9,b,c,d\n")
    assert only(folder).startswith("ctr_metadata.csv: line 2 is not UTF-8")
    (folder / "ctr_metadata.csv").write_text(",".join(photos.COLUMNS) + '\n0,"a,b,c,d\n')
    assert any(re.match(r"ctr_metadata.csv: line \d is no CSV: ", line) for line in found(folder))


def test_a_column_without_a_value_is_blank_and_no_word(tmp_path):
    common = {"food_name": "a", "food_type": "b", "city_name": "c", "shop_name": "d"}
    rows = [{"image_id": str(i), **common, "colour": value} for i, value in enumerate([None, math.nan, 3, "x"])]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items, problems = read_items(tmp_path / "items.jsonl")
    assert [item["colour"] for item in items.values()] == ["", "", "3", "x"] and not problems


def test_all_problems_come_in_one_message_in_the_order_of_the_files(folder):
    (folder / "images/0.png").write_bytes(b"no picture")
    rows = [row("0", image="images/0.png"), "{", row(), row("1"), row("7", image="../x.png"), {"image_id": "8"}]
    photos.write_rows(folder, rows)
    photos.write_items(folder, [["0", "a", "b", "c", "d"], ["1", "a", "b", "c", "d"], ["2", "a"]])
    lines = found(folder)
    starts = ["1: image", "2: is not JSON", "4: image_id", "5: image_id", "5: image"]
    starts += ["6: image_id", "6: prompt", "6: image"]
    for line, start in zip(lines, starts, strict=False):
        assert line.startswith(f"train_metadata.jsonl:{start}")
    assert lines[-1].startswith("ctr_metadata.csv:4") and len(lines) == 9


def test_skip_goes_on_with_the_good_rows_and_says_what_was_left_out(folder):
    photos.write_rows(folder, [row("0", image="images/0.png"), "{", row(), row(), row("9", image="images/2.png")])
    result = read(folder / "train_metadata.jsonl", item_metadata=folder / "ctr_metadata.csv", on_bad_row="skip")
    assert [r.key for r in result.prompts] == ["0", "1"]
    assert [problem.line for problem in result.left_out] == [2, 4, 5]
    report = result.report().splitlines()
    assert report[0] == "left out: 3 problems; going on with 2 rows" and len(report) == 4


def test_skip_does_not_go_on_with_nothing(folder):
    photos.write_rows(folder, ["{"])
    assert "is not JSON" in only(folder, on_bad_row="skip")


def test_reading_in_threads_leaves_the_warning_filters_as_they_were(folder):
    before = list(warnings.filters)
    for _ in range(20):
        read(folder / "train_metadata.jsonl")
    assert warnings.filters == before


def prompts(count: int) -> list[Prompt]:
    return [Prompt(key=str(i), instruction="", geometry=Geometry(height=16, width=16)) for i in range(count)]


def test_the_stream_visits_every_prompt_once_an_epoch_in_changing_orders():
    stream = PromptStream(prompts(20), seed=3)
    epochs = [[stream[e * 20 + i].key for i in range(20)] for e in range(4)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(20)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_stream_is_a_pure_function_of_seed_and_cursor():
    cursors = [57, 3, 999, 3, 0, 58]
    want = [PromptStream(prompts(20), seed=3)[cursor].key for cursor in cursors]
    stream = PromptStream(prompts(20), seed=3)
    assert [stream[cursor].key for cursor in reversed(cursors)] == want[::-1]
    assert [PromptStream(prompts(20), seed=4)[cursor].key for cursor in cursors] != want
    # Known answer: the order must survive upgrades of every library, or a resumed run repeats prompts.
    assert [PromptStream(prompts(5), seed=0)[i].key for i in range(10)] == list("3042140231")


def test_the_stream_refuses_what_has_no_answer():
    with pytest.raises(IndexError, match="cursor = -1"):
        PromptStream(prompts(2), seed=0)[-1]
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], seed=0)


def test_the_order_is_not_biased():
    counts = np.zeros((4, 4))
    for seed in range(400):
        for place in range(4):
            counts[place, int(PromptStream(prompts(4), seed)[place].key)] += 1
    assert np.abs(counts - 100).max() < 45
