"""Names that users choose: kept where they can be, and otherwise safe, readable and never one for two."""

import unicodedata

import pytest

from rlhf.names import file_names, name_fault, plain

KEPT = ["10001", "a", "IMG_1234 (2).jpg", "红烧肉", "नमस्ते", "🍎", "a:b?", "50% off", "-".join("abc"), "汉" * 60]
CHANGED = {
    "shop7/10001": "shop7_10001-",
    "a\\b": "a_b-",
    "../../x": "_",
    "..": "_-",
    ".hidden": "_hidden-",
    "-rf": "_rf-",
    "/etc/passwd": "_etc_passwd-",
    "a\0b\n": "a_b_-",
    " x ": "x-",
    "": "-",
    "汉" * 61: "汉汉",
    "x" * 5000: "xxx",
    "\u202egnp.exe": "_gnp.exe-",
    "e\u0301": "é-",
    "\ud800": "_-",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_can_name_a_file_is_kept(name):
    assert file_names([name]) == {name: name} and name_fault(name) is None


@pytest.mark.parametrize("name", CHANGED)
def test_all_else_is_made_safe_and_stays_readable(name):
    found = file_names([name])[name]
    assert found.startswith(CHANGED[name]) and len(f".{found}_99999.png.{'0' * 32}".encode()) <= 255
    assert not set(found) & {"/", "\\"} and ".." not in found and not found.startswith(".")
    assert not any(unicodedata.category(one)[0] == "C" for one in found)
    assert "cannot name a folder" in name_fault(name)


def test_two_names_are_never_one_file_on_any_system():
    ids = [
        *KEPT,
        *CHANGED,
        "shop7_10001",
        "shop7\\10001",
        "SHOP7/10001",
        "A",
        "é",
        "É",
        "x" * 5001,
        "straße",
        "STRASSE",
    ]
    ids += ["İ", "i̇"]
    found = file_names(ids)
    assert list(found) == ids
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in found.values()}) == len(ids)


def test_a_name_that_looks_like_one_with_a_hash_gets_another():
    hashed = file_names(["shop7/10001"])["shop7/10001"]
    for name in (hashed, hashed.upper()):
        assert file_names(["shop7/10001", name])[name].casefold() != hashed.casefold() != plain(name).casefold()


def test_plain_names_are_ascii_short_and_never_one():
    assert plain("online_dpo-v0-1a2b3c") == "online_dpo-v0-1a2b3c"
    names = ["产品", "产", "a b", "a_b", "x" * 100, "x" * 101, ""]
    found = [plain(name) for name in names]
    assert len(set(found)) == len(names) and all(name.isascii() and len(name) <= 77 for name in found)
