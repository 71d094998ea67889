"""What `jobs.check_data` says of a folder, of pairs, of a run's record, and of what is wrong."""

import json
import sys

import pytest

from jobs.check_data import check_data, main
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.tables import BucketsTable
from tests.rlhf.data.pair_tables import png, row, write_parquet


def said(capsys, path, split="train"):
    check_data(path, split)
    return capsys.readouterr().out.splitlines()


def write(folder):
    """Three targets: one of two control pictures, one with a mask; one is wider."""
    folder.mkdir()
    for name in ("training_images", "control_images"):
        (folder / name).mkdir()
    for number, stem in enumerate("abc"):
        size = (24, 48) if stem == "c" else (24, 32)
        (folder / f"training_images/{stem}.png").write_bytes(png(number, *size))
        (folder / f"training_images/{stem}.txt").write_text("one" if stem == "a" else "another")
        (folder / f"control_images/{stem}.png").write_bytes(png(number + 10, *size))
    (folder / "control_images/a_control_1.png").write_bytes(png(20, 16, 16))
    (folder / "training_images/b_mask.png").write_bytes(png(21))
    return folder


def test_a_folder_is_described(tmp_path, capsys):
    assert said(capsys, write(tmp_path / "set")) == [
        "checking 3 rows in 1 blocks",
        "0 pairs of a winner and a loser, 3 targets",
        "captions: 2 different, up to 7 characters",
        "control pictures of an example: 1 (2), 2 (1)",
        "masks: 1",
        "sizes (height × width): 24 × 32 (2), 24 × 48 (1)",
        "sizes of control pictures: 24 × 32 (2), 16 × 16 (1), 24 × 48 (1)",
    ]


def test_buckets_are_told_for_an_area(tmp_path, capsys):
    check_data(write(tmp_path / "set"), "train", BucketsTable(areas=(512**2,)))
    assert "buckets: 448 × 576 (2), 320 × 704 (1)" in capsys.readouterr().out


def test_pairs_and_ties_are_counted(tmp_path, capsys):
    file = write_parquet(tmp_path / "pairs.parquet", [row(0), row(1, label=0.5), row(2, label=0.0)])
    lines = said(capsys, file)
    assert lines[1:3] == [
        "2 pairs of a winner and a loser, 0 targets",
        "1 rows that prefer neither picture, which are left out",
    ]


def test_what_is_right_is_described_and_what_is_wrong_is_told(tmp_path, capsys):
    folder = write(tmp_path / "set")
    (folder / "training_images/b.png").write_bytes(png(0)[:100])
    (folder / "control_images/d.png").write_bytes(png(0))
    with pytest.raises(BadInput) as told:
        check_data(folder, "train")
    assert "0 pairs of a winner and a loser, 2 targets" in capsys.readouterr().out
    broken, orphan = str(told.value).splitlines()[1:]
    assert "training_images/b.png: target: 'training_images/b.png' is unreadable" in broken
    assert "control_images/d.png: is a control picture without a target" in orphan and "on_bad_row" not in orphan


def test_nothing_there_is_refused(tmp_path):
    for name in ("rows.jsonl", "none.jsonl"):
        if name == "rows.jsonl":
            (tmp_path / name).write_text("\n")
        with pytest.raises(BadInput, match=r"holds no example|no such file"):
            check_data(tmp_path / name, "train")


def test_the_bounds_of_buckets_are_arguments(tmp_path, monkeypatch, capsys):
    argv = ["check_data", str(write(tmp_path / "set")), "--area", "1024", "--step", "16"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(
        Refused, match="--area 1024 --step 16 --min_side 256 --max_side 2048: areas holds 1024, whose square"
    ):
        main()
    monkeypatch.setattr(sys, "argv", [*argv, "--min_side", "16", "--max_side", "64"])
    main()
    assert "buckets: 32 × 32 (2), 16 × 48 (1)" in capsys.readouterr().out


def test_urls_are_listed_once_in_their_order_for_the_user_to_download(tmp_path, monkeypatch, capsys):
    rows = (
        {
            "source_image": ["https://a/1.png", "2.png"],
            "target_image": "https://a/3.png",
            "instruction": "see http: //",
        },
        {"source_image": None, "target_image": "https://a/1.png", "instruction": "x", "more": "s3://b/4.png"},
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["check_data", str(tmp_path / "rows.jsonl"), "--urls"])
    main()
    assert capsys.readouterr().out.split() == ["https://a/1.png", "https://a/3.png", "s3://b/4.png"]
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(BadInput, match=r"rows\.jsonl:1: "):
        main()
