"""Which files of a data set are read: a file, or those of a folder as `datasets` or the hub lays it out, by split."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.data import layouts
from rlhf.data.records import BadInput, whole

TABLES = (".parquet", ".arrow")
"""What is looked for in a folder."""
LISTS = (".jsonl", ".csv")
STATE = "state.json"
SAVE = "save the data set anew with save_to_disk"
NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
SPLIT_NAME = re.compile(r"((?:train|validation|valid|val|dev|test)(?:_[a-z]+)*)[-_.]?\d*")


def find_files(
    path: Path, split: str, key: str = "data.path", endings: Sequence[str] = (*TABLES, ".jsonl", ".csv")
) -> list[Path]:
    """The files of a file or folder, sorted; a folder of pictures (`layouts`) itself; of a folder with one JSONL or CSV and no
    captions, that. In a folder whose files name splits, those of `split`.

    `endings`: those that a single file may have. Raises: BadInput.
    """
    kinds = f"{', '.join(endings[:-1])} or {endings[-1]}"
    remedy = (
        f"set {key} to a {kinds} file, to a folder of {' or '.join(TABLES)} files, or to one that holds {layouts.TARGETS[0]}/ "
        f"with pictures and captions, and {layouts.CONTROLS[0]}/"
    )
    if path.is_file():
        if path.suffix not in endings:
            raise BadInput([whole(path, f"is a {path.suffix or 'nameless'} file", remedy)])
        return [path]
    if not path.is_dir():
        raise BadInput([whole(path, "no such file or folder", remedy)])
    try:
        files, is_layout, has_captions = _listed(path), layouts.is_layout(path), layouts.has_captions(path)
    except OSError as error:
        raise BadInput([whole(path, f"cannot be read: {error.strerror} ({error.filename})", remedy)]) from error
    if files and has_captions:
        what = f"holds pictures with captions, and tables too, such as {files[0].relative_to(path)}"
        raise BadInput([whole(path, what, f"set {key} to the table that is meant, or move the tables away")])
    lists = sorted(file for file in path.iterdir() if file.suffix in LISTS and file.suffix in endings)
    if lists and not files and not has_captions:
        if len(lists) > 1:
            names = ", ".join(file.name for file in lists)
            raise BadInput([whole(path, f"holds {names}, of which one is meant", f"set {key} to that file")])
        return lists
    if not files and is_layout:
        return [path]
    if not files:
        raise BadInput([whole(path, f"holds no {' or '.join(TABLES)} file and no pictures", remedy)])
    named = {file: _split_of(file.relative_to(path)) for file in files}
    splits = sorted({name for name in named.values() if name})
    if not splits:
        _refuse_gaps(files)
        return files
    chosen = [file for file, name in named.items() if name == split]
    setting = key.replace("path", "split")
    if not chosen:
        what = f"has the splits {', '.join(splits)}, but {setting} = {split!r}"
        raise BadInput([whole(path, what, f"set {setting} to one of them")])
    if unnamed := [file for file, name in named.items() if name is None]:
        what = f"lies beside files of the splits {', '.join(splits)}, but its name says none"
        raise BadInput([whole(file, what, f"move it away, or name it {split}-1.parquet") for file in unnamed])
    _refuse_gaps(chosen)
    return chosen


def _refuse_gaps(files: Sequence[Path]) -> None:
    """Raise BadInput where files say that there are more of them: NAME-00000-of-00002.parquet alone."""
    found: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if numbered := NUMBERED.fullmatch(file.stem):
            found.setdefault((file.parent, numbered[1], int(numbered[3])), set()).add(int(numbered[2]))
    for (folder, name, count), numbers in found.items():
        if absent := sorted(set(range(count)) - numbers):
            what = f"holds {len(numbers)} of {count} files {name}-…-of-{count:05d}; the first that is missing is {absent[0]:05d}"
            remedy = "download the others, or, where a part is meant, give its files names without -of-"
            raise BadInput([whole(folder, what, remedy)])


def _visible(path: Path, pattern: str) -> list[Path]:
    """Files below a folder, sorted, without those of hidden folders."""
    found = sorted(path.rglob(pattern))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _listed(path: Path) -> list[Path]:
    """The tables of a folder; where `datasets.save_to_disk` wrote one, those that it lists. Raises: BadInput.

    `dataset_dict.json` names the folders of splits, `state.json` the files of one; old ones and caches may lie beside them.
    """
    tables = sorted(file for suffix in TABLES for file in _visible(path, f"*{suffix}"))
    for file in _visible(path, "dataset_dict.json"):
        splits = _names(file, lambda content: content["splits"])
        if absent := [split for split in splits if not (file.parent / split / STATE).is_file()]:
            what = f"names the split {absent[0]!r}, but {absent[0]}/{STATE} is missing"
            raise BadInput([whole(file, what, f"copy it there, or {SAVE}")])
        others = [table for table in tables if not table.is_relative_to(file.parent)]
        tables = sorted(others + [table for split in splits for table in (file.parent / split).glob("*.arrow")])
    for file in _visible(path, STATE):
        names = _names(file, lambda content: [entry["filename"] for entry in content["_data_files"]])
        if absent := [name for name in names if not (file.parent / name).is_file()]:
            raise BadInput([whole(file, f"names {', '.join(absent)}, which is missing", f"copy it there, or {SAVE}")])
        if _names(file, lambda content: content.get("_indices_data_files") or []):
            what = "says that only some rows of its files, or in another order, are the data set"
            raise BadInput([whole(file, what, f"call flatten_indices() and {SAVE}")])
        listed = {file.parent / name for name in names}
        tables = [table for table in tables if table.parent != file.parent or table in listed]
    caches = [file for file in tables if file.name.startswith("cache-") and not (file.parent / STATE).is_file()]
    if caches:
        what = (
            f"is what `datasets` keeps of a map or filter, and no {STATE} beside it says which files are the data set"
        )
        raise BadInput([whole(file, what, "move it away") for file in caches])
    return tables


def _names(file: Path, chosen: Callable[[Any], list[str]]) -> list[str]:
    """The names in a JSON file of `datasets`. Raises: BadInput."""
    try:
        return [str(name) for name in chosen(json.loads(file.read_bytes()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"is not what save_to_disk writes ({type(error).__name__}: {error})"
        raise BadInput([whole(file, what, SAVE)]) from error


def _split_of(file: Path) -> str | None:
    """The split that a file's path inside the folder names; None: none. Of each of these it is `train`:

    data/train-00000-of-00012.parquet, with or without a hash behind it, train.parquet and train_1.parquet, as the hub reads
    them; default/train/0000.parquet, as it converts them; train/data-00000-of-00001.arrow, as `save_to_disk` writes them.
    """
    numbered = NUMBERED.fullmatch(file.stem)
    if numbered and numbered[1] != "data":
        return numbered[1]
    for name in (file.stem, *(folder.name for folder in file.parents)):
        if found := SPLIT_NAME.fullmatch(name):
            return found[1]
    return file.parent.name if numbered and file.parent.name else None
