"""OpenS2V's annotations become rows of clips with pictures of their subjects; every clip that cannot be used is told."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from jobs import check_data, opens2v
from jobs.world.clips import COLOURS, Moving, draw, entry, run_lengths, write_part
from rlhf.data.clips import Asked
from rlhf.data.examples import blocks_of, check_block
from rlhf.data.opens2v import Subject, Unusable, annotated, chosen, entries, mask_of
from rlhf.data.records import BadInput
from rlhf.errors import Refused

FRAMES, HEIGHT, WIDTH = 24, 48, 64
SIZE = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}


@pytest.fixture
def folder(tmp_path):
    write_part(tmp_path / "a", [*draw(6, **SIZE, seed=0)], **SIZE)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`run(*arguments)`: what is said. Of 5 frames, every third."""

    def start(*given, parts=("a",), out="set"):
        part = [word for name in parts for word in ("--part", folder / name / "part.json", folder / name / "videos")]
        words = ["opens2v", *part, "--out", folder / out, "--frames", 5, "--stride", 3, *given]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        opens2v.main()
        return capsys.readouterr().out

    return start


def rows(folder, out="set"):
    return [json.loads(line) for line in (folder / out / "rows.jsonl").read_text().splitlines()]


def change(folder, part="a", **changes):
    """Entries of a part by key: a function that changes one."""
    file = folder / part / "part.json"
    found = json.loads(file.read_text())
    for key, edit in changes.items():
        edit(found[key])
    file.write_text(json.dumps(found))


REAL = (
    "[c0U3[c0000000000000000O10000000000O1000000000000000000000000000000O10000000000O100000000O10000000000000000O100000000000000O100"
    "0000O100000000O100000000O10000O1000000O10000000000O1000000O10000O1000000O100O10000O10000O100O100O1O100O1O1O1O1N2L4G9N2O100002N"
    "3M3M2N2N2N1O2N1O1O2N2N2N2N2N2N1O2N2N2N2N2N2N4L4L3M4L4L6J3M6J7I7I6J4L<D6J?AZSbh0"
)
"""The first mask of the demo of OpenS2V-Nexus, a top whose box is columns 1 to 163, rows 571 to 718 of 720 × 1280."""


def test_masks_are_cocos():
    mask = mask_of(subject(REAL, (720, 1280)))
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    assert 565 <= rows[0] <= 580 and 710 <= rows[-1] <= 719 and columns[0] <= 2 and 155 <= columns[-1] <= 165
    assert run_lengths(mask) == REAL
    for seed in range(20):
        mask = np.random.default_rng(seed).random((37, 53)) < 0.05 * seed
        assert np.array_equal(mask_of(subject(run_lengths(mask), mask.shape)), mask)
    with pytest.raises(Unusable, match="mask 1 does not fill its 720 × 1280 pixels"):
        mask_of(subject(REAL[:-8], (720, 1280)))
    with pytest.raises(Unusable, match="mask 1 is cut off"):
        mask_of(subject("P", (3, 4)))


def subject(counts, size, **more):
    return Subject(**{"number": "1", "name": "x", "score": 5.0, "counts": counts, "size": size} | more)


def test_every_clip_becomes_a_row_with_its_subject_on_white(folder, run, monkeypatch, capsys):
    said = run()
    assert "set: 6 clips; left out: 0" in said and f'root = "{folder}"' in said
    found = rows(folder)
    assert found[0]["target"] == "a/videos/0.mp4" and found[0]["clip"] == {
        "first": 0,
        "frames": 24,
        "box": [0, 64, 0, 48],
    }
    for i, row in enumerate(found):
        (reference,) = row["source"]
        picture = np.asarray(Image.open(folder / reference))
        colour = [*COLOURS.values()][i % 4]
        middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
        assert np.abs(middle.astype(int) - colour).max() < 60
        assert (picture[0, 0] == 255).all() == (i >= 4), "the corners of a disc are white, a square has none"
    (block,) = blocks_of(folder / "set" / "rows.jsonl")
    asked = Asked(frames=5, stride=3)
    index = check_block(block, source_counts=range(1, 4), items=None, needs_loser=False, root=folder, asked=asked)
    assert len(index.table) == 6 and not index.problems
    words = ["check_data", folder / "set" / "rows.jsonl", "--root", folder, "--frames", 5, "--stride", 3]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    check_data.main()
    assert "0 pairs of a winner and a loser, 6 targets" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*map(str, [*words, "--stride", 6])])
    with pytest.raises(BadInput, match=r"rows\.jsonl:1: clip: has 24 frames, but 5 of them, every 6\. one, are 25"):
        check_data.main()
    with pytest.raises(Refused, match=r"--out .*set is there already"):
        run()


def test_a_crop_and_a_cut_are_of_the_whole_video(folder, run):
    """The masks lie in the crop, and frames are numbered in the video."""
    clip = next(draw(1, **SIZE, seed=0))
    (mask,) = clip.masks(11, HEIGHT, WIDTH)[10:]

    def edit(item):
        item["metadata"] |= {"face_cut": [10, 24], "crop": [4, 60, 8, 48]}
        item["annotation"]["ann_frame_data"]["ann_frame_idx"] = 10
        cut = {"size": [40, 56], "counts": run_lengths(mask[8:48, 4:60])}
        item["annotation"]["mask_annotation"] = {"10": {"1": cut}}

    change(folder, clip0=edit)
    run()
    row = rows(folder)[0]
    assert row["clip"] == {"first": 10, "frames": 14, "box": [4, 60, 8, 48]}
    picture = np.asarray(Image.open(folder / row["source"][0])).astype(int)
    colour = np.abs(picture - COLOURS[clip.colour]).max(-1)
    assert np.mean(colour < 60) > 0.8, "the square, and not where it was before"


def with_subjects(scores, names=None, background=()):
    """An edit: subjects on the left half, the right half, and the left half again."""

    def edit(item):
        halves = [np.arange(WIDTH) < WIDTH // 2, np.arange(WIDTH) >= WIDTH // 2, np.arange(WIDTH) < WIDTH // 2 - 2]
        masks = [np.broadcast_to(half, (HEIGHT, WIDTH)) for half in halves][: len(scores)]
        notes = item["annotation"]
        notes["ann_frame_data"]["annotations"] = [{"aes_score": score} for score in scores]
        notes["mask_map"] = {str(i): {"class_name": (names or "abc")[i - 1]} for i in range(1, len(scores) + 1)}
        runs = ({"size": [HEIGHT, WIDTH], "counts": run_lengths(mask)} for mask in masks)
        notes["mask_annotation"] = {"0": {str(i): one for i, one in enumerate(runs, 1)}}
        item["word_tags"]["background"] = list(background)

    return edit


def numbers(folder, out="set"):
    return [file.removesuffix(".png").rpartition("_")[2] for file in rows(folder, out)[0]["source"]]


def test_subjects_are_selected_by_order_score_or_chance_and_none_twice(folder, run):
    change(folder, clip0=with_subjects([3.0, 5.0, 4.0]))
    for selection, most, expected in (("first", 1, ["1"]), ("best_score", 1, ["2"]), ("first", 3, ["1", "2"])):
        run("--selection", selection, "--max_subjects", most, out=f"{selection}{most}")
        assert numbers(folder, f"{selection}{most}") == expected, "the third is the first again"
    clip, taken = annotated("k", json.loads((folder / "a" / "part.json").read_text())["clip0"]), set()
    for seed in range(20):
        ((one, _),) = chosen(clip, "random", 1, 0.0, np.random.default_rng(seed))
        taken.add(one.number)
    assert taken == {"1", "2", "3"}
    run("--selection", "random", out="one")
    run("--selection", "random", out="again")
    assert numbers(folder, "one") == numbers(folder, "again")


def test_words_of_the_background_are_no_subjects_and_scores_have_a_least(folder, run):
    change(folder, clip0=with_subjects([3.0, 5.0], background=["a"]))
    run()
    assert numbers(folder) == ["2"]
    change(folder, clip0=with_subjects([3.0, 3.5]))
    with pytest.raises(
        BadInput, match=r"part\.json: clip0: no subject has a mask and a score of 4 or more; lower --min_score"
    ):
        run("--min_score", 4, out="other")


def test_a_subject_may_stand_on_its_clips_background(folder, run):
    grounds = folder / "grounds"
    grounds.mkdir()
    for i in range(6):
        Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(grounds / f"clip{i}.png")
    run("--backgrounds", grounds)
    disc = np.asarray(Image.open(folder / rows(folder)[4]["source"][0]))
    assert disc[0, 0].tolist() == [1, 2, 3]
    Image.new("RGB", (WIDTH, 8)).save(grounds / "clip1.png")
    (grounds / "clip2.png").unlink()
    with pytest.raises(BadInput) as told:
        run("--backgrounds", grounds, out="other")
    assert "clip1: the frame in its crop is (48, 64), its mask (48, 64), its background (8, 64)" in str(told.value)
    assert "clip2: " in str(told.value) and "No such file" in str(told.value)


def pair(mine, other, number="1", similarity=1.0):
    return {
        "cur_id": mine,
        "aft_id": other,
        "cur_class_id": number,
        "aft_class_id": "1",
        "text_similarity": similarity,
        "image_similarity": 0.9,
    }


def test_a_reference_may_come_from_another_clip(folder, run):
    """Of clip 0 the more similar of two, whichever side of a pair it stands on; who has no pair is told."""
    (folder / "pairs").mkdir()
    known = {
        "clip0": [pair("videos/clip0", "videos/clip1", similarity=0.5), pair("videos/clip2", "videos/clip0")],
        "clip1": [pair("videos/clip0", "videos/clip1")],
        "clip2": [pair("videos/clip2", "videos/clip0"), pair("videos/clip2", "videos/nobody", similarity=2.0)],
        "clip3": [pair("videos/clip3", "videos/clip3")],
        "clip4": [],
    }
    for key, found in known.items():
        (folder / "pairs" / f"{key}.json").write_text(json.dumps(found))
    said = run("--cross_frames", folder / "pairs", "--on_bad_row", "skip")
    found = {row["image_id"]: row["source"] for row in rows(folder)}
    expected = {"videos/clip0": "clip2", "videos/clip1": "clip0", "videos/clip2": "clip0"}
    assert {key: some[0].split("videos_")[1].rsplit("_", 1)[0] for key, some in found.items()} == expected
    assert "3 clips; left out: 3" in said
    left_out = (folder / "set" / "left_out.txt").read_text()
    assert left_out.count("no other clip shows one of its subjects") == 2 and "clip5.json does not exist" in left_out


def test_every_clip_that_cannot_be_used_is_told_with_its_reason(folder, run):
    def lacking(*path):
        def edit(item):
            for name in path[:-1]:
                item = item[name]
            del item[path[-1]]

        return edit

    change(
        folder,
        clip0=lambda item: item["metadata"].update(face_cut=[0, 12]),
        clip1=lambda item: item["metadata"].update(path="gone.mp4"),
        clip2=lacking("annotation", "mask_annotation", "0"),
        clip3=lacking("metadata", "crop"),
        clip4=lambda item: item["metadata"].update(face_cap_qwen=" "),
    )
    (folder / "a" / "videos" / "5.mp4").write_bytes(b"broken")
    with pytest.raises(BadInput) as told:
        run()
    lines = str(told.value).splitlines()[1:]
    says = (
        "clip0: has 12 frames, but 13 are needed; lower --frames or --stride, or leave it out",
        "gone.mp4 does not exist; put the video there",
        "clip2: annotation.mask_annotation has no masks of frame 0",
        "clip3: the entry lacks 'crop'",
        "clip4: metadata.face_cap_qwen is no caption",
        "videos/5.mp4 cannot be decoded",
    )
    assert len(lines) == 6 and all(what in line for what, line in zip(says, lines, strict=True))
    assert not (folder / "set").exists() and not (folder / ".set.partial").exists()


def annotation(**changes):
    def edit(item):
        item["annotation"] |= changes

    return edit


def test_entries_of_other_kinds_are_told_too(folder, run):
    change(
        folder,
        clip0=annotation(mask_annotation=None),
        clip1=annotation(ann_frame_data={"ann_frame_idx": 0, "annotations": None}),
        clip2=annotation(ann_frame_data={"ann_frame_idx": 0, "annotations": [{"aes_score": None}]}),
        clip3=annotation(ann_frame_data={"ann_frame_idx": 0, "annotations": [{}]}),
        clip4=lambda item: item.update(word_tags=["ground"]),
        clip5=lambda item: item["metadata"].update(path="../part.json"),
    )
    with pytest.raises(BadInput) as told:
        run()
    says = (
        "has no masks of frame 0",
        "annotations is no list",
        "aes_score = None of mask 1 is no number",
        "lacks 'aes_score'",
        "lacks 'background'",
        "metadata.path = '../part.json' does not lie below",
    )
    assert all(what in line for what, line in zip(says, str(told.value).splitlines()[1:], strict=True))


def test_a_key_that_stands_twice_is_told(folder, run):
    file = folder / "a" / "part.json"
    file.write_text(file.read_text().replace('"clip1"', '"clip0"'))
    with pytest.raises(BadInput, match=r"part\.json: clip0: stands twice in its part; keep one of the two"):
        run()


def test_a_word_of_a_longer_tag_is_background(folder, run):
    change(folder, clip0=with_subjects([3.0, 5.0], names=["park", "parking"], background=["park or garden setting"]))
    run()
    assert numbers(folder) == ["2"]


def test_what_cannot_be_asked_for_is_refused(folder, run):
    for words, says in (
        (("--max_subjects", 0), "--max_subjects = 0: give 1 or more"),
        (("--max_subjects", 4), "--max_subjects 4: wan_subject takes at most 3"),
    ):
        with pytest.raises(Refused, match=says):
            run(*words)
    write_part(folder / "b", [*draw(2, **SIZE, seed=1)], **SIZE)
    with pytest.raises(Refused, match=r"two have one name, by which clips are told apart"):
        run(parts=("a", "b"))


def test_a_file_that_is_no_part_is_refused(folder, run):
    (folder / "a" / "part.json").write_text('{"clip0": {"metadata": ')
    with pytest.raises(BadInput, match=r"part\.json: is no JSON object of clips"):
        run()
    (folder / "a" / "part.json").unlink()
    with pytest.raises(BadInput, match=r"part\.json: no such file"):
        run()


def test_parts_are_put_together_and_captions_stay_in_their_language(folder, run):
    write_part(folder / "b", [*draw(2, **SIZE, seed=1)], **SIZE)
    (folder / "b" / "videos").rename(folder / "b" / "more")
    change(folder, "b", clip0=lambda item: item["metadata"].update(face_cap_qwen="一个东西在移动。"))
    words = ("--part", folder / "b" / "part.json", folder / "b" / "more")
    run(*words)
    found = rows(folder)
    assert len(found) == 8 and found[6]["prompt"] == "一个东西在移动。" and found[6]["target"] == "b/more/0.mp4"


def test_a_large_part_is_read_an_entry_at_a_time(tmp_path):
    """100 MB of entries, of which Python never holds more than a few MB."""
    clip = Moving(colour="red", shape="disc", radius=9, start=(20, 20), speed=(0, 0), ground=100)
    one = json.dumps(entry(clip, "0.mp4", **SIZE) | {"more": "x" * 100_000})
    with (tmp_path / "part.json").open("w") as file:
        file.write("{" + ",".join(f'"clip{i}": {one}' for i in range(1000)) + "}")
    tracemalloc.start()
    assert sum(1 for _ in entries(tmp_path / "part.json")) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 < (tmp_path / "part.json").stat().st_size
