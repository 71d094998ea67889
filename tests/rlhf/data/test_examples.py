"""Checking pairs: what is wrong is said with file, row, field and remedy; what is right is found again by its index."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data.examples import blocks_of, check_block, read_index
from rlhf.data.media import decode_image
from rlhf.data.records import BadInput
from rlhf.data.sizes import Sizes
from rlhf.data.sources import open_source, read_column
from rlhf.errors import Refused
from rlhf.types import Geometry
from tests.rlhf.data.pair_tables import index_of, png, row, write_jsonl, write_parquet

SIZE = Geometry(height=16, width=16)
SIZED = Sizes(sizes=(SIZE,))
BROKEN = {
    "undecodable bytes": ({"jpg_0": b"no picture"}, "jpg_0", "is unreadable"),
    "truncated picture": ({"jpg_1": png(3)[:200]}, "jpg_1", "is unreadable"),
    "missing picture": ({"jpg_1": None}, "jpg_1", "is missing"),
    "missing label": ({"label_0": None}, "label_0", "is missing"),
    "label that is no number": ({"label_0": float("nan")}, "label_0", "is missing"),
    "odd label": ({"label_0": 0.7}, "label_0", "is 0.7"),
    "empty caption": ({"caption": "  "}, "caption", "is empty"),
    "missing caption": ({"caption": None}, "caption", "is missing"),
}


def check(file, **needs):
    index = read_index(index_of(file, **needs))
    return index, list(index.problems)


def example_of(index, row):
    (example,) = index.examples(range(row, row + 1), SIZED)
    return example


def pictures_of(example):
    """An example's pictures by role, read as for encoding."""
    sources = dict(zip(["source"], example.prompt.sources, strict=False))
    return {role: open_source(s, read=read_column)[0].tolist() for role, s in {**example.targets, **sources}.items()}


def decoded(data):
    return decode_image(data).tolist()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_row_is_reported_with_its_number_and_field_and_the_others_are_kept(tmp_path, fault):
    changes, field, what = BROKEN[fault]
    rows = [row(seed) for seed in range(9)]
    rows[6] = row(6) | changes
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    index, problems = check(file)
    [problem] = problems
    assert (problem.file, problem.line, problem.field) == (str(file), 7, field)
    assert problem.what.startswith(what) and problem.remedy
    assert f"{file} row 7: {field}: {what}" in str(problem)
    assert index.table["number"].to_pylist() == [1, 2, 3, 4, 5, 6, 8, 9]


def test_labels_say_which_picture_won_and_ties_are_no_pairs(tmp_path):
    file = write_parquet(tmp_path / "pairs.parquet", [row(i, label) for i, label in enumerate((1, 0, 0.5, 0, 0.5))])
    index, problems = check(file)
    assert not problems and index.ties == 2
    assert index.table["winner"].to_pylist() == [0, 1, 1]
    assert index.sizes == (3, 0)


def test_rows_that_nobody_chose_in_are_no_pairs_and_are_not_checked(tmp_path):
    rows = [row(0), row(1) | {"jpg_0": b"no picture", "label_0": None}, row(2)]
    table = pa.Table.from_pylist([given | {"has_label": i != 1} for i, given in enumerate(rows)])
    pq.write_table(table, tmp_path / "pairs.parquet")
    index, problems = check(tmp_path / "pairs.parquet")
    assert not problems and index.unlabelled == 1 and index.table["number"].to_pylist() == [1, 3]


def test_an_index_read_again_finds_the_pictures_and_notices_that_they_changed(tmp_path):
    rows = [row(seed) for seed in range(6)]
    file = write_parquet(tmp_path / "pairs.parquet", rows)
    index, _ = check(file)
    assert [(block.part, block.count) for block in index.blocks] == [(0, 4), (1, 2)] and index.sizes == (4, 2)
    assert index.table["block"].to_pylist() == [0] * 4 + [1] * 2 and index.table["row"].to_pylist() == [
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    last = example_of(index, 5)
    assert pictures_of(last) == {"winner": decoded(rows[5]["jpg_0"]), "loser": decoded(rows[5]["jpg_1"])}
    assert list(index.examples(range(4, 6), SIZED)) == [example_of(index, 4), last]
    write_parquet(file, [row(seed + 50) for seed in range(6)])
    with pytest.raises(Refused, match="row 6 changed since it was checked"):
        pictures_of(last)


def test_rows_are_read_some_at_a_time(tmp_path, monkeypatch):
    index, _ = check(write_parquet(tmp_path / "pairs.parquet", [row(seed) for seed in range(7)]))
    whole = list(index.examples(range(7), SIZED))
    monkeypatch.setattr("rlhf.data.examples.ROWS_AT_ONCE", 2)
    assert list(index.examples(range(7), SIZED)) == whole and len(whole) == 7


def test_relabelling_changes_the_winners_alone(tmp_path):
    index, _ = check(write_parquet(tmp_path / "pairs.parquet", [row(seed) for seed in range(3)]))
    other = index.relabelled(np.array([1, 0, 1], dtype=np.int8), np.array([True, True, True]))
    assert other.table["winner"].to_pylist() == [1, 0, 1] and index.table["winner"].to_pylist() == [0, 0, 0]
    assert other.table.drop_columns("winner").equals(index.table.drop_columns("winner"))
    fewer = index.relabelled(np.array([1, 0, 1], dtype=np.int8), np.array([True, False, True]))
    assert fewer.table["number"].to_pylist() == [1, 3] and fewer.sizes == (2,)
    assert len({index.digest(), other.digest(), fewer.digest()}) == 3


def test_ids_and_captions_that_are_no_text_are_told_and_not_raised(tmp_path):
    file = write_jsonl(tmp_path, 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["image_id"], lines[1]["prompt"], lines[2]["image_id"] = 10001, "half \ud83d", ["a"]
    file.write_text("\n".join(map(json.dumps, lines)))
    _, problems = check(file, items={"0": None})
    assert [(problem.line, problem.field) for problem in problems] == [
        (1, "image_id"),
        (2, "prompt"),
        (2, "image_id"),
        (3, "image_id"),
    ]


def test_jsonl_rows_find_winner_loser_and_source_and_every_fault_is_told(tmp_path):
    file = write_jsonl(tmp_path, 3, source=True)
    index, problems = check(file, source_counts=range(1, 2))
    last = example_of(index, 2)
    assert not problems and [source.path for source in last.prompt.sources] == [str(tmp_path / "pictures/2_s.png")]
    assert last.targets["loser"].path == str(tmp_path / "pictures/2_l.png") and last.prompt.key == "2"
    files = {role: tmp_path / f"pictures/2_{role[0]}.png" for role in ("winner", "loser", "source")}
    found = {role: file.read_bytes() for role, file in files.items()}
    assert pictures_of(last) == {role: decoded(data) for role, data in found.items()}
    files["source"].write_bytes(png(99))
    with pytest.raises(Refused, match=r"pictures/2_s\.png changed since it was checked"):
        pictures_of(last)
    files["source"].write_bytes(found["source"])
    good = {"prompt": "x", "winner": "pictures/0_w.png", "loser": "pictures/0_l.png", "source": "pictures/0_s.png"}
    bad = [
        good | {"loser": "pictures/none.png"},
        good | {"winner": "../outside.png"},
        good | {"winner": "https://host/x.png"},
        good | {"source": 3},
        {name: value for name, value in good.items() if name != "source"},
        good | {"prompt": ""},
        [],
    ]
    file.write_text("\n".join([*map(json.dumps, bad), "{", json.dumps(good)]))
    index, problems = check(file, source_counts=range(1, 2))
    assert [(p.line, p.field) for p in problems] == [
        *((1, "loser"), (2, "winner"), (3, "winner"), (4, "source"), (5, "source"), (6, "prompt"), (7, None), (8, None))
    ]
    assert len(index.table) == 1


def test_a_pair_of_one_picture_is_none(tmp_path):
    """It would teach nothing, and count in every metric."""
    file = write_jsonl(tmp_path, 2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["loser"] = lines[0]["winner"]
    file.write_text("\n".join(map(json.dumps, lines)))
    for one in (file, write_parquet(tmp_path / "p.parquet", [row(1, jpg_1=png(2)), row(2)])):
        index, problems = check(one)
        assert [(p.line, p.what) for p in problems] == [(1, "both pictures are the same")] and len(index.table) == 1


def test_pairs_that_are_given_again_or_turned_round_are_told(tmp_path):
    file = write_jsonl(tmp_path, 3)
    first, second, third = [json.loads(line) for line in file.read_text().splitlines()]
    turned = first | {"winner": first["loser"], "loser": first["winner"]}
    other = second | {"prompt": "another text for the same pictures"}
    file.write_text("\n".join(map(json.dumps, [first, turned, first, second, other, third])))
    index, _ = check(file)
    assert "2 examples repeat an earlier one with its caption, or turn it round" in index.report()
    file.write_text("\n".join(map(json.dumps, [first, second, other, third])))
    assert "repeat" not in check(file)[0].report()


def test_a_row_has_as_many_sources_as_the_family_takes(tmp_path):
    file = write_jsonl(tmp_path, 4, source=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for count, line in enumerate(lines):
        line["source"] = [line["source"]] * count
    file.write_text("\n".join(map(json.dumps, lines)))
    for counts, bad in ((range(1, 2), [1, 3, 4]), (range(1, 3), [1, 4]), (range(4), [])):
        _, problems = check(file, source_counts=counts)
        assert [p.line for p in problems] == bad and {p.field for p in problems} <= {"source"}
    _, (_, last) = check(file, source_counts=range(1, 3))
    assert "source: names 3 pictures, but the model takes 1 to 2; give that many" in str(last)


def test_a_line_without_a_loser_is_a_target_where_none_is_needed(tmp_path):
    file = write_jsonl(tmp_path, 2)
    first, second = map(json.loads, file.read_text().splitlines())
    file.write_text(
        "\n".join(map(json.dumps, [{"prompt": "x", "winner": first["winner"]}, second, second | {"loser": 1}]))
    )
    _, problems = check(file)
    assert [(p.line, p.field) for p in problems] == [(1, "loser"), (3, "loser")]
    index, problems = check(file, needs_loser=False)
    assert [(p.line, p.field) for p in problems] == [(3, "loser")], "a loser that is given must be one"
    lone, pair = index.examples(range(2), SIZED)
    assert {role: source.path for role, source in lone.targets.items()} == {"target": str(tmp_path / first["winner"])}
    assert pair.targets["loser"].path == str(tmp_path / second["loser"]) and list(pair.targets) == ["winner", "loser"]


def test_a_target_needs_no_preference_and_is_none_for_one(tmp_path):
    file = write_jsonl(tmp_path, 1)
    picture = json.loads(file.read_text())["winner"]
    file.write_text(json.dumps({"prompt": "x", "target": picture}))
    index, problems = check(file, needs_loser=False)
    assert not problems and index.table["picture_1"].to_pylist() == [None]
    assert pictures_of(example_of(index, 0)) == {"target": decoded((tmp_path / picture).read_bytes())}
    _, problems = check(file)
    assert [(p.line, p.field) for p in problems] == [(1, "winner"), (1, "loser")]


def test_a_table_has_no_sources_for_an_edit_family_and_says_what_has(tmp_path):
    _, problems = check(write_parquet(tmp_path / "pairs.parquet", [row(1)]), source_counts=range(1, 2))
    assert "an edit family learns from a JSONL of winner, loser, prompt, source" in str(problems[0])


def test_every_row_needs_its_item_where_a_judge_reads_it(tmp_path):
    _, problems = check(write_jsonl(tmp_path, 2), items={"0": None})
    assert [str(p) for p in problems] == [
        f"{tmp_path / 'pairs.jsonl'}:2: image_id: '1' has no row in data.item_metadata; give every pair the image_id of an item"
    ]


# --- names of other trainers -------------------------------------------------------------------------------------------


def pictures(folder, *names):
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))


CSV = """path_target,path_control,path_control_1,prompt,path_mask
t.png,c.png,d.png,two sources,m.png
t.png,,d.png,one source,
"""
LINES = [
    {"target_image": "t.png", "control_images": ["c.png", "d.png"], "prompt": "two sources", "control_mask": "m.png"},
    {"target_image": "t.png", "control_images": "d.png", "prompt": "one source", "control_mask": None},
]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_columns_go_by_the_names_of_other_trainers(tmp_path, ending):
    pictures(tmp_path, "t.png", "c.png", "d.png", "m.png")
    file = tmp_path / f"data.{ending}"
    file.write_text(CSV if ending == "csv" else "\n".join(map(json.dumps, LINES)))
    index, problems = check(file, source_counts=range(1, 4), needs_loser=False)
    assert problems == []
    for row_number, (sources, mask) in enumerate([(("c.png", "d.png"), "m.png"), (("d.png",), None)]):
        example = example_of(index, row_number)
        assert [source.path for source in example.prompt.sources] == [str(tmp_path / name) for name in sources]
        assert {role: source.path for role, source in example.targets.items()} == {"target": str(tmp_path / "t.png")}
        assert (example.mask and example.mask.path) == (mask and str(tmp_path / mask))


def test_a_column_under_two_names_and_a_csv_of_another_kind_are_told(tmp_path):
    pictures(tmp_path, "t.png")
    (tmp_path / "a.csv").write_text("target,path_target,prompt\nt.png,t.png,x\n")
    _, (problem,) = check(tmp_path / "a.csv", needs_loser=False)
    assert str(problem).endswith("a.csv:2: path_target: says the same as target; keep one of the two")


def test_pairs_as_a_csv_of_winner_and_loser(tmp_path):
    pictures(tmp_path, "w.png", "l.png")
    (tmp_path / "a.csv").write_text("prompt,winner,loser\nx,w.png,l.png\n")
    index, problems = check(tmp_path / "a.csv")
    assert problems == [] and set(example_of(index, 0).targets) == {"winner", "loser"}


MIXED = {
    "two columns of sources": (
        {"path_control": "c.png", "control_images": "d.png"},
        r"(control_images|path_control): says the same as source; keep one of the two",
    ),
    "a source that is null": ({"control_images": [None, "c.png"]}, "source: is null, not a string"),
    "a source that is empty": ({"control_images": ["c.png", ""]}, "source: is empty"),
    "a target beside a pair": (
        {"winner": "c.png", "loser": "d.png"},
        "target: stands beside winner or loser; give a target",
    ),
}


@pytest.mark.parametrize("what", MIXED)
def test_nothing_of_a_row_is_dropped_in_silence(tmp_path, what):
    pictures(tmp_path, "t.png", "c.png", "d.png")
    more, says = MIXED[what]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", "target": "t.png", **more}))
    _, problems = check(tmp_path / "a.jsonl", source_counts=range(4), needs_loser=False)
    assert len(problems) == 1 and re.search(says, str(problems[0])), problems


def test_a_mask_is_of_the_size_of_both_pictures_of_a_pair(tmp_path):
    pictures(tmp_path, "w.png")
    for name, width in (("l.png", 64), ("m.png", 32)):
        (tmp_path / name).write_bytes(png(width, 24, width))
    line = {"prompt": "x", "winner": "w.png", "loser": "l.png", "mask": "m.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    _, (problem,) = check(tmp_path / "a.jsonl")
    assert "mask: is 24 × 32 pixels, but the picture 24 × 64" in str(problem)


# --- tables of targets -------------------------------------------------------------------------------------------------

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HUB = pa.schema(
    [
        ("control_images", pa.list_(IMAGE)),
        ("target_image", IMAGE),
        ("prompt", pa.string()),
        ("control_mask", IMAGE),
    ]
)
OURS = pa.schema([("source", pa.binary()), ("target", pa.binary()), ("prompt", pa.string()), ("image_id", pa.string())])


def image(seed, *size):
    return {"bytes": png(seed, *size), "path": None}


def write_targets(file, rows, schema=HUB):
    table = pa.Table.from_pylist(rows, schema=schema)
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=2)
    else:
        with pa.ipc.new_stream(str(file), schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return file


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_holds_targets_their_sources_and_masks(tmp_path, ending):
    """As the hub's data sets of edits have them: three rows in two blocks, of one, two and one sources, one with a mask."""
    rows = [
        {"control_images": [image(1)], "target_image": image(2), "prompt": "one"},
        {"control_images": [image(3), image(4)], "target_image": image(5), "prompt": "two", "control_mask": image(6)},
        {"control_images": [image(7)], "target_image": image(8), "prompt": "three"},
    ]
    index, problems = check(write_targets(tmp_path / f"t.{ending}", rows), source_counts=range(1, 4), needs_loser=False)
    assert problems == [] and index.sizes == (2, 1)
    opened = [
        [
            open_source(source, read=read_column)[0].tolist()
            for source in (*example.prompt.sources, example.targets["target"])
        ]
        for example in index.examples(range(3), SIZED)
    ]
    assert opened == [[decoded(png(seed)) for seed in seeds] for seeds in ((1, 2), (3, 4, 5), (7, 8))]
    masks = [example.mask for example in index.examples(range(3), SIZED)]
    assert masks[0] is masks[2] is None and open_source(masks[1], read=read_column)[0].tolist() == decoded(png(6))
    assert [example.prompt.instruction for example in index.examples(range(3), SIZED)] == ["one", "two", "three"]


def test_a_table_may_name_its_columns_as_ours_and_hold_one_source(tmp_path):
    rows = [{"source": png(1), "target": png(2), "prompt": "x", "image_id": "soup"}]
    index, problems = check(
        write_targets(tmp_path / "t.parquet", rows, OURS), source_counts=range(1, 2), needs_loser=False
    )
    example = example_of(index, 0)
    assert problems == [] and example.prompt.key == "soup"
    assert open_source(example.prompt.sources[0], read=read_column)[0].tolist() == decoded(png(1))


WRONG_TARGETS = {
    "no target": ({"target_image": None}, "target: is missing"),
    "no prompt": ({"prompt": None}, "prompt: is missing"),
    "no source": ({"control_images": None}, "source: is missing"),
    "an empty list": ({"control_images": []}, "source: is empty"),
    "a source that is null": ({"control_images": [None, image(1)]}, "source: is null"),
    "a broken source": ({"control_images": [{"bytes": b"x", "path": None}]}, "source: is unreadable"),
    "too many": (
        {"control_images": [image(seed) for seed in range(4)]},
        "source: names 4 pictures, but the model takes 1",
    ),
    "a mask of another size": ({"control_mask": image(1, 16, 16)}, "mask: is 16 × 16 pixels"),
}


@pytest.mark.parametrize("what", WRONG_TARGETS)
def test_what_is_wrong_with_a_row_of_targets_is_told(tmp_path, what):
    good = {"control_images": [image(1)], "target_image": image(2), "prompt": "x"}
    change, says = WRONG_TARGETS[what]
    file = write_targets(tmp_path / "t.parquet", [good, good | change])
    index, (problem,) = check(file, source_counts=range(1, 2), needs_loser=False)
    assert f"t.parquet row 2: {says}" in str(problem) and len(index.table) == 1


def test_a_table_of_targets_lacks_no_column(tmp_path):
    pq.write_table(pa.table({"target_image": [png(1)]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"t\.parquet: has no column prompt; it has target_image"):
        blocks_of(tmp_path / "t.parquet")


def test_rows_as_firered_writes_them_below_a_root_of_their_own(tmp_path):
    """One source, two, and null for none; paths from the root, absolute ones too."""
    root = tmp_path / "pictures"
    (root / "img").mkdir(parents=True)
    pictures(root / "img", "a.png", "b.png", "c.png", "d.png")
    rows = [
        {"source_image": "img/a.png", "target_image": "img/b.png", "instruction": "sunset", "instruction_cn": "日落"},
        {"source_image": ["img/a.png", str(root / "img/b.png")], "target_image": "img/c.png", "instruction": "merge"},
        {"source_image": None, "edit_image": "img/d.png", "instruction": "a cat"},
    ]
    file = tmp_path / "lists" / "data.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    needs = {"source_counts": range(4), "items": None, "needs_loser": False}
    (found,) = (check_block(block, root=root, **needs) for block in blocks_of(file))
    assert found.problems == ()
    examples = list(found.examples(range(3), SIZED))
    assert [example.prompt.instruction for example in examples] == ["sunset", "merge", "a cat"]
    named = [[Path(source.path).name for source in example.prompt.sources] for example in examples]
    assert named == [["a.png"], ["a.png", "b.png"], []]
    assert [Path(example.targets["target"].path).name for example in examples] == ["b.png", "c.png", "d.png"]
    (without,) = (check_block(block, **needs) for block in blocks_of(file))
    assert any("source: 'img/a.png' does not exist" in str(problem) for problem in without.problems)
