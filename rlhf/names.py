"""Names that users choose (an image_id, a run's name) as names of files and of what takes ASCII only.

What can be kept is kept; whatever had to change gets a hash of the whole name, so that two names never become one.
Left out: the names that Windows reserves, such as CON.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import xxhash

LONGEST = 180
"""Bytes of a kept name. A file system takes 255; the rest is for the hash, the ending and a partial file's own ending."""
LONGEST_PLAIN = 60
"""Letters of a plain one: Ray makes file names of several."""
_HASHED = re.compile(r"-[0-9a-f]{16}", re.IGNORECASE)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Each of `names` → what a file or folder may be called for it, without an ending: one part of a path, never hidden.

    No two are alike, also where capital and small letters, or the Unicode forms of a letter, are taken as one.
    """
    safe = {name: _safe(name) for name in names}
    alike = Counter(kept.casefold() for kept in safe.values())
    return {name: _marked(name, kept, alike[kept.casefold()] > 1) for name, kept in safe.items()}


def name_fault(name: str) -> str | None:
    """What keeps a name from being that of a folder, and what to do; None: nothing does."""
    if file_names([name])[name] == name:
        return None
    return (
        f"cannot name a folder: use letters of any script, digits, '_', '-' and '.', at most {LONGEST} bytes; no '/' or '\\', "
        "no blank, '.' or '-' at its beginning, no '..'"
    )


def plain(name: str) -> str:
    """`name` in ASCII letters, digits, '.', '_' and '-', for Ray Serve: a name in other letters never comes up there."""
    return _marked(name, re.sub(r"[^A-Za-z0-9._-]", "_", name)[:LONGEST_PLAIN])


def _safe(name: str) -> str:
    # Of Unicode's categories, C is control characters, surrogates and what turns the direction of text.
    kept = (
        "_" if one in "/\\\u2028\u2029" or unicodedata.category(one)[0] == "C" else one
        for one in unicodedata.normalize("NFC", name)
    )
    return re.sub(r"\.\.+|^[.-]", "_", "".join(kept).encode()[:LONGEST].decode(errors="ignore").strip())


def _marked(name: str, kept: str, always: bool = False) -> str:
    if kept == name and name and not always and not _HASHED.fullmatch(name[-17:]):
        return name
    return f"{kept}-{xxhash.xxh3_64_hexdigest(name.encode(errors='surrogatepass'))}"
