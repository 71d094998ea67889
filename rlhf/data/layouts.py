"""Folders of pictures that are a data set: what belongs together has one stem.

    training_images/  a.png  a.txt  a_mask.png   b.png  b.txt    targets, captions, masks
    control_images/   a.jpg  a_control_1.jpg     b.jpg           what is edited, in this order

Masks and captions may lie in either folder. A folder that holds pictures and captions itself has no control pictures. Every file
in them is part of an example or a problem, but for those whose names begin with a dot; beside the two folders, pictures, captions
and other folders are problems. Names as in the public trainers of edit models, in any case.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unicodedata import normalize

from rlhf.data.records import BadInput, Problem, Record, whole

TARGETS = ("training_images", "images", "target_images", "target", "targets")
CONTROLS = ("control_images", "control", "condition_images", "controls")
PICTURES, CAPTION = (".png", ".jpg", ".jpeg", ".webp"), ".txt"
IGNORED = ("Thumbs.db", "desktop.ini")
"""What Windows puts into folders."""
NUMBERED = re.compile(r"(.+)_control_(\d+)")
MASK = "_mask"


@dataclass
class Files:
    """What was found under one stem."""

    targets: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    controls: dict[int, list[Path]] = field(default_factory=dict)
    """By number; 0: the one without."""
    masks: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Files that are none of these, and folders: told, and no fault of the example."""


def is_layout(folder: Path) -> bool:
    """Whether a folder has a folder of targets or control pictures, or pictures itself."""
    return bool(_named(folder, (*TARGETS, *CONTROLS))) or any(map(_is_picture, folder.iterdir()))


def has_captions(folder: Path) -> bool:
    """Whether a folder of targets in it holds captions: it is a data set, whatever else is there."""
    return any(file.suffix.lower() == CAPTION for targets in _named(folder, TARGETS) for file in targets.iterdir())


def count(folder: Path) -> int:
    """How many stems there are. Raises: BadInput where it is not clear which folders are meant, or no picture has a caption."""
    found = _found(folder)
    if found and not any(files.captions for files in found.values()):
        what = f"holds pictures, but no caption: {next(iter(found))}{CAPTION} is the first that is missing"
        remedy = "write one beside every target; or, where a file beside the folder lists the pictures, give that file"
        raise BadInput([whole(folder, what, remedy)])
    return len(found)


def rows(folder: Path, first: int, last: int) -> Iterator[Record | Problem]:
    """The examples number `first` (from 1) to `last`, by stems in order: image_id, prompt, target, source, mask, with paths from
    `folder`. What an example lacks is absent, not empty.
    """
    for number, (stem, files) in enumerate(list(_found(folder).items())[first - 1 : last], start=first):
        yield from map(_not_read, files.others)
        problems = list(_problems(folder, stem, files))
        if problems or not files.targets:
            yield from problems
            continue
        target = files.targets[0]
        fields: dict[str, object] = {"image_id": stem, "target": _from(folder, target)}
        if files.captions:
            text = _text(files.captions[0])
            if isinstance(text, Problem):
                yield text
                continue
            fields["prompt"] = text
        if files.controls:
            fields["source"] = [_from(folder, files.controls[index][0]) for index in sorted(files.controls)]
        if files.masks:
            fields["mask"] = _from(folder, files.masks[0])
        yield Record(file=str(target), number=number, fields=fields, is_file=True)


def _problem(file: Path, what: str, remedy: str) -> Problem:
    return Problem(file=str(file), line=0, field=None, what=what, remedy=remedy)


def _not_read(file: Path) -> Problem:
    if file.is_symlink() and not file.exists():
        return _problem(file, "is a link to nothing", "mend or remove it")
    if file.is_dir():
        return _problem(file, "is a folder that is not read", "move its files to where the others are, or move it away")
    if _is_picture(file) or file.suffix.lower() == CAPTION:
        return _problem(file, "lies beside the folders of pictures, where nothing is read", "move it into one, or away")
    endings = ", ".join((*PICTURES, CAPTION))
    return _problem(file, f"is none of {endings}", "save it as one of them, or move it away")


def _problems(folder: Path, stem: str, files: Files) -> Iterator[Problem]:
    targets, controls = _folders(folder)
    if not files.targets:
        for what, found in (
            ("control picture", [file for some in files.controls.values() for file in some]),
            ("caption", files.captions),
            ("mask", files.masks),
        ):
            for file in found:
                remedy = f"add {stem}.png there, or move this file away"
                yield _problem(file, f"is a {what} without a target: {targets} holds no picture {stem}", remedy)
        return
    for several in (files.targets, files.captions, files.masks, *files.controls.values()):
        if len(several) > 1:
            others = ", ".join(_from(folder, file) for file in several[1:])
            yield _problem(several[0], f"has the same place as {others}", "keep one of them")
    numbers = sorted(files.controls)
    if controls and not numbers:
        what = f"has no control picture: {controls} holds no picture {stem}"
        yield _problem(files.targets[0], what, "add it there, or move this file away")
    elif missing := sorted(set(range(1, numbers[-1] if numbers else 0)) - set(numbers))[:1]:
        what = f"has control pictures up to number {numbers[-1]}, but none with number {missing[0]}"
        yield _problem(files.targets[0], what, f"add {stem}_control_{missing[0]}, or number the others without a gap")


def _folders(folder: Path) -> tuple[Path, Path | None]:
    """Of targets and of control pictures. Raises: BadInput where several folders may be meant."""
    chosen: list[Path | None] = []
    for names in (TARGETS, CONTROLS):
        there = _named(folder, names)
        if len(there) > 1:
            what = f"holds {' and '.join(found.name for found in there)}, of which one is meant"
            raise BadInput([whole(folder, what, "rename or move away the others")])
        chosen.append(there[0] if there else None)
    targets, controls = chosen
    if controls and not targets:
        what = f"has {controls.name}, but none of the folders {', '.join(TARGETS)}"
        raise BadInput([whole(folder, what, f"put the targets and captions into {folder / TARGETS[0]}")])
    return targets or folder, controls


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.name.lower() in names and child.is_dir())


def _found(folder: Path) -> dict[str, Files]:
    """Everything in the two folders by stem, sorted."""
    targets, controls = _folders(folder)
    return _grouped(folder, targets, controls, *(one.stat().st_mtime_ns for one in (folder, targets, controls) if one))


@lru_cache(maxsize=4)
def _grouped(folder: Path, target_folder: Path, control_folder: Path | None, *changed: int) -> dict[str, Files]:
    """Kept, since every block of a folder asks. changed: when files were last added or removed."""
    beside, controls = _listed(target_folder), _listed(control_folder) if control_folder else []
    pictures = {_stem(file) for file in beside if _is_picture(file)}
    stems = {stem for stem in pictures if not (stem.endswith(MASK) and stem.removesuffix(MASK) in pictures)}
    found: dict[str, Files] = {}
    for file in (*beside, *controls):
        stem, is_control = _stem(file), file.parent == control_folder
        numbered = NUMBERED.fullmatch(stem) if is_control and stem not in stems else None
        if file.suffix.lower() == CAPTION and file.is_file():
            found.setdefault(stem, Files()).captions.append(file)
        elif not _is_picture(file):
            found.setdefault(stem, Files()).others.append(file)
        elif stem not in stems and stem.endswith(MASK):
            found.setdefault(stem.removesuffix(MASK), Files()).masks.append(file)
        elif numbered:
            found.setdefault(numbered[1], Files()).controls.setdefault(int(numbered[2]), []).append(file)
        elif is_control:
            found.setdefault(stem, Files()).controls.setdefault(0, []).append(file)
        else:
            found.setdefault(stem, Files()).targets.append(file)
    if target_folder != folder:
        for file in _listed(folder):
            if file not in (target_folder, control_folder) and (
                file.is_dir() or file.suffix.lower() in (*PICTURES, CAPTION)
            ):
                found.setdefault(_stem(file), Files()).others.append(file)
    return dict(sorted(found.items()))


def _stem(file: Path) -> str:
    """é may be one character, or an e and its accent: which one depends on the system that wrote the name."""
    return normalize("NFC", file.stem)


def _listed(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not f.name.startswith(".") and f.name not in IGNORED)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES and file.is_file()


def _from(folder: Path, file: Path) -> str:
    return str(file.relative_to(folder))


def _text(file: Path) -> str | Problem:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return _problem(file, f"is not UTF-8 ({error.reason})", "save the file as UTF-8")
    except OSError as error:
        return _problem(file, f"cannot be read: {error.strerror}", "give a readable file")
