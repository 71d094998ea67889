"""A prompt of several sources: lists of paths in rows, in the order that they are written in."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from rlhf.data.batches import check_buckets
from rlhf.data.examples import read_index
from rlhf.data.prompts import read_prompts
from rlhf.data.records import BadInput
from rlhf.data.sizes import Sizes
from rlhf.data.sources import open_source, seen_source
from rlhf.errors import Refused
from rlhf.types import Geometry, Prompt, Source
from tests.rlhf.data.pair_tables import index_of, png


def sized(height: int, width: int) -> Geometry:
    return Geometry(height=height, width=width)


SIZE = Geometry(height=16, width=16)
SIZED = Sizes(sizes=(SIZE,))


@pytest.fixture
def folder(tmp_path):
    """Pictures 0.png … 5.png; the odd ones are upright."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i, 24 + 16 * (i % 2), 32))
    return tmp_path


def pairs(folder, *sources):
    """The index and problems of a pair for each value of `source`."""
    lines = [{"prompt": "x", "winner": "0.png", "loser": "1.png", "source": source} for source in sources]
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    index = read_index(index_of(file, source_counts=range(1, 3)))
    return index, index.problems


def contents(folder, *numbers):
    return [xxhash.xxh3_128_hexdigest((folder / f"{number}.png").read_bytes()) for number in numbers]


def test_a_pair_has_its_sources_in_their_order_through_the_index(folder):
    index, problems = pairs(folder, ["3.png", "2.png"], "4.png", ["5.png"])
    assert not problems
    prompts = [example.prompt for example in index.examples(range(3), SIZED)]
    assert [[s.content for s in p.sources] for p in prompts] == [
        contents(folder, *some) for some in ((3, 2), (4,), (5,))
    ]
    assert prompts[0].sources[1].path == str(folder / "2.png")
    assert index.digest() != pairs(folder, ["2.png", "3.png"], "4.png", ["5.png"])[0].digest()


def test_every_path_of_a_list_is_checked(folder):
    index, problems = pairs(folder, ["3.png", "none.png", "../2.png"], [], ["2.png", 3], ["2.png"])
    assert [(problem.line, problem.field) for problem in problems] == [
        (1, "source"),
        (1, "source"),
        (2, "source"),
        (3, "source"),
    ]
    said = list(map(str, problems))
    assert "'none.png' does not exist" in said[0] and "lies outside the data root" in said[1]
    assert "is empty" in said[2] and "not a string" in said[3]
    assert len(index.table) == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_prompt_has_one_image_or_several_and_the_size_of_the_first(folder, ending):
    rows = [
        {"image_id": "a", "prompt": "x", "image": ["3.png", "2.png"]},
        {"image_id": "b", "prompt": "", "image": ["4.png"]},
    ]
    file = folder / f"prompts.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        rows[1]["image"] = "4.png"
        file.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(file, "pad", sized).prompts
    assert [[s.content for s in prompt.sources] for prompt in found] == [contents(folder, 3, 2), contents(folder, 4)]
    assert [(p.geometry.height, p.geometry.width) for p in found] == [(40, 32), (24, 32)]
    assert {source.fit for prompt in found for source in prompt.sources} == {"pad"}


def test_a_prompt_without_any_image_is_refused(folder):
    (folder / "prompts.jsonl").write_text(json.dumps({"image_id": "a", "prompt": "x", "image": []}))
    with pytest.raises(BadInput, match="image: is empty"):
        read_prompts(folder / "prompts.jsonl", "crop", sized)


def test_a_picture_is_no_video_but_judges_and_eyes_may_see_it(folder):
    clip = Geometry(height=16, width=16, frames=3)
    source = Source(path=str(folder / "2.png"), content=contents(folder, 2)[0], height=48, width=32)
    with pytest.raises(Refused, match=r"2\.png is a picture, but 3 frames of it are asked for"):
        open_source(source, clip)
    assert (seen_source(source, clip) == open_source(source, SIZE)).all()


class Counting:
    """A family whose buckets are numbers of sources."""

    def bucket(self, prompt):
        return len(prompt.sources)


def test_prompts_that_cannot_share_a_batch_are_refused_with_the_remedy():
    one, two = (
        Prompt(key="", instruction="", sources=(Source(path="", content="", height=48, width=32),) * n, geometry=SIZE)
        for n in (1, 2)
    )
    check_buckets(Counting(), [one, two], batch_size=1)
    check_buckets(Counting(), [two, two], batch_size=4)
    with pytest.raises(
        Refused, match=r"of 2 kinds that cannot share a batch, such as 1 and 2, .*train_batch_size = 4: set it"
    ):
        check_buckets(Counting(), [one, two, one], batch_size=4)
