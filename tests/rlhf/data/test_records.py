"""The one reader: the same rows in any format are the same records with the same problems, by blocks that stand alone."""

import csv
import json
import math
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data.checks import check, check_file
from rlhf.data.formats import FOLDER, FORMATS, ROWS_PER_BLOCK, blocks_of, read_block
from rlhf.data.records import BadInput, Field, Problem, Record
from tests.rlhf.data.pair_tables import png

FIELDS = (
    Field(name="id", unique=True, known={*map(str, range(200))}, known_in="items.csv", example='"10001"'),
    Field(name="text", may_be_empty=True, example='"Make it brighter."'),
    Field(name="rate", kind="number"),
    Field(name="image", kind="picture path"),
    Field(name="note", required=False),
)


def _jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _parquet(file: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=ROWS_PER_BLOCK)


def _arrow(file: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS_PER_BLOCK)


WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}
"""Formats whose rows name their fields; .txt has texts alone."""


def row(number: int, **changes: object) -> dict:
    text = ("plain", "with, comma", 'with "quotes"', "上海", " two\nlines ", "")[number % 6]
    note = "" if number % 5 else "seen"
    return {"id": str(number), "text": text, "rate": "0.25", "image": "1.png", "note": note, "more": "x", **changes}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "1.png").write_bytes(png(1))
    (folder / "broken.png").write_bytes(png(1)[:100])
    return folder


def write(folder: Path, ending: str, rows: list[dict]) -> Path:
    file = folder / f"rows{ending}"
    WRITERS[ending](file, rows)
    return file


def everything(file: Path, fields=()) -> list[Record | Problem]:
    return [found for block in blocks_of(file, fields) for found in read_block(block, fields)]


def test_every_format_is_tested():
    """Folders in test_layouts.py."""
    assert {*WRITERS, ".txt", FOLDER} == set(FORMATS)


# --- the contract of every format --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_the_same_rows_are_the_same_records(folder, ending):
    rows = [row(number) for number in range(150)]
    records, problems = check_file(write(folder, ending, rows), FIELDS, key="data.path", otherwise="")
    assert not problems and len(records) == 150
    for record, given in zip(records, rows, strict=True):
        picture = record.fields["image"]
        assert (picture.path, picture.height, picture.width) == (str((folder / "1.png").resolve()), 24, 32)
        expected = {"id": given["id"], "text": given["text"], "rate": 0.25, "image": picture}
        assert record.fields == expected | ({"note": "seen"} if given["note"] else {})


BROKEN = {
    "empty id": ({"id": " "}, "id", "is empty"),
    "unknown id": ({"id": "999"}, "id", "'999' has no row in items.csv"),
    "repeated id": ({"id": "3"}, "id", "'3' is already on line "),
    "no number": ({"rate": "many"}, "rate", "is 'many'"),
    "not finite": ({"rate": "nan"}, "rate", "is 'nan'"),
    "no path": ({"image": ""}, "image", "is empty"),
    "absent picture": ({"image": "none.png"}, "image", "'none.png' does not exist"),
    "broken picture": ({"image": "broken.png"}, "image", "'broken.png' is unreadable: "),
    "URL": ({"image": "https://host/1.png"}, "image", "'https://host/1.png' is a URL"),
    "outside": ({"image": "../1.png"}, "image", "'../1.png' lies outside the data root "),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_the_same_faults_are_the_same_problems_and_the_other_rows_are_kept(folder, ending):
    rows = [row(number) for number in range(140)]
    for number, (changes, _, _) in zip(range(60, 140), BROKEN.values(), strict=False):
        rows[number] |= changes
    file = write(folder, ending, rows)
    records, problems = check_file(file, FIELDS, key="data.path", otherwise="")
    assert len(records) == 140 - len(BROKEN)
    numbers = {record.fields["id"]: record.number for record in records}
    assert numbers["59"] < problems[0].line and problems[-1].line < numbers["70"]
    for problem, (_, field, what) in zip(problems, BROKEN.values(), strict=True):
        assert (problem.file, problem.field) == (str(file), field) and problem.what.startswith(what)
        assert problem.remedy and str(file) in str(problem)


@pytest.mark.parametrize("ending", WRITERS)
def test_blocks_stand_alone_and_have_their_known_sizes(folder, ending):
    rows = [row(number, text="a line") for number in range(150)]
    file = write(folder, ending, rows)
    blocks = blocks_of(file, FIELDS)
    first = 2 if ending == ".csv" else 1
    assert [(b.part, b.first, b.count) for b in blocks] == [(0, first, 64), (1, first + 64, 64), (2, first + 128, 22)]
    shuffled = random.Random(0).sample(blocks, 3)
    found = {block.part: read_block(block) for block in shuffled}
    ids = [record.fields["id"] for part in sorted(found) for record in found[part]]
    assert ids == [str(number) for number in range(150)]
    numbers = [record.number for part in sorted(found) for record in found[part]]
    assert numbers == list(range(first, first + 150))


@pytest.mark.parametrize("ending", WRITERS)
def test_only_the_fields_that_are_named_are_read(folder, ending):
    file = write(folder, ending, [row(1)])
    assert everything(file)[0].fields.keys() == row(1).keys()
    if ending in (".parquet", ".arrow"):
        assert everything(file, FIELDS[:2])[0].fields.keys() == {"id", "text"}, "no other column is read"
    [record], _ = check_file(file, FIELDS[:2], key="", otherwise="")
    assert record.fields.keys() == {"id", "text"}
    [record], _ = check_file(file, FIELDS[:3], key="", otherwise="", others=True)
    assert record.fields["more"] == "x" and record.fields["rate"] == 0.25


@pytest.mark.parametrize("ending", WRITERS)
def test_a_field_that_no_row_has_is_told_once_by_tables_and_by_line_in_jsonl(folder, ending):
    rows = [{"id": "1", "text": ""}, {"id": "2", "text": ""}]
    _, problems = check_file(write(folder, ending, rows), FIELDS, key="data.path", otherwise="")
    if ending == ".jsonl":
        expected = [(1, "rate"), (1, "image"), (2, "rate"), (2, "image")]
        assert [(problem.line, problem.field) for problem in problems] == expected
        assert all(problem.what == "is missing" for problem in problems)
    else:
        [problem] = problems
        assert problem.what == "has no column rate, image" and "id" in problem.remedy and problem.line is None


@pytest.mark.parametrize("ending", [*WRITERS, ".txt"])
def test_a_file_that_is_not_there_or_not_readable_is_a_problem_of_the_file(folder, ending):
    def only(file: Path, key: str) -> str:
        with pytest.raises(BadInput) as caught:
            blocks_of(file, key=key)
        [problem] = caught.value.problems
        assert problem.line is None
        return str(problem).replace(str(file), "FILE")

    assert only(folder / f"none{ending}", "data.path") == "FILE: no such file; set data.path to an existing file"
    (folder / f"folder{ending}").mkdir()
    unreadable = only(folder / f"folder{ending}", "eval.path")
    if ending not in (".parquet", ".arrow"):
        assert unreadable == "FILE: cannot be read: Is a directory; set eval.path to a readable file"
    os.mkfifo(folder / f"pipe{ending}")
    assert only(folder / f"pipe{ending}", "") == "FILE: is no file but a pipe or device; give a file"
    (folder / f"pointer{ending}").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    pulled = only(folder / f"pointer{ending}", "")
    assert pulled == f"FILE: is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}"
    if ending in (".parquet", ".arrow"):
        (folder / f"broken{ending}").write_bytes(b"PAR1 no table at all")
        assert only(folder / f"broken{ending}", "").startswith(f"FILE: is no {FORMATS[ending].noun}: ")


# --- text files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv_with_any_line_end_and_rows_over_many_lines(folder, ending, bom):
    lines = [bom + "id,text"]
    for number in range(200):
        lines += [f'{number},"first', f'second, {number}"'] if number % 3 == 0 else [f"{number},上海 {number}"]
        lines += [""] if number % 7 == 0 else []
    (folder / "rows.csv").write_bytes(ending.join(lines).encode())
    found = everything(folder / "rows.csv")
    assert [record.fields["id"] for record in found] == [str(number) for number in range(200)]
    assert found[66].fields["text"] == f"first{ending}second, 66" and found[67].fields["text"] == "上海 67"
    for record in found:  # the number is that of the row's last line
        assert record.fields["id"] in lines[record.number - 1]


def test_a_csv_row_of_another_length_is_told_and_the_next_is_read(folder):
    (folder / "rows.csv").write_text('id,text\n1,a,b\n2\n3,"c,\nd"\n')
    long, short, good = everything(folder / "rows.csv")
    assert (long.line, long.what) == (2, "has 3 fields, the header 2") and (short.line, short.what[:5]) == (3, "has 1")
    assert (good.number, good.fields) == (5, {"id": "3", "text": "c,\nd"})


@pytest.mark.parametrize(
    ("data", "what"),
    [(b"id\n1\n\xe9\n", "line 3 is not UTF-8"), (b"\xe9\n", "line 1 is not UTF-8"), (b'id\n"1\n', "line 2 is no CSV")],
)
def test_a_csv_that_is_broken_is_so_as_a_whole(folder, data, what):
    (folder / "rows.csv").write_bytes(data)
    with pytest.raises(BadInput, match=f"rows.csv: {what}"):
        blocks_of(folder / "rows.csv")


@pytest.mark.parametrize("text", ["id,text,id\n1,a,2\n", " id , text,id\n"])
def test_a_csv_that_names_a_column_twice_is_refused(folder, text):
    (folder / "rows.csv").write_text(text)
    with pytest.raises(BadInput, match="names a column twice: id; give every column a name of its own"):
        blocks_of(folder / "rows.csv", FIELDS)
    (folder / "rows.csv").write_text("id,text,,\n1,a,,\n")  # as a spreadsheet leaves columns that are empty
    (block,) = blocks_of(folder / "rows.csv")
    (record,) = read_block(block)
    assert record.fields["id"] == "1"


def test_a_table_that_names_a_column_twice_is_refused(folder):
    table = pa.table([pa.array(["1"]), pa.array(["2"])], names=["id", "id"])
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(BadInput, match="names a column twice: id"):
        blocks_of(folder / "rows.arrow")


def test_a_line_that_names_a_key_twice_is_told(folder):
    (folder / "rows.jsonl").write_text('{"id": "1", "text": "a", "id": "2"}\n{"id": "3", "text": "b"}\n')
    (block,) = blocks_of(folder / "rows.jsonl")
    problem, record = read_block(block)
    assert problem.line == 1 and "the key 'id' is there twice" in problem.what and record.fields["id"] == "3"


def test_jsonl_and_texts_keep_line_numbers_and_tell_of_lines_that_cannot_be_read(folder):
    good = b'{"text": "x"}'
    lines = [good, b"", b'{"text": "\xff"}', b"[1]", b'"x"', b"{", b" ", *[good] * 70]
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found = everything(folder / "rows.jsonl", (Field(name="text", example='"a red apple"'),))
    problems = [problem for problem in found if isinstance(problem, Problem)]
    assert [(problem.line, problem.what.split(":")[0]) for problem in problems] == [
        (3, "is not UTF-8 (invalid start byte)"),
        (4, "is an array, not an object"),
        (5, "is a string, not an object"),
        (6, "is not JSON"),
    ]
    assert problems[1].remedy == 'write one JSON object per line, like {"text": "a red apple"}'
    assert [record.number for record in found if isinstance(record, Record)] == [1, *range(8, 78)]

    (folder / "texts.txt").write_bytes("\ufeffa red apple\r\n\n  一个苹果  \n".encode() + b"\xff\nlast")
    first, second, broken, last = everything(folder / "texts.txt", (Field(name="text"),))
    assert (first.number, first.fields) == (1, {"text": "a red apple"})
    assert (second.number, second.fields, last.number) == (3, {"text": "一个苹果"}, 5)
    assert (broken.line, broken.what) == (4, "is not UTF-8 (invalid start byte)")


def test_a_file_with_another_ending_is_refused_unless_its_format_is_said(folder):
    WRITERS[".csv"](folder / "rows.dat", [row(1)])
    with pytest.raises(BadInput, match=r"is a \.dat file; give one of \.jsonl, \.csv"):
        blocks_of(folder / "rows.dat")
    [block] = blocks_of(folder / "rows.dat", FIELDS, otherwise=".csv")
    assert read_block(block)[0].fields["id"] == "1"


# --- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_null_in_a_table_is_a_missing_field_and_so_is_not_a_number(folder, ending):
    file = write(folder, ending, [{"id": "1", "rate": 0.5}, {"id": None, "rate": math.nan}, {"id": "3", "rate": None}])
    _, problems = check_file(file, (FIELDS[0], FIELDS[2]), key="", otherwise="")
    assert [(p.line, p.field, p.what) for p in problems] == [
        (2, "id", "is missing"),
        (2, "rate", "is missing"),
        (3, "rate", "is missing"),
    ]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_the_image_feature_of_datasets_is_its_bytes_or_its_path(folder, ending):
    pictures = [{"bytes": png(7), "path": "x.png"}, {"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}]
    file = write(folder, ending, [{"image": picture} for picture in pictures])
    (first, second), [problem] = check_file(file, (Field(name="image", kind="picture"),), key="", otherwise="")
    assert first.fields["image"].path is None and second.fields["image"].path == str(folder / "1.png")
    assert first.fields["image"].content != second.fields["image"].content
    assert (problem.line, problem.what) == (3, "is missing")
    _, problems = check_file(file, (Field(name="image", kind="picture path"),), key="", otherwise="")
    assert [p.what for p in problems] == ["is bytes, not a string", "is missing"]


def test_a_row_group_is_read_without_the_others(folder):
    file = write(folder, ".parquet", [row(number) for number in range(128)])
    group = pq.read_metadata(file).row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + 20] = b"\xff" * 20
    file.write_bytes(bytes(data))
    first, second = blocks_of(file)
    assert len(read_block(first)) == 64
    with pytest.raises(BadInput, match=r"row 65: rows 65 to 128 cannot be read: .*; replace it"):
        read_block(second)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_extension_types_from_outside_are_refused(folder, ending):
    table = pa.table({"id": pa.array([b"0" * 16], pa.binary(16)).cast(pa.uuid())})
    if ending == ".parquet":
        pq.write_table(table, folder / "rows.parquet")
    else:
        with pa.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(BadInput, match="column id has the extension type"):
        blocks_of(folder / f"rows{ending}")


# --- fields ------------------------------------------------------------------------------------------------------------

KNOWN = {
    "text": (Field(name="a"), "x", "x"),
    "text of another type": (Field(name="a", example='"x"'), 7, "is a number, not a string; write it in quotes, like"),
    "null": (Field(name="a"), None, "is null, not a string"),
    "blank": (Field(name="a", example='"x"'), " ", 'is empty; write for example "x"'),
    "blank with a remedy": (Field(name="a", remedy="say so"), " ", "is empty; say so"),
    "blank that may be": (Field(name="a", may_be_empty=True), " ", " "),
    "blanks around": (Field(name="a", stripped=True), " x ", "x"),
    "half a character": (Field(name="a"), "\ud800", "holds half of a surrogate pair"),
    "optional null": (Field(name="a", required=False), None, None),
    "optional empty": (Field(name="a", required=False), "", None),
    "optional of another type": (Field(name="a", required=False), 7, "is a number, not a string"),
    "number": (Field(name="a", kind="number"), 3, 3.0),
    "number as text": (Field(name="a", kind="number"), " 0.5 ", 0.5),
    "infinite": (Field(name="a", kind="number"), "inf", "is 'inf'; give a finite number"),
    "no number": (Field(name="a", kind="number"), [1], "is [1]; give a finite number"),
    "bytes": (Field(name="a", kind="picture"), b"no picture", "is unreadable: "),
    "anything": (Field(name="a", kind="any"), [1], [1]),
    "not known": (Field(name="a", known={"y"}, known_in="the file"), "x", "'x' has no row in the file; add its row"),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_answers_of_a_field(tmp_path, case):
    field, value, expected = KNOWN[case]
    record = Record(file=str(tmp_path / "rows.jsonl"), number=4, fields={"a": value})
    values, problems = check(record, (field,))
    if isinstance(expected, str) and expected != values.get("a"):
        assert values == {} and f"rows.jsonl:4: a: {expected}" in str(problems[0])
    else:
        assert not problems and values == ({} if expected is None else {"a": expected})


def test_a_field_that_is_missing_and_every_problem_of_a_record(tmp_path):
    record = Record(file=str(tmp_path / "rows.jsonl"), number=1, fields={"image": "none.png"})
    values, problems = check(record, FIELDS)
    assert not values and [problem.field for problem in problems] == ["id", "text", "rate", "image"]
    assert problems[0].remedy == 'add "id": "10001"'


def test_pictures_may_lie_below_another_root(folder):
    (folder / "lists").mkdir()
    file = write(folder / "lists", ".jsonl", [row(1)])
    assert check_file(file, FIELDS, key="", otherwise="")[1][0].what == "'1.png' does not exist"
    assert check_file(file, FIELDS, key="", otherwise="", root=folder)[1] == []


def test_of_equal_ids_the_first_row_counts_that_is_good_but_for_its_picture(folder):
    rows = [
        row(1, rate="many"),
        row(1, image="none.png"),
        row(1, text="second"),
        row(2),
    ]
    records, problems = check_file(write(folder, ".csv", rows), FIELDS, key="", otherwise="")
    assert [record.fields["id"] for record in records] == ["2"]
    assert [(p.line, p.field) for p in problems[:2]] == [(2, "rate"), (3, "image")]
    assert "is already on line 3" in problems[2].what
