"""Contact sheets: every character of a caption can be read, and no line is cut."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rlhf.runs import sheets
from rlhf.runs.sheets import LINE, MARGIN, contact_sheet, wrapped

TEXTS = {
    "Latin": "Make it warm — p=0.93 × 2 → −0.5…",
    "Chinese": "让这道菜更亮，红烧肉「产品」",
    "Japanese": "もっと明るく カタカナ",
    "Korean": "더 밝게",
    "Cyrillic": "Сделай теплее",
}


def drawn(text: str) -> np.ndarray:
    picture = Image.new("L", (40, 24), 255)
    ImageDraw.Draw(picture).text((2, 2), text, fill=0, font=sheets._font())
    return np.asarray(picture)


@pytest.mark.parametrize("script", TEXTS)
def test_every_character_has_a_shape_of_its_own(script):
    """An unknown one would be drawn as the font's empty box, which all unknown ones share."""
    box = drawn("\U0010fffd")
    for character in set(TEXTS[script]) - {" "}:
        assert not np.array_equal(drawn(character), box), character


@pytest.mark.parametrize("script", TEXTS)
def test_lines_fit_and_nothing_is_lost(script):
    text = " ".join([TEXTS[script]] * 5)
    for width in (60, 100, 250):
        lines = [*wrapped(text, width)]
        assert all(sheets._font().getlength(line) <= width for line in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())


def test_words_stay_whole_where_they_fit_and_a_long_one_is_cut():
    room = sheets._font().getlength("warm warm")
    assert [*wrapped("warm warm", room)] == ["warm warm"]
    assert [*wrapped("warm warm light", room)] == ["warm warm", "light"]
    assert [*wrapped("first\n\nlast", room)] == ["first", "", "last"]
    assert "".join(wrapped("x" * 50, 60)) == "x" * 50


def test_a_row_is_as_high_as_its_longest_caption():
    picture = np.zeros((96, 64, 3), np.uint8)
    short, long = (picture, "a"), (picture, "a\nb\nc")
    one, three = contact_sheet([[short]]), contact_sheet([[short, long], [short]])
    assert one.height == 192 + LINE + 3 * MARGIN and three.height == 2 * 192 + 4 * LINE + 5 * MARGIN
    assert (one.width, three.width) == (128 + 2 * MARGIN, 2 * 128 + 3 * MARGIN)
    assert np.asarray(three)[MARGIN, MARGIN].tolist() == [0, 0, 0]
