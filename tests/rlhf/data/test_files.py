"""Files of pairs: their blocks, which files of a folder are read, and how what is no table of pairs is refused."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data.examples import LINE, TABLE, blocks_of
from rlhf.data.files import find_files
from rlhf.data.formats import read_block
from rlhf.data.records import BadInput
from tests.rlhf.data.pair_tables import row, write_arrow, write_jsonl, write_parquet

ROWS = [row(seed, label=seed % 2) for seed in range(10)]


def everything(file):
    return [raw for block in blocks_of(file) for raw in read_block(block, LINE if block.format == ".jsonl" else TABLE)]


@pytest.mark.parametrize("write", [write_parquet, write_arrow], ids=["parquet", "arrow"])
def test_tables_give_their_rows_by_blocks_with_their_numbers(tmp_path, write):
    file = write(tmp_path / ("pairs.parquet" if write is write_parquet else "data-00000-of-00001.arrow"), ROWS)
    assert [(block.first, block.count) for block in blocks_of(file)] == [(1, 4), (5, 4), (9, 2)]
    found = everything(file)
    assert [raw.number for raw in found] == list(range(1, 11))
    for raw, given in zip(found, ROWS, strict=True):
        assert raw.fields == {name: given[name] for name in ("jpg_0", "jpg_1", "caption", "label_0")}


def test_jsonl_lines_keep_their_numbers_past_empty_ones_and_across_blocks(tmp_path):
    file = write_jsonl(tmp_path, 70)
    file.write_text(file.read_text().replace("\n", "\n\n", 1))
    found = everything(file)
    assert [raw.number for raw in found] == [1, *range(3, 72)]
    assert found[1].fields["winner"] == "pictures/1_w.png" and found[1].fields["loser"] == "pictures/1_l.png"
    assert len(blocks_of(file)) == 2


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"], "train", [0]),
        (["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"], "test", [1]),
        (  # Pick-a-Pic v2's own names
            [
                "data/train-00000-of-00645-b66ac786bf6fb553.parquet",
                "data/validation_unique-00000-of-00001-33ead111845fc9c4.parquet",
            ],
            "validation_unique",
            [1],
        ),
        (["train/data-00000-of-00001.arrow", "validation/data-00000-of-00001.arrow"], "validation", [1]),
        (["train.parquet", "test.parquet"], "test", [1]),
        (["train_1.parquet", "train_2.parquet", "validation_unique.parquet"], "train", [0, 1]),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], "validation", [1]),
        (["a.parquet", "more/b.parquet"], "train", [0, 1]),
        (["a.parquet", ".cache/b.parquet"], "train", [0]),
    ],
)
def test_a_folders_files_are_those_of_the_split(tmp_path, names, split, chosen):
    for name in names:
        (write_arrow if name.endswith("arrow") else write_parquet)(tmp_path / name, ROWS[:1])
    assert find_files(tmp_path, split) == [tmp_path / names[i] for i in chosen]


def test_what_is_no_table_of_pairs_is_refused_with_the_remedy(tmp_path):
    write_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", ROWS[:1])
    with pytest.raises(BadInput, match=r"has the splits train, but eval.split = 'validation'; set eval.split to one"):
        find_files(tmp_path / "hub", "validation", "eval.path")
    write_parquet(tmp_path / "hub" / "more.parquet", ROWS[:1])
    with pytest.raises(BadInput, match=r"more.parquet: lies beside files of the splits train, but its name says none"):
        find_files(tmp_path / "hub", "train")
    with pytest.raises(BadInput, match=r"no such file or folder; set data.path to a \.parquet"):
        find_files(tmp_path / "absent", "train")
    (tmp_path / "pairs.csv").write_text("a,b\n")
    with pytest.raises(BadInput, match=r"is a \.csv file"):
        find_files(tmp_path / "pairs.csv", "train")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInput, match="is no Parquet file"):
        blocks_of(tmp_path / "broken.parquet")
    pq.write_table(pa.table({"caption": ["x"], "label_0": [1.0]}), tmp_path / "thin.parquet")
    with pytest.raises(BadInput, match="has no column jpg_0, jpg_1; it has caption, label_0"):
        blocks_of(tmp_path / "thin.parquet")
