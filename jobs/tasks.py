"""Rows of several texts as data sets for `data.task_weights`, one for each kind of text:

    python -m jobs.tasks rows.jsonl --name dataset_a --out data/tasks [--root /data/img] [--no-inverse]

A row has target_image (or edit_image), source_image (a path, a list, or null) and instruction, instruction_cn,
inverse_instruction or inverse_instruction_cn, as FireRed's have; the inverse texts are of the way back, from the target to its
one source. What is written is data/tasks/dataset_a_en/rows.jsonl, …_cn, …_inverse_en, …_inverse_cn, as far as rows have such
texts. Which language is trained how often, and how often the way back, is then said by the weights of these data sets. All
pictures are decoded; with a problem nothing is written, and the status is 2.
"""

import argparse
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jobs.cli import run_main, say
from rlhf.data.checks import check_file
from rlhf.data.records import BadInput, Field, Problem, Record
from rlhf.errors import Refused
from rlhf.names import name_fault
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import check_place, made


class Text(NamedTuple):
    """A kind of text that a row may have."""

    column: str
    is_inverse: bool


TEXTS = {
    "en": Text("instruction", False),
    "cn": Text("instruction_cn", False),
    "inverse_en": Text("inverse_instruction", True),
    "inverse_cn": Text("inverse_instruction_cn", True),
}
"""By what the name of its data set ends with."""
TARGETS = ("target_image", "edit_image")
FIELDS = (
    Field(name="source_image", kind="picture paths", required=False),
    *(Field(name=name, kind="picture path", required=False) for name in TARGETS),
    *(Field(name=text.column, required=False) for text in TEXTS.values()),
)
Examples = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a JSONL")
    parser.add_argument("--name", required=True, help="of the data sets, before the kind of their text")
    parser.add_argument("--out", type=Path, required=True, help="folder of data sets, which data.path will be")
    parser.add_argument(
        "--root", type=Path, help="data.root: where paths start, and pictures lie; default: beside the rows"
    )
    parser.add_argument("--no-inverse", action="store_true", help="leave out the inverse texts")
    given = parser.parse_args()
    if fault := name_fault(given.name):
        raise Refused(f"--name {given.name!r} {fault}")
    root = (given.root or given.rows.parent).absolute()
    if not root.is_dir():
        raise Refused(f"--root {root} is no folder: give the one that the paths start from")
    check_place(given.out.absolute(), "--out")
    found = examples_of(given.rows.absolute(), root, inverse=not given.no_inverse)
    for kind, lines in found.items():
        folder = made(given.out.absolute() / f"{given.name}_{kind}", "--out")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_durably(folder / "rows.jsonl", text)
        say(f"{folder}: {len(lines)} examples")
    weights = ", ".join(f"{given.name}_{kind} = 1" for kind in found)
    say(f'[data]\npath = "{given.out}"\nroot = "{root}"\ntask_weights = {{ {weights} }}')


def examples_of(file: Path, root: Path, *, inverse: bool) -> Examples:
    """The lines of each kind of text that a row has, with paths from `root`. Raises: BadInput with every problem."""
    rows, problems = check_file(
        file, FIELDS, key="rows", otherwise="give a JSONL of source_image, target_image, instruction", root=root
    )
    found: Examples = {kind: [] for kind, text in TEXTS.items() if inverse or not text.is_inverse}
    for row in rows:
        faults = list(_problems(row, found))
        problems += faults
        for kind in [] if faults else found:
            if TEXTS[kind].column in row.fields:
                found[kind].append(_line(row, TEXTS[kind], root.resolve()))
    if problems:
        raise BadInput(problems, skippable=False)
    return {kind: lines for kind, lines in found.items() if lines}


def _problems(row: Record, kinds: Collection[str]) -> Iterator[Problem]:
    given = row.fields
    targets = [name for name in TARGETS if name in given]
    if len(targets) != 1:
        what = "is missing" if not targets else f"says the same as {TARGETS[1]}"
        yield row.problem(TARGETS[0], what, "give the path of the edited picture, once")
    if not any(TEXTS[kind].column in given for kind in kinds):
        yield row.problem("instruction", "is missing, and so is every other text", "write what the edit is")
    count = len(given.get("source_image", ()))
    for kind in kinds:
        text = TEXTS[kind]
        if text.is_inverse and text.column in given and count != 1:
            what = f"is of the way back to the source, but the row has {count}"
            yield row.problem(text.column, what, "leave it out, or give --no-inverse")


def _line(row: Record, text: Text, root: Path) -> dict[str, Any]:
    """The example of a row without problems that has this text."""
    given = row.fields
    (target,) = (given[name] for name in TARGETS if name in given)
    pictures = (target, *given.get("source_image", ()))
    target, *sources = (str(Path(picture.path).relative_to(root)) for picture in pictures)
    if text.is_inverse:
        (target,), sources = sources, [target]
    line = {"image_id": str(row.number), "prompt": given[text.column], "target": target}
    return line | ({"source": sources} if sources else {})


if __name__ == "__main__":
    run_main(main)
