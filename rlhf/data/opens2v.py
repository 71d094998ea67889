"""OpenS2V's annotations of videos: which subjects a clip has, and pictures of them cut out of one of its frames.

A part of the data set is one JSON object, of hundreds of megabytes, with an entry for each clip:

    KEY: {"metadata": {"path", "face_cut": [first, end], "crop": [left, right, top, bottom], "face_cap_qwen": caption, …},
          "word_tags": {"background": [words], …},
          "annotation": {"ann_frame_data": {"ann_frame_idx", "annotations": [{"aes_score", …}, …]},
                         "mask_map": {"1": {"class_name"}, …},
                         "mask_annotation": {ann_frame_idx: {"1": {"size": [H, W], "counts": …}, …}}}}

as its data_process/ in OpenS2V-Nexus writes it. Frames are numbered in the whole video, masks lie in the crop and are COCO's
run lengths; the annotation of mask "1" is the first of the list. Left out: boxes, all scores but the aesthetic one.

Shapes: H W pixels of the crop.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import numpy as np

from rlhf.data.records import BadInput, whole

WHITE = 255
SAME = 0.5
"""Of two masks: the share of both together that is in both, above which they show one subject."""


class Unusable(Exception):
    """Why a clip, or a subject of it, cannot be used; a remedy follows after "; "."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One mask of a clip."""

    number: str
    """Its key in the annotation."""
    name: str
    score: float
    """Aesthetic."""
    counts: str
    size: tuple[int, int]
    """(H, W)."""


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """A clip and its subjects."""

    key: str
    path: str
    caption: str
    first: int
    end: int
    """Without it."""
    box: tuple[int, int, int, int]
    frame: int
    """That the masks are of."""
    subjects: tuple[Subject, ...]
    """In their order, without those whose words are in a tag of the clip's background."""


def entries(file: Path) -> Iterator[tuple[str, Any]]:
    """(key, entry) of a part, one at a time. Raises: BadInput for a file that is no such JSON, OSError."""
    try:
        with open(file, "rb") as stream:
            yield from ijson.kvitems(stream, "", use_float=True)
    except ijson.JSONError as error:
        what = f"is no JSON object of clips: {' '.join(str(error).split())}"
        raise BadInput([whole(file, what, "give a part's merged JSON")]) from error


def annotated(key: str, entry: Any) -> Annotated:
    """What an entry says. Raises Unusable."""
    about, notes = _at(entry, "metadata"), _at(entry, "annotation")
    data = _at(notes, "ann_frame_data")
    frame, scores = _at(data, "ann_frame_idx"), _at(data, "annotations")
    if not isinstance(scores, list):
        raise Unusable("annotation.ann_frame_data.annotations is no list; leave the clip out")
    first, end = _numbers(about, "face_cut", 2)
    left, right, top, bottom = _numbers(about, "crop", 4)
    caption = _at(about, "face_cap_qwen")
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("metadata.face_cap_qwen is no caption; leave the clip out")
    frames = _at(notes, "mask_annotation")
    masks = frames.get(str(frame)) if isinstance(frames, Mapping) else None
    if not isinstance(masks, Mapping) or not masks:
        raise Unusable(f"annotation.mask_annotation has no masks of frame {frame}; leave the clip out")
    background = _at(entry["word_tags"], "background") if entry.get("word_tags") else ()
    subjects = []
    for number, mask in masks.items():
        name = str(_at(_at(_at(notes, "mask_map"), number), "class_name"))
        if not number.isdecimal() or not 1 <= int(number) <= len(scores):
            raise Unusable(f"annotation.ann_frame_data.annotations lacks that of mask {number}; leave the clip out")
        score = _at(scores[int(number) - 1], "aes_score")
        if not isinstance(score, int | float):
            raise Unusable(f"aes_score = {score!r} of mask {number} is no number; leave the clip out")
        if not any(f" {name} " in f" {tag} " for tag in background):
            size, counts = _numbers(mask, "size", 2), str(_at(mask, "counts"))
            subjects.append(
                Subject(number=number, name=name, score=float(score), counts=counts, size=(size[0], size[1]))
            )
    return Annotated(
        key=key,
        path=str(_at(about, "path")),
        caption=caption,
        first=first,
        end=end,
        box=(left, right, top, bottom),
        frame=int(frame),
        subjects=tuple(subjects),
    )


def _at(found: Any, name: str) -> Any:
    if not isinstance(found, Mapping) or name not in found:
        raise Unusable(f"the entry lacks {name!r}; leave the clip out")
    return found[name]


def _numbers(found: Any, name: str, count: int) -> Sequence[int]:
    values = _at(found, name)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(value, int) for value in values):
        raise Unusable(f"{name} = {values!r} is not {count} whole numbers; leave the clip out")
    return values


def mask_of(subject: Subject) -> np.ndarray:
    """bool (H, W) of COCO's compressed run lengths: runs of 0 and 1 in turn, down the columns. Raises Unusable.

    A number is in digits of 5 bits, the lowest first, each a character from "0" on with 32 where another follows; from the fourth
    on it is a difference to the number two before (cocodataset/cocoapi, maskApi.c).
    """
    runs, place, height, width = list[int](), 0, *subject.size
    counts = subject.counts.encode()
    while place < len(counts):
        value, shift, more = 0, 0, True
        while more:
            if place >= len(counts):
                raise Unusable(f"mask {subject.number} is cut off; leave the clip out")
            digit = counts[place] - 48
            value |= (digit & 31) << shift
            more, shift, place = bool(digit & 32), shift + 5, place + 1
            if not more and digit & 16:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    if min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise Unusable(f"mask {subject.number} does not fill its {height} × {width} pixels; leave the clip out")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def chosen(
    clip: Annotated, selection: str, most: int, least_score: float, random: np.random.Generator
) -> list[tuple[Subject, np.ndarray]]:
    """At most `most` subjects with their masks, no two of the same thing. Raises Unusable where there is none.

    selection: "first" takes them in their order, "best_score" the best first, "random" in any order.
    """
    subjects = [subject for subject in clip.subjects if subject.score >= least_score]
    if selection == "best_score":
        subjects.sort(key=lambda subject: -subject.score)
    elif selection == "random":
        subjects = [subjects[i] for i in random.permutation(len(subjects))]
    found: list[tuple[Subject, np.ndarray]] = []
    for subject in subjects:
        mask = mask_of(subject)
        if mask.any() and not any(_same(mask, other) for _, other in found):
            found.append((subject, mask))
        if len(found) == most:
            return found
    if not found:
        raise Unusable(
            f"no subject has a mask and a score of {least_score:g} or more; lower --min_score, or leave it out"
        )
    return found


def _same(mask: np.ndarray, other: np.ndarray) -> bool:
    return mask.shape != other.shape or (mask & other).sum() > SAME * (mask | other).sum()


def cut_out(frame: np.ndarray, mask: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
    """uint8 (h, w, 3): the part of a frame, uint8 (H, W, 3), that holds the mask; the rest white, or as in `background`.

    Raises Unusable where their sizes differ.
    """
    ground = np.full_like(frame, WHITE) if background is None else background
    if not frame.shape == ground.shape == (*mask.shape, 3):
        sizes = f"{frame.shape[:2]}, its mask {mask.shape}, its background {ground.shape[:2]}"
        raise Unusable(f"the frame in its crop is {sizes} pixels; leave the clip out")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return np.where(mask[inside][..., None], frame[inside], ground[inside])
