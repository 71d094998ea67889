"""Videos: which frames are read and shown, what is told of files and rows that are no good, and that keys tell clips apart."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from rlhf.data.cache import EncodingCache
from rlhf.data.clips import Asked, ClipError, clip_of, read_clip, write_mp4
from rlhf.data.examples import blocks_of, check_block, read_index, write_index
from rlhf.data.sizes import Sizes
from rlhf.data.sources import open_source
from rlhf.errors import Refused
from rlhf.types import Clip, Encoding, Geometry
from tests.rlhf.data.pair_tables import png, row, write_parquet

GREYS = np.arange(20) * 12
"""Of the frames: a frame is known by its grey."""


def clip(count: int = 20, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 (F, H, W, 3): grey frames, whose left half is 20 brighter."""
    frames = np.broadcast_to(GREYS[:count, None, None, None], (count, height, width, 3)).astype(np.uint8).copy()
    frames[:, :, : width // 2] += 20
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames they are, by their right edge. H.264 changes a grey by little."""
    return [round(float(frame[:, -1].mean()) / 12) for frame in frames]


@pytest.fixture
def file(tmp_path):
    write_mp4(tmp_path / "a.mp4", clip())
    return tmp_path / "a.mp4"


def test_what_is_written_is_read_back(file):
    found = read_clip(file, Clip(), 20)
    assert found.shape == (20, 32, 48, 3) and np.abs(found.astype(int) - clip()).max() <= 12
    with av.open(str(file)) as container:
        assert container.streams.video[0].codec_context.name == "h264" and container.streams.video[0].average_rate == 16


def test_frames_are_taken_from_the_first_on_by_stride_and_in_a_box(file):
    found = read_clip(file, Clip(first=3, stride=4, box=(24, 40, 8, 32)), 4)
    assert found.shape == (4, 24, 16, 3) and numbers(found) == [3, 7, 11, 15]
    with pytest.raises(ClipError, match=r"has 20 frames, but number 21 \(from 0\) is asked for"):
        read_clip(file, Clip(first=1, stride=5), 5)
    for box in ((0, 49, 0, 32), (10, 10, 0, 32)):
        with pytest.raises(ClipError, match=r"is 32 × 48 pixels, which does not hold the box"):
            read_clip(file, Clip(box=box), 1)


def test_a_file_that_is_no_video_is_told(tmp_path, file):
    (tmp_path / "b.mp4").write_bytes(file.read_bytes()[:200])
    (tmp_path / "c.mp4").write_bytes(png(0))
    for name in ("b", "c"):
        with pytest.raises(ClipError, match=r"cannot be decoded: |has 1 frames"):
            read_clip(tmp_path / f"{name}.mp4", Clip(), 5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"start": 3}, r"has 'start'; write \{\"first\""),
        ([3, 4], r"is \[3, 4\]; write"),
        ({"first": -1}, "give whole numbers from 0 on"),
        ({"box": [0, 1, 2]}, "four of them for a box"),
        ({"box": 5}, "four of them for a box"),
        (
            {"frames": 12},
            r"has 12 frames, but 5 of them, every 3\. one, are 13; leave the row out, or lower model\.frames",
        ),
    ],
)
def test_a_clip_that_is_none_is_told(given, says):
    with pytest.raises(ClipError, match=says):
        clip_of(given, Asked(frames=5, stride=3))


def test_a_clip_of_enough_frames_is_taken():
    assert (
        clip_of({"frames": 13}, Asked(frames=5, stride=3)) == Clip(stride=3) == clip_of(None, Asked(frames=5, stride=3))
    )
    assert clip_of({"first": 2, "box": [0, 8, 4, 6]}, Asked(frames=5)) == Clip(first=2, box=(0, 8, 4, 6))


# --- as examples ---------------------------------------------------------------------------------------------------------

ASKED, SIZED = Asked(frames=5, stride=3), Sizes(sizes=(Geometry(height=32, width=32, frames=5),))


def checked(folder, *rows, asked=ASKED, needs_loser=False):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    needs = {"source_counts": range(1, 4), "items": None, "needs_loser": needs_loser, "asked": asked}
    (found,) = [check_block(block, **needs) for block in blocks_of(folder / "rows.jsonl")]
    return found


@pytest.fixture
def folder(tmp_path, file):
    write_mp4(tmp_path / "b.mp4", clip()[::-1])
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def example_of(folder, row):
    index = checked(folder, row)
    assert not index.problems, index.problems
    write_index(folder / "index.arrow", [index])
    (example,) = read_index(folder / "index.arrow").examples(range(1), SIZED)
    return example


def test_a_row_of_a_video_becomes_an_example_whose_frames_are_shown(folder):
    row = {
        "prompt": "warm",
        "target": "a.mp4",
        "source": ["0.png", "1.png"],
        "clip": {"first": 2, "box": [8, 48, 0, 32]},
    }
    example = example_of(folder, row)
    target = example.targets["target"]
    assert (target.height, target.width, target.clip) == (32, 40, Clip(first=2, stride=3, box=(8, 48, 0, 32)))
    assert example.prompt.geometry.frames == 5 and [source.clip for source in example.prompt.sources] == [None, None]
    shown = open_source(target, example.prompt.geometry)
    assert shown.shape == (5, 32, 32, 3) and numbers(shown) == [2, 5, 8, 11, 14]
    mirrored = open_source(replace(target, mirrored=True), example.prompt.geometry)
    assert np.array_equal(mirrored, shown[:, :, ::-1])
    write_mp4(folder / "a.mp4", clip()[::-1])
    with pytest.raises(Refused, match=r"a\.mp4 changed since it was checked"):
        open_source(target, example.prompt.geometry)


def test_pairs_of_videos_are_pairs(folder):
    index = checked(
        folder, {"prompt": "warm", "winner": "b.mp4", "loser": "a.mp4", "source": "0.png"}, needs_loser=True
    )
    (row,) = index.table.to_pylist()
    assert not index.problems and row["picture_0"]["path"].endswith("b.mp4") and row["picture_1"]["clip"]["stride"] == 3


def test_every_clip_that_cannot_be_used_is_told_with_its_line(folder):
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    good = {"prompt": "warm", "source": "0.png", "target": "a.mp4"}
    rows = (
        good,
        good | {"target": "none.mp4"},
        good | {"target": "broken.mp4"},
        good | {"clip": {"first": 8}},
        good | {"clip": {"frames": 4}},
        good | {"target": "0.png"},
        good | {"target": "../a.mp4"},
        good | {"target": "a.mp4", "clip": {"box": [0, 99, 0, 32]}},
    )
    found = checked(folder, *rows)
    assert len(found.table) == 1
    says = (
        "'none.mp4' does not exist",
        "'broken.mp4' cannot be decoded",
        "'a.mp4' has 20 frames, but number 20 (from 0) is asked for",
        "clip: has 4 frames, but 5 of them, every 3. one, are 13",
        "'0.png' is a .png file; give a video (.mp4, ",
        "'../a.mp4' lies outside the data root",
        "does not hold the box [0, 99, 0, 32]",
    )
    for line, (problem, what) in enumerate(zip(found.problems, says, strict=True), start=2):
        assert problem.line == line and what in str(problem)


def test_pictures_and_tables_are_no_videos(folder):
    Image.new("RGB", (8, 8)).save(folder / "c.png")
    found = checked(folder, {"prompt": "x", "target": "c.png", "source": "0.png"}, asked=Asked(frames=1))
    assert not found.problems
    found = checked(folder, {"prompt": "x", "target": "a.mp4", "source": "0.png"}, asked=Asked(frames=1))
    assert "'a.mp4' is of a kind that is not read" in str(found.problems[0]) or "is unreadable" in str(
        found.problems[0]
    )


def test_tables_of_pictures_and_urls_are_no_videos(folder):
    write_parquet(folder / "pairs.parquet", [row(0)])
    needs = {"source_counts": range(1, 4), "items": None, "asked": ASKED}
    (found,) = [check_block(block, **needs) for block in blocks_of(folder / "pairs.parquet")]
    assert "pairs.parquet: is no list of videos, but model.frames = 5; give a JSONL" in str(found.problems[0])
    found = checked(folder, {"prompt": "x", "target": "https://x/y.mp4", "source": "0.png"})
    assert "'https://x/y.mp4' is a URL; videos are never fetched" in str(found.problems[0])


def test_other_frames_of_a_file_are_another_example(folder):
    """For a run that goes on, and for what is held out."""
    first = {"prompt": "warm", "target": "a.mp4", "source": "0.png"}
    whole, later = checked(folder, first), checked(folder, first | {"clip": {"first": 1}})
    assert (
        whole.digest() != later.digest() and whole.digest() == checked(folder, first | {"clip": {"first": 0}}).digest()
    )
    both = checked(folder, first, first | {"clip": {"first": 1}}, first)
    assert "1 examples repeat an earlier one" in both.report()


def test_a_key_tells_clips_of_one_file_apart(folder):
    cache = EncodingCache(folder, {"video": "v"})
    target = example_of(folder, {"prompt": "warm", "target": "a.mp4", "source": "0.png"}).targets["target"]
    others = [target, *(replace(target, clip=some) for some in (Clip(), Clip(first=1), Clip(box=(0, 8, 0, 8)), None))]
    keys = {cache.key(Encoding(kind="video", sources=(one,), geometries=(SIZED.sizes[0],))) for one in others}
    assert len(keys) == 5
