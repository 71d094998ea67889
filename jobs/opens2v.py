"""Make a data set for jobs.train of OpenS2V's clips: every clip with pictures of its subjects, cut out of one of its frames.

    python -m jobs.opens2v --part part1.json videos/part1 [--part …] --out data/subjects [--frames 21 --stride 3]
        [--selection first|random|best_score] [--max_subjects 1] [--min_score 0] [--backgrounds DIR …] [--cross_frames DIR]

Written are OUT/rows.jsonl and OUT/references/; videos stay where they are. A clip that cannot be used is told with its reason,
and nothing is written unless --on_bad_row skip goes on without it. --backgrounds: of every part the folder of KEY.png, on which
subjects are shown in place of white. --cross_frames: the folder of CLUSTER.json with pairs of one subject in two clips; then a
clip's reference is that of its subject in another clip.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from jobs.cli import run_main, say
from jobs.one_process import refuse_small
from rlhf.data.clips import ClipError, read_clip
from rlhf.data.media import ImageError, decode_image
from rlhf.data.opens2v import Annotated, Unusable, annotated, chosen, cut_out, entries
from rlhf.data.records import BadInput, Problem, whole
from rlhf.errors import Refused
from rlhf.models.wan_subject import MOST
from rlhf.names import file_names
from rlhf.types import Clip

ROWS = "rows.jsonl"
SELECTIONS = ("first", "random", "best_score")
EVERY = 1000
"""Clips between two lines of progress."""
ALL = 1000


@dataclass(frozen=True, kw_only=True)
class Part:
    file: Path
    videos: Path
    backgrounds: Path | None

    @property
    def name(self) -> str:
        """By which pairs of other clips call it."""
        return self.videos.name


@dataclass(frozen=True, kw_only=True)
class Settings:
    selection: str
    most: int
    least_score: float
    frames_needed: int
    pairs: Path | None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Made:
    """A clip that can be used."""

    part: Part
    clip: Annotated
    references: dict[str, str]
    """Files below references/ by the number of the subject, in the order in which they were chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs=2, type=Path, action="append", required=True, metavar=("JSON", "VIDEOS"), help="repeat for more"
    )
    parser.add_argument("--backgrounds", nargs="+", type=Path, default=[], help="a folder for every part")
    parser.add_argument("--cross_frames", type=Path, help="folder of CLUSTER.json")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--selection", choices=SELECTIONS, default="first")
    parser.add_argument("--max_subjects", type=int, default=1)
    parser.add_argument("--min_score", type=float, default=0.0, help="aesthetic score of a subject")
    parser.add_argument("--frames", type=int, default=21, help="model.frames (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=3, help="data.frame_stride (default: %(default)s)")
    parser.add_argument("--on_bad_row", choices=("stop", "skip"), default="stop")
    given = parser.parse_args()
    for name in ("max_subjects", "frames", "stride"):
        refuse_small(f"--{name}", getattr(given, name), 1)
    if given.max_subjects > MOST:
        raise Refused(f"--max_subjects {given.max_subjects}: wan_subject takes at most {MOST}")
    if given.backgrounds and len(given.backgrounds) != len(given.part):
        raise Refused(
            f"--backgrounds has {len(given.backgrounds)} folders, but --part is given {len(given.part)} times"
        )
    backgrounds = [*given.backgrounds, *[None] * len(given.part)]
    parts = [
        Part(file=file.absolute(), videos=videos.absolute(), backgrounds=background and background.absolute())
        for (file, videos), background in zip(given.part, backgrounds, strict=False)
    ]
    settings = Settings(
        selection=given.selection,
        most=given.max_subjects,
        least_score=given.min_score,
        frames_needed=(given.frames - 1) * given.stride + 1,
        pairs=given.cross_frames,
    )
    out = given.out.absolute()
    make(parts, out, settings, given.on_bad_row)
    say(tomli_w.dumps({"data": {"path": str(out / ROWS), "root": str(root_of(parts, out))}}).rstrip())


def root_of(parts: Sequence[Part], out: Path) -> Path:
    """The folder that holds all videos and what is written."""
    return Path(os.path.commonpath([out, *(part.videos for part in parts)]))


def make(parts: Sequence[Part], out: Path, settings: Settings, on_bad_row: str) -> None:
    """Write the data set. Raises: Refused, BadInput with every problem."""
    if out.exists():
        raise Refused(f"--out {out} is there already: give a new folder")
    if len({part.name for part in parts}) < len(parts):
        named = ", ".join(str(part.videos) for part in parts)
        raise Refused(f"--part: of {named} two have one name, by which clips are told apart: rename a folder")
    for part in parts:
        if not part.file.is_file():
            raise BadInput([whole(part.file, "no such file", "give a part's merged JSON")])
        if not part.videos.is_dir():
            raise Refused(f"--part {part.file} {part.videos}: the second is no folder: give that of the part's videos")
    beside, problems, found = out.with_name(f".{out.name}.partial"), list[Problem](), dict[str, Made]()
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "references").mkdir(parents=True)
    for part in parts:
        for key, entry in entries(part.file):
            try:
                if f"{part.name}/{key}" in found:
                    raise Unusable("stands twice in its part; keep one of the two")
                found[f"{part.name}/{key}"] = cut(part, annotated(key, entry), beside / "references", settings)
            except Unusable as error:
                problems.append(_problem(part, key, error))
            if (len(found) + len(problems)) % EVERY == 0:
                say(f"{len(found)} clips, {len(problems)} that cannot be used")
    root, count = root_of(parts, out), 0
    with (beside / ROWS).open("w", encoding="utf-8") as file:
        for name, made in found.items():
            try:
                file.write(json.dumps(row_of(name, made, found, out, root, settings), ensure_ascii=False) + "\n")
                count += 1
            except Unusable as error:
                problems.append(_problem(made.part, made.clip.key, error))
    if problems and (on_bad_row == "stop" or not count):
        shutil.rmtree(beside)
        raise BadInput(problems, skippable=False)
    (beside / "left_out.txt").write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    beside.rename(out)
    say(f"{out}: {count} clips; left out: {len(problems)}, see {out}/left_out.txt")


def _problem(part: Part, key: str, error: Unusable) -> Problem:
    what, _, remedy = str(error).partition("; ")
    return Problem(file=str(part.file), line=0, field=key, what=what, remedy=remedy)


def cut(part: Part, clip: Annotated, folder: Path, settings: Settings) -> Made:
    """Write the pictures of a clip's subjects: those that are chosen or, where other clips use them, all. Raises Unusable."""
    if clip.end - clip.first < settings.frames_needed:
        what = f"has {clip.end - clip.first} frames, but {settings.frames_needed} are needed"
        raise Unusable(f"{what}; lower --frames or --stride, or leave it out")
    video = part.videos / clip.path
    if not Path(os.path.normpath(video)).is_relative_to(part.videos):
        raise Unusable(f"metadata.path = {clip.path!r} does not lie below {part.videos}; give its path from there")
    if not video.is_file():
        raise Unusable(f"{video} does not exist; put the video there")
    random = np.random.default_rng([settings.seed, *clip.key.encode()])
    subjects = chosen(clip, settings.selection, ALL if settings.pairs else settings.most, settings.least_score, random)
    try:
        frame = read_clip(video, Clip(first=clip.frame, box=clip.box), 1)[0]
    except (ClipError, OSError) as error:
        raise Unusable(f"{video} {error}; replace it, or leave the clip out") from error
    ground = background_of(part, clip) if part.backgrounds else None
    references = {}
    for subject, mask in subjects:
        (name,) = file_names([f"{part.name}_{clip.key}_{subject.number}"]).values()
        Image.fromarray(cut_out(frame, mask, ground)).save(folder / f"{name}.png")
        references[subject.number] = f"{name}.png"
    return Made(part=part, clip=replace(clip, subjects=()), references=references)  # masks are most of an entry


def background_of(part: Part, clip: Annotated) -> np.ndarray:
    """uint8 (H, W, 3). Raises Unusable."""
    assert part.backgrounds is not None
    file = part.backgrounds / f"{clip.key}.png"
    try:
        return decode_image(file.read_bytes())
    except (ImageError, OSError) as error:
        raise Unusable(f"{file}: {error}; put the background there, or leave the clip out") from error


def row_of(name: str, made: Made, others: dict[str, Made], out: Path, root: Path, settings: Settings) -> dict[str, Any]:
    """The line of a clip. Raises Unusable."""
    clip = made.clip
    references = list(made.references.values())
    if settings.pairs:
        references = [*islice(elsewhere(name, made, others, settings.pairs), settings.most)]
        if not references:
            raise Unusable(f"no other clip shows one of its subjects, by {settings.pairs}; leave it out")
    return {
        "image_id": name,
        "prompt": clip.caption,
        "target": str((made.part.videos / clip.path).relative_to(root)),
        "source": [str((out / "references" / file).relative_to(root)) for file in references],
        "clip": {"first": clip.first, "frames": clip.end - clip.first, "box": list(clip.box)},
    }


def elsewhere(name: str, made: Made, others: dict[str, Made], pairs: Path) -> Iterator[str]:
    """Pictures of a clip's subjects in other clips, in the subjects' order: of each the most similar. Raises Unusable."""
    key = made.clip.key
    file = pairs / f"{key.split('_segment')[0] if '_segment' in key else key.split('_part')[0]}.json"
    if not file.is_file():
        raise Unusable(f"its cluster's {file} does not exist; leave the clip out")
    try:
        known = json.loads(file.read_bytes())
        both = [(pair, mine, other) for pair in known for mine, other in (("cur", "aft"), ("aft", "cur"))]
        own = [(pair, mine, other) for pair, mine, other in both if pair[f"{mine}_id"] == name != pair[f"{other}_id"]]
        own.sort(key=lambda each: (-each[0]["text_similarity"], -each[0]["image_similarity"]))
        for number in made.references:
            for pair, mine, other in own:
                there = others.get(pair[f"{other}_id"])
                if pair[f"{mine}_class_id"] == number and there and pair[f"{other}_class_id"] in there.references:
                    yield there.references[pair[f"{other}_class_id"]]
                    break
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Unusable(f"{file} cannot be read ({type(error).__name__}: {error}); replace it") from error


if __name__ == "__main__":
    run_main(main)
