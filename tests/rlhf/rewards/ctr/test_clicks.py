"""The click log: good rows come out exact, and all bad rows are found at once."""

import numpy as np
import pytest

from rlhf.data.media import encode_png
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.rewards.ctr.clicks import read_clicks, split
from rlhf.rewards.ctr.model import Product

HEADER = "image_url,food_name,food_type,city_name,shop_name,pv_ctr"


@pytest.fixture
def write(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def write(*lines, header=HEADER, bom=""):
        path = tmp_path / "clicks.csv"
        path.write_text(bom + "\n".join([header, *lines]) + "\n", encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_with_and_without_counts(write, bom):
    clicks, left_out = read_clicks(write("a.png,红烧肉,快餐,上海,老王,0.05", bom=bom))
    assert clicks[0].item == Product(food_name="红烧肉", food_type="快餐", city_name="上海", shop_name="老王")
    assert clicks[0].rate == 0.05 and clicks[0].impressions is None and not left_out
    counted = write("a.png,a,b,c,d,0.5,200,51", header=HEADER + ",impressions,clicks")
    assert read_clicks(counted)[0][0].rate == 51 / 200 and read_clicks(counted)[0][0].impressions == 200


BAD = {
    "missing.png,a,b,c,d,0.1": "does not exist",
    "broken.png,a,b,c,d,0.1": "is unreadable",
    "../a.png,a,b,c,d,0.1": "outside",
    "http://x/a.png,a,b,c,d,0.1": "is a URL",
    ",a,b,c,d,0.1": "is empty",
    "a\0.png,a,b,c,d,0.1": "cannot be read: embedded null byte",
    f"{'x' * 300}.png,a,b,c,d,0.1": "cannot be read: [Errno 36] File name too long",
    ".,a,b,c,d,0.1": "is no file",
    "a.png,a,b,c,d,5.2": "percentage",
    "a.png,a,b,c,d,nan": "finite number",
    "a.png,a,b,c,d,many": "finite number",
    "a.png,a,b,c": "has 4 fields, the header 6",
    "a.png,a,b,c,d,0.1,extra": "has 7 fields, the header 6",
}


def test_all_bad_rows_are_reported_at_once(write):
    with pytest.raises(BadInput) as caught:
        read_clicks(write("a.png,a,b,c,d,0.1", *BAD))
    assert len(caught.value.problems) == len(BAD)
    for line, (problem, expected) in enumerate(zip(caught.value.problems, BAD.values(), strict=True), start=3):
        assert problem.line == line and expected in str(problem)


def test_skip_goes_on_and_says_what_it_left_out(write):
    clicks, left_out = read_clicks(write(*BAD, "a.png,a,b,c,d,0.1"), "skip")
    assert len(clicks) == 1 and len(left_out) == len(BAD)
    with pytest.raises(BadInput):
        read_clicks(write(*BAD), "skip")  # nothing left to go on with


@pytest.mark.parametrize("counts", ["0,0", "10,11", "10.5,1", "10,-1", "x,1"])
def test_impossible_counts(write, counts):
    with pytest.raises(BadInput):
        read_clicks(write(f"a.png,a,b,c,d,0.1,{counts}", header=HEADER + ",impressions,clicks"))


def test_the_file_as_a_whole(write, tmp_path):
    with pytest.raises(BadInput, match="no rows"):
        read_clicks(write(), "skip")
    with pytest.raises(BadInput, match="no column food_type"):
        read_clicks(write(header="image_url,food_name"), "skip")
    with pytest.raises(BadInput, match=r"no such file; set data\.path"):
        read_clicks(tmp_path / "none.csv", "skip")


def test_split_holds_out_whole_products(write):
    rows = [f"a.png,food{i % 40},t,c,s,0.1" for i in range(200)]
    clicks, _ = read_clicks(write(*rows))
    train, held_out = split(clicks, 0.25, 1, "data.eval_fraction")
    assert len(train) == 150 and len(held_out) == 50, "a quarter of the products, five rows each"
    assert not {click.item for click in train} & {click.item for click in held_out}
    assert split(clicks, 0.25, 1, "x")[1] == held_out != split(clicks, 0.25, 2, "x")[1]
    assert split(clicks[::-1], 0.25, 1, "x")[1] == held_out[::-1], "the order of the rows decides nothing"


def test_split_leaves_both_sides_a_product(write):
    clicks, _ = read_clicks(write("a.png,food0,t,c,s,0.1", "a.png,food1,t,c,s,0.1", "a.png,food1,t,c,s,0.2"))
    for fraction in (0.001, 0.5, 0.999):
        train, held_out = split(clicks, fraction, 0, "x")
        assert len({click.item for click in train}) == len({click.item for click in held_out}) == 1
    with pytest.raises(
        Refused, match=r"data\.validation_fraction = 0\.1 takes whole products .* there are 1 to take from"
    ):
        split(clicks[:1], 0.1, 0, "data.validation_fraction")
