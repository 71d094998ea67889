"""Make a task folder of rows of several texts, and encode it, for `jobs.train` to mix it with others by weight:

    python -m jobs.extract --config jobs/configs/sft_qwen_image_edit_mixture.toml \\
        --extract.rows /data/a.jsonl --extract.name dataset_a --data.root /data [--section.key VALUE …] [--dry-run]

A row has target_image (or edit_image), source_image (a path, a list, or null) and instruction, instruction_cn,
inverse_instruction or inverse_instruction_cn, as FireRed's have; the inverse texts are of the way back, from the target to its
one source. Every text of a row becomes an example. data.path/dataset_a/rows.jsonl lists them, with paths from data.root, and
data.cache gets their embeddings and latents; run again, only what is missing is encoded. All pictures are decoded first.

Rows that are extracted under two names, each with some of `extract.texts`, may have a weight for each; nothing is encoded twice.
A task folder of the same name is replaced. A dry run decodes all pictures and says what would be encoded.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from jobs.cli import parse, run_main, say
from jobs.preprocess import fill, to_encode
from jobs.recipes import ExtractConfig, ExtractRecipe, TrainRecipe
from rlhf.data.checks import check_file, refuse
from rlhf.data.columns import ALIASES
from rlhf.data.records import Field, Problem, Record, whole
from rlhf.errors import Refused
from rlhf.models.checks import check_model
from rlhf.names import name_fault
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import check_place, made

ROWS = "rows.jsonl"
EDIT_IMAGE = "edit_image"
"""Another name of the column of targets."""
Example = dict[str, Any]


class Examples(NamedTuple):
    """What rows were made into."""

    lines: list[Example]
    counts: Mapping[str, int]
    """By kind of text."""
    problems: list[Problem]
    """Of the rows that were left out."""


def main() -> None:
    recipe, is_dry = parse(ExtractRecipe, description=__doc__ or "")
    extract, root, tasks = recipe.extract, root_of(recipe), Path(recipe.data.path)
    if fault := name_fault(extract.name):
        raise Refused(f"extract.name = {extract.name!r} {fault}")
    check_place(tasks, "data.path")
    family = check_model(recipe.model)
    found = examples_of(extract, root, family.source_counts)
    refuse(found.problems, found.lines, recipe.data.on_bad_row)
    left_out = "".join(f"{problem}\n" for problem in found.problems)
    if left_out:
        say(f"left out:\n{left_out.rstrip()}")
    counts = ", ".join(f"{count} {text}" for text, count in found.counts.items())
    say(f"{tasks / extract.name}: {len(found.lines)} examples ({counts})")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found.lines)
    staged = made(Path(recipe.data.cache) / "staged" / extract.name, "data.cache")
    try:  # the task folder is there once all that it needs is
        write_durably(staged / ROWS, text)
        (to_encode if is_dry else fill)(alone(recipe, staged.parent, root))
    finally:
        shutil.rmtree(staged)
    if not is_dry:
        put(made(tasks / extract.name, "data.path"), text, left_out)
        say(
            tomli_w.dumps({"data": {"path": str(tasks), "root": str(root), "task_weights": {extract.name: 1}}}).rstrip()
        )


def root_of(recipe: ExtractRecipe) -> Path:
    """Where paths start, and what pictures lie below. Raises Refused."""
    root = Path(recipe.data.root or Path(recipe.extract.rows).parent)
    if not root.is_dir():
        raise Refused(f"data.root = {str(root)!r} is no folder: give the one that the paths in the rows start from")
    return root


def put(folder: Path, text: str, left_out: str) -> None:
    """Write the files of a task folder, and say which rows were replaced by others."""
    file = folder / ROWS
    if file.exists() and file.read_text(encoding="utf-8") != text:
        say(f"{file}: replaced; it had {len(file.read_text(encoding='utf-8').splitlines())} examples")
    write_durably(file, text)
    write_durably(folder / "left_out.txt", left_out)


def alone(recipe: ExtractRecipe, tasks: Path, root: Path) -> TrainRecipe:
    """A recipe that trains on this task folder below `tasks` and nothing else."""
    name, given = recipe.extract.name, recipe.model_dump(exclude={"extract"}, exclude_unset=True)
    dropout = {task: rate for task, rate in recipe.data.task_caption_dropout.items() if task == name}
    only: dict[str, Any] = {"task_weights": {name: 1.0}, "source_count_weights": {}, "task_caption_dropout": dropout}
    data = {**given["data"], **only, "path": str(tasks), "root": str(root)}
    return TrainRecipe.model_validate({**given, "data": data, "eval": {}, "validation": {}})


def examples_of(extract: ExtractConfig, root: Path, source_counts: range) -> Examples:
    """The lines that rows become, with paths from `root`, and what is wrong with the others. source_counts: see `Family`."""
    columns: dict[str, str] = {text: getattr(extract, text) for text in extract.texts}
    targets = (extract.target, EDIT_IMAGE)
    fields = (
        Field(name=extract.source, kind="picture paths", required=0 not in source_counts, counts=source_counts),
        *(Field(name=name, kind="picture path", required=False) for name in targets),
        *(Field(name=name, required=False) for name in columns.values()),
    )
    rows, problems = check_file(Path(extract.rows), fields, key="extract.rows", otherwise="", root=root, others=True)
    lines, counts = list[Example](), Counter[str]()
    for row in rows:
        if faults := list(_problems(row, extract, targets, columns)):
            problems += faults
            continue
        for text in (text for text, column in columns.items() if row.fields.get(column)):
            lines.append(_line(row, extract, targets, text, root.resolve()))
            counts[text] += 1
    if not lines and not problems:
        problems.append(whole(Path(extract.rows), "has no rows", "give a JSONL with a row in each line"))
    return Examples(lines, counts, sorted(problems, key=lambda problem: problem.line or 0))


def _is_inverse(text: str) -> bool:
    return text.startswith("inverse")


def _problems(
    row: Record, extract: ExtractConfig, targets: tuple[str, ...], columns: Mapping[str, str]
) -> Iterator[Problem]:
    given = {name: value for name, value in row.fields.items() if value}
    if len(there := [name for name in targets if name in given]) != 1:
        what = f"is given, and {EDIT_IMAGE} too" if there else "is missing"
        yield row.problem(extract.target, what, "give the path of the edited picture, once")
    if not any(column in given for column in columns.values()):
        first = next(iter(columns.values()))
        yield row.problem(first, "is missing, and so is every other text", "write what the edit is")
    count = len(given.get(extract.source) or ())
    for text, column in columns.items():
        if _is_inverse(text) and column in given and count != 1:
            what = f"is of the way back to the source, but the row has {count}"
            yield row.problem(column, what, 'leave it out, or set extract.texts = ["en", "cn"]')
    kinds = {name: ALIASES.get(name, name) for name in given.keys() - {extract.source, *targets}}
    for name, kind in kinds.items():
        if kind in ("source", "target"):  # a row without its sources would be another example
            yield row.problem(name, "is no column that is read", f'set extract.{kind} = "{name}", or leave it out')


def _line(row: Record, extract: ExtractConfig, targets: tuple[str, ...], text: str, root: Path) -> Example:
    """The example of a row without problems that has this text."""
    given = row.fields
    (target,) = (given[name] for name in targets if name in given)
    pictures = (target, *(given.get(extract.source) or ()))
    target, *sources = (str(Path(picture.path).relative_to(root)) for picture in pictures)
    if _is_inverse(text):
        (target,), sources = sources, [target]
    line = {"image_id": f"{row.number}_{text}", "prompt": given[getattr(extract, text)], "target": target}
    return line | ({"source": sources} if sources else {})


if __name__ == "__main__":
    run_main(main, "what is encoded stays; the same command encodes the rest")
