"""What is told of instructions that encoders do not read whole."""

from rlhf.data.instructions import LONGEST, SHOWN, unread, unread_report
from rlhf.types import Encoded, Geometry, Prompt


def prompt(key, text):
    return Prompt(key=key, instruction=text, geometry=Geometry(height=8, width=8))


def row(unknown=None, cut=None):
    return Encoded(tensors={}, unknown=unknown, cut=cut)


def test_the_largest_share_of_all_that_is_encoded_counts_and_pictures_have_none():
    assert unread(prompt("a", "x"), [row(0.0, 0.25), row(0.5, 0.0), row()]) == {("a", "x"): (0.5, 0.25)}
    assert unread(prompt("a", "x"), [row(0.0, 0.0), row()]) == {} == unread(prompt("a", "x"), [])


def test_nothing_is_told_of_what_is_read():
    assert unread_report({}, 5) == []
    assert unread_report({("a", "x"): (0.09, 0.0)}, 5) == []  # a word or two, as before


def test_an_instruction_of_several_prompts_is_told_once_with_the_first_and_the_worst_first():
    found = {("a", "half"): (0.0, 0.5), ("b", "more"): (0.0, 0.75), ("c", "half"): (0.0, 0.5)}
    (told,) = unread_report(found, 7)
    head, *lines = told.splitlines()
    assert "2 instructions (3 of 7 prompts)" in head and head.startswith(
        "WARNING: the text encoder cuts off the end of"
    )
    assert lines == ["   75% cut off: more (prompt 'b')", "   50% cut off: half (prompt 'a')"]


def test_a_long_list_and_a_long_text_are_shortened():
    found = {(str(i), f"{i:03d} " + "word " * 200): (0.0, 0.5) for i in range(SHOWN + 3)}
    (told,) = unread_report(found, 100)
    head, *lines = told.splitlines()
    assert f"{SHOWN + 3} instructions" in head and len(lines) == SHOWN + 1 and lines[-1] == "  and 3 more"
    assert all(len(line) < LONGEST + 50 and "…" in line for line in lines[:-1])
