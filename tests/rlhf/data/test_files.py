"""Files of pairs: their blocks, which files of a folder are read, and how what is no table of pairs is refused."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data.columns import LINE, TABLE
from rlhf.data.examples import blocks_of
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
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            "train",
            [0, 1],
        ),
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


def save_to_disk(folder, rows, listed=1, **more):
    """As `datasets` writes a split: its files of equal rows, and the list of them."""
    names = [f"data-{i:05d}-of-{listed:05d}.arrow" for i in range(listed)]
    for name in names:
        write_arrow(folder / name, rows)
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_split": None}
    (folder / "state.json").write_text(json.dumps(state | more))
    return [folder / name for name in names]


def test_of_a_saved_data_set_the_listed_files_are_read_and_no_cache_beside_them(tmp_path):
    files = save_to_disk(tmp_path, ROWS[:4], listed=2)
    for left_over in ("cache-0a1b2c3d.arrow", "data-00000-of-00001.arrow", "tmpabc.arrow", "old.parquet"):
        (write_arrow if left_over.endswith("arrow") else write_parquet)(tmp_path / left_over, ROWS[:4])
    assert find_files(tmp_path, "train") == files
    assert sum(len(everything(file)) for file in files) == 8


def test_of_a_saved_dict_the_splits_that_it_names_are_read(tmp_path):
    files = {split: save_to_disk(tmp_path / split, ROWS[:1]) for split in ("train", "mine_unique", "older")}
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "mine_unique"]}')
    write_arrow(tmp_path / "train" / "cache-0a1b.arrow", ROWS[:1])
    write_arrow(tmp_path / "cache-0a1b.arrow", ROWS[:1])
    write_parquet(tmp_path / "test.parquet", ROWS[:1])
    for split in ("train", "mine_unique"):
        assert find_files(tmp_path, split) == files[split]
    with pytest.raises(BadInput, match=r"has the splits mine_unique, train, but data\.split = 'older'"):
        find_files(tmp_path, "older")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: (f / "train/data-00001-of-00002.arrow").unlink(),
            r"state.json: names data-00001-of-00002.arrow, which",
        ),
        (
            lambda f: (f / "train/state.json").unlink(),
            r"dataset_dict.json: names the split 'train', but train/state.json is",
        ),
        (
            lambda f: (f / "train/state.json").write_text("{"),
            r"state.json: is not what save_to_disk writes \(JSONDecode",
        ),
        (lambda f: (f / "train/state.json").write_text("[]"), r"state.json: is not what save_to_disk writes"),
        (
            lambda f: (f / "train/state.json").write_text("{}"),
            r"state.json: is not what save_to_disk writes \(KeyError",
        ),
        (lambda f: (f / "dataset_dict.json").write_text("x"), r"dataset_dict.json: is not what save_to_disk writes"),
        (
            lambda f: (f / "dataset_dict.json").write_text('{"splits": ["train", "test"]}'),
            r"names the split 'test', but",
        ),
        (
            lambda f: save_to_disk(f / "train", ROWS[:1], _indices_data_files=[{"filename": "indices.arrow"}]),
            r"state.json: says that only some rows .* call flatten_indices\(\)",
        ),
    ],
)
def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path, spoil, said):
    save_to_disk(tmp_path / "train", ROWS[:1], listed=2)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    spoil(tmp_path)
    with pytest.raises(BadInput, match=said):
        find_files(tmp_path, "train")


def test_a_cache_that_no_list_leaves_out_is_refused(tmp_path):
    write_arrow(tmp_path / "data-00000-of-00001.arrow", ROWS[:1])
    write_arrow(tmp_path / "cache-0a1b.arrow", ROWS[:1])
    with pytest.raises(BadInput, match=r"cache-0a1b.arrow: is what `datasets` keeps of a map .*; move it away"):
        find_files(tmp_path, "train")


def test_what_is_no_table_of_pairs_is_refused_with_the_remedy(tmp_path):
    write_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", ROWS[:1])
    with pytest.raises(BadInput, match=r"has the splits train, but eval.split = 'validation'; set eval.split to one"):
        find_files(tmp_path / "hub", "validation", "eval.path")
    write_parquet(tmp_path / "hub" / "more.parquet", ROWS[:1])
    with pytest.raises(BadInput, match=r"more.parquet: lies beside files of the splits train, but its name says none"):
        find_files(tmp_path / "hub", "train")
    with pytest.raises(BadInput, match=r"no such file or folder; set data.path to a \.parquet"):
        find_files(tmp_path / "absent", "train")
    (tmp_path / "pairs.tsv").write_text("a\tb\n")
    with pytest.raises(
        BadInput, match=r"is a \.tsv file; set data\.path to a .*, or to one that holds training_images/"
    ):
        find_files(tmp_path / "pairs.tsv", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"holds no \.parquet or \.arrow file and no pictures"):
        find_files(tmp_path / "empty", "train")
    (tmp_path / "pairs.csv").write_text("image,text\n1.png,x\n")
    with pytest.raises(BadInput, match=r"has the columns image, text; the first line must name, in small letters"):
        blocks_of(tmp_path / "pairs.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInput, match="is no Parquet file"):
        blocks_of(tmp_path / "broken.parquet")
    pq.write_table(pa.table({"caption": ["x"], "label_0": [1.0]}), tmp_path / "thin.parquet")
    with pytest.raises(BadInput, match="has no column jpg_0, jpg_1; it has caption, label_0"):
        blocks_of(tmp_path / "thin.parquet")


def test_shards_of_which_one_is_missing_are_no_data_set(tmp_path):
    for name in ("train-00000-of-00003-0a1b", "train-00002-of-00003-0a1b", "test-00000-of-00001-0c"):
        write_parquet(tmp_path / f"{name}.parquet", ROWS[:1])
    with pytest.raises(
        BadInput, match=r"holds 2 of 3 files train-…-of-00003; the first that is missing is 00001; download"
    ):
        find_files(tmp_path, "train")
    assert len(find_files(tmp_path, "test")) == 1


def test_pictures_with_captions_beside_tables_are_no_guess(tmp_path):
    write_parquet(tmp_path / "some.parquet", ROWS[:1])
    (tmp_path / "images").mkdir()
    assert find_files(tmp_path, "train") == [tmp_path / "some.parquet"], "pictures of a readme, say"
    (tmp_path / "images" / "a.txt").write_text("x")
    with pytest.raises(
        BadInput, match=r"holds pictures with captions, and tables too, such as some\.parquet; set data\.path"
    ):
        find_files(tmp_path, "train")


def test_a_folder_that_is_called_like_a_file_is_a_folder(tmp_path):
    folder = tmp_path / "set.csv"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    (folder / "a.txt").write_text("x")
    assert find_files(folder, "train") == [folder]
    (block,) = blocks_of(folder)
    assert block.format == "folder" and block.count == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered_is_told(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    with pytest.raises(BadInput, match=r"closed: cannot be read: Permission denied"):
        find_files(folder, "train")


def test_a_folder_with_one_list_and_no_captions_is_that_list(tmp_path):
    """As task folders have it: pictures beside the lines that name them."""
    write_jsonl(tmp_path, 3).rename(tmp_path / "rows.jsonl")
    assert find_files(tmp_path, "train") == [tmp_path / "rows.jsonl"]
    (tmp_path / "more.csv").write_text("target,prompt\n")
    with pytest.raises(
        BadInput, match=r"holds more\.csv, rows\.jsonl, of which one is meant; set data\.path to that file"
    ):
        find_files(tmp_path, "train")
