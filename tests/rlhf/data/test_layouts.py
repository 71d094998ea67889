"""Folders of pictures as people bring them: what belongs together is found, and everything else is told with its remedy."""

import shutil

import numpy as np
import pytest

from rlhf.data import layouts
from rlhf.data.examples import read_index
from rlhf.data.records import BadInput, Problem
from rlhf.data.sizes import Sizes
from rlhf.types import Geometry
from tests.rlhf.data.pair_tables import encoded, index_of, png

SIZE = Geometry(height=16, width=16)
SIZED = Sizes(sizes=(SIZE,))


def write(folder, *names):
    """Pictures, and captions that say their name."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"caption of {file.stem}\n".encode() if file.suffix == ".txt" else png(number))
    return folder


def read(folder):
    """(records by stem without the stem, problems as text from below the folder)."""
    found = list(layouts.rows(folder, 1, layouts.count(folder)))
    records = [dict(row.fields) for row in found if not isinstance(row, Problem)]
    problems = [str(row).replace(f"{folder}/", "") for row in found if isinstance(row, Problem)]
    return {fields.pop("image_id"): fields for fields in records}, problems


PAIR = ("training_images/a.png", "training_images/a.txt", "control_images/a.jpg")
A = {"prompt": "caption of a", "target": PAIR[0], "source": [PAIR[2]]}


def test_target_caption_and_control_picture_share_a_stem(tmp_path):
    write(tmp_path, *PAIR, "training_images/b.webp", "training_images/b.txt", "control_images/b.PNG")
    b = {"prompt": "caption of b", "target": "training_images/b.webp", "source": ["control_images/b.PNG"]}
    assert read(tmp_path) == ({"a": A, "b": b}, [])


@pytest.mark.parametrize("targets", layouts.TARGETS)
@pytest.mark.parametrize("controls", layouts.CONTROLS)
def test_the_folders_go_by_the_names_of_other_trainers(tmp_path, targets, controls):
    write(tmp_path, f"{targets}/a.png", f"{targets}/a.txt", f"{controls}/a.jpg")
    assert layouts.is_layout(tmp_path)
    expected = {"prompt": "caption of a", "target": f"{targets}/a.png", "source": [f"{controls}/a.jpg"]}
    assert read(tmp_path) == ({"a": expected}, [])


def test_several_control_pictures_come_by_number_with_or_without_an_unnumbered_one(tmp_path):
    numbered = [f"control_images/a_control_{number}.png" for number in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)]
    write(tmp_path, *PAIR, *numbered, "training_images/b.png", "training_images/b.txt")
    write(tmp_path, "control_images/b_control_1.png", "control_images/b_control_2.png")
    records, problems = read(tmp_path)
    assert problems == []
    assert records["a"]["source"] == [PAIR[2], *(f"control_images/a_control_{number}.png" for number in range(1, 11))]
    assert records["b"]["source"] == ["control_images/b_control_1.png", "control_images/b_control_2.png"]


def test_a_mask_and_a_caption_may_lie_in_either_folder(tmp_path):
    write(tmp_path, "target/a.png", "control/a.png", "control/a.txt", "control/a_mask.png")
    write(tmp_path, "target/b.png", "control/b.png", "target/b.txt", "target/b_mask.png")
    records, problems = read(tmp_path)
    assert problems == [] and [records[stem]["mask"] for stem in "ab"] == ["control/a_mask.png", "target/b_mask.png"]
    assert [records[stem]["prompt"] for stem in "ab"] == ["caption of a", "caption of b"]


def test_pictures_with_captions_alone_are_targets_without_control_pictures(tmp_path):
    write(tmp_path, "a.png", "a.txt", "b.jpeg", "b.txt", ".DS_Store", "Thumbs.db")
    records, problems = read(tmp_path)
    assert problems == [] and records["b"] == {"prompt": "caption of b", "target": "b.jpeg"} and len(records) == 2


def test_a_file_beside_an_example_is_told_and_the_example_stays(tmp_path):
    write(tmp_path, *PAIR, "training_images/a.json")
    records, problems = read(tmp_path)
    assert records == {"a": A}
    assert problems == [
        "training_images/a.json: is none of .png, .jpg, .jpeg, .webp, .txt; save it as one of them, or move it away"
    ]


def test_one_letter_in_two_encodings_is_one_stem(tmp_path):
    for name in ("target/caf\u00e9.png", "target/cafe\u0301.txt", "control/cafe\u0301.png"):
        write(tmp_path, name)
    records, problems = read(tmp_path)
    assert (
        problems == []
        and list(records) == ["caf\u00e9"]
        and records["caf\u00e9"]["source"] == ["control/cafe\u0301.png"]
    )


def test_folders_go_by_their_names_in_any_case_and_numbers_may_begin_at_0(tmp_path):
    write(tmp_path, "Images/a.png", "Images/a.txt", "Control_Images/a_control_0.png", "Control_Images/a_control_1.png")
    records, problems = read(tmp_path)
    assert problems == [] and records["a"]["source"] == [f"Control_Images/a_control_{number}.png" for number in (0, 1)]


def test_a_link_to_nothing_is_told(tmp_path):
    write(tmp_path, *PAIR)
    (tmp_path / "training_images/b.png").symlink_to(tmp_path / "nothing.png")
    assert read(tmp_path) == ({"a": A}, ["training_images/b.png: is a link to nothing; mend or remove it"])


def test_a_name_that_ends_like_a_mask_or_a_number_is_a_target_where_it_has_one(tmp_path):
    write(tmp_path, "images/x_mask.png", "images/x_mask.txt", "control/x_mask.png")
    write(tmp_path, "images/y_control_1.png", "images/y_control_1.txt", "control/y_control_1.png")
    records, problems = read(tmp_path)
    assert problems == [] and set(records) == {"x_mask", "y_control_1"}
    assert records["y_control_1"]["source"] == ["control/y_control_1.png"]


WRONG = {
    "no caption": (
        {"training_images/b.png": png(9), "control_images/b.png": png(9)},
        (),
        "training_images/b.png: prompt: is missing; write it into a file of the same name that ends with .txt",
    ),
    "an empty caption": (
        {"training_images/a.txt": b" \n"},
        (),
        "training_images/a.png: prompt: is empty; write it into",
    ),
    "a caption in another encoding": (
        {"training_images/a.txt": "汤".encode("gbk")},
        (),
        "training_images/a.txt: is not UTF-8 (invalid continuation byte); save the file as UTF-8",
    ),
    "no control picture": (
        (),
        [PAIR[2]],
        "training_images/a.png: has no control picture: {}/control_images holds no picture a; add it there, or move",
    ),
    "no target": (
        (),
        [PAIR[0]],
        "control_images/a.jpg: is a control picture without a target: {}/training_images holds no picture a; add a.png",
    ),
    "a caption of nothing": (
        {"training_images/z.txt": b"z"},
        (),
        "training_images/z.txt: is a caption without a target: {}/training_images holds no picture z; add z.png there",
    ),
    "a mask of nothing": (
        {"control_images/z_mask.png": png(9)},
        (),
        "control_images/z_mask.png: is a mask without a target",
    ),
    "two control pictures of one place": (
        {"control_images/a.png": png(9)},
        (),
        "control_images/a.jpg: has the same place as control_images/a.png; keep one of them",
    ),
    "a gap in the numbers": (
        {"control_images/a_control_2.png": png(9)},
        (),
        "training_images/a.png: has control pictures up to number 2, but none with number 1; add a_control_1, or number",
    ),
    "a kind of picture that is not read": (
        {"training_images/b.heic": b"x"},
        (),
        "training_images/b.heic: is none of .png, .jpg, .jpeg, .webp, .txt; save it as one of them, or move it away",
    ),
    "a folder among pictures": (
        {"training_images/more/c.png": png(9)},
        (),
        "training_images/more: is a folder that is not read; move its files to where the others are, or move it away",
    ),
    "a picture beside the folders": (
        {"stray.png": png(9)},
        (),
        "stray.png: lies beside the folders of pictures, where nothing is read; move it into one, or away",
    ),
    "a folder of masks": ({"masks/a.png": png(9)}, (), "masks: is a folder that is not read; move its files to where"),
    "a transparent mask": (
        {"training_images/a_mask.png": encoded(np.full((24, 32, 4), 127, np.uint8))},
        (),
        "training_images/a.png: mask: is transparent somewhere; save it as grey without transparency",
    ),
    "a mask of zeros and ones": (
        {"training_images/a_mask.png": encoded(np.eye(24, 32, dtype=np.uint8))},
        (),
        "training_images/a.png: mask: is nowhere brighter than 1 of 255; make it white",
    ),
    "a mask of one grey": (
        {"training_images/a_mask.png": encoded(np.full((24, 32), 255, np.uint8))},
        (),
        "training_images/a.png: mask: is 255 of 255 everywhere, which masks nothing; make it white where",
    ),
    "an unreadable picture": (
        {"control_images/a.jpg": b"no picture"},
        (),
        "training_images/a.png: source: 'control_images/a.jpg' is unreadable: ",
    ),
    "a mask of another size": (
        {"training_images/a_mask.png": png(9, 16, 16)},
        (),
        "training_images/a.png: mask: is 16 × 16 pixels, but the picture 24 × 32; give a mask of the picture's size",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_everything_that_does_not_fit_is_told_with_its_remedy(tmp_path, fault):
    added, removed, message = WRONG[fault]
    write(tmp_path, *PAIR)
    for name, content in dict(added).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name in removed:
        (tmp_path / name).unlink()
    index = read_index(index_of(tmp_path, source_counts=range(1, 4), needs_loser=False))
    problem = str(index.problems[0]).replace(f"{tmp_path}/", "", 1)
    assert problem.startswith(message.format(tmp_path))
    assert len(index.problems) == (2 if fault == "no target" else 1), "its caption has none either"
    assert all(problem.line == 0 for problem in index.problems), "None would say that the whole folder cannot be used"
    assert len(index.table) == (
        1 if "a.png:" not in problem and "a.jpg:" not in problem and "a.txt" not in problem else 0
    )


def test_pictures_of_which_none_has_a_caption_are_told_once(tmp_path):
    write(tmp_path, "images/a.png", "images/b.png")
    with pytest.raises(
        BadInput, match=r"holds pictures, but no caption: a\.txt is the first that is missing; write one"
    ):
        layouts.count(tmp_path)


def test_which_folder_is_meant_is_not_guessed(tmp_path):
    write(tmp_path, "images/a.png", "targets/a.png")
    with pytest.raises(
        BadInput, match=r"holds images and targets, of which one is meant; rename or move away the others"
    ):
        layouts.count(tmp_path)
    shutil.rmtree(tmp_path / "targets")
    shutil.move(tmp_path / "images", tmp_path / "control")
    with pytest.raises(
        BadInput, match=r"has control, but none of the folders training_images, images.*; put the targets"
    ):
        layouts.count(tmp_path)


def test_control_pictures_that_the_model_does_not_take_are_told(tmp_path):
    index = read_index(index_of(write(tmp_path, *PAIR), source_counts=range(1), needs_loser=False))
    (problem,) = index.problems
    assert "source: names 1 pictures, but the model takes 0" in str(problem)


def test_an_example_comes_back_from_the_index_with_its_stem_as_key(tmp_path):
    write(tmp_path, *PAIR, "control_images/a_control_1.png", "training_images/a_mask.png")
    index = read_index(index_of(tmp_path, source_counts=range(1, 4), needs_loser=False))
    assert not index.problems
    (example,) = index.examples(range(1), SIZED)
    assert example.prompt.key == "a" and example.prompt.instruction == "caption of a"
    assert [source.path for source in example.prompt.sources] == [
        str(tmp_path / name) for name in (PAIR[2], "control_images/a_control_1.png")
    ]
    assert example.targets["target"].path == str(tmp_path / PAIR[0]) and set(example.targets) == {"target"}
    assert example.mask.path == str(tmp_path / "training_images/a_mask.png")
    media = (example.targets["target"], *example.prompt.sources, example.mask)
    assert {(medium.height, medium.width) for medium in media} == {(24, 32)}
    before = index.digest()
    (tmp_path / "training_images/a_mask.png").write_bytes(png(77))
    assert read_index(index_of(tmp_path, source_counts=range(1, 4), needs_loser=False)).digest() != before


def test_blocks_hold_64_stems(tmp_path):
    write(tmp_path, *(f"{number:03d}.{end}" for number in range(130) for end in ("png", "txt")))
    index = read_index(index_of(tmp_path, needs_loser=False))
    assert index.sizes == (64, 64, 2)
    keys = [example.prompt.key for example in index.examples(range(130), SIZED)]
    assert keys == [f"{number:03d}" for number in range(130)]
