"""What an evaluation is asked about: its prompts and weights, checked before any model loads.

A family that sees a source takes the JSONL of a run (`rlhf.data.prompts`). One that does not takes the same file without
pictures, or a .txt file with one prompt a line (blank lines are nothing). Everything that is wrong is said at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open

from rlhf.data.checks import check_file, no_rows, refuse
from rlhf.data.items import parse_items
from rlhf.data.prompts import prompts_of, read_rows
from rlhf.data.records import BadInput, Field, Problem, whole
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.models.folder import trained_fault
from rlhf.tables import EvaluatedModelTable, PromptDataTable, WeightsTable
from rlhf.types import Geometry, Item, Prompt


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts to work on and the problems that were left out (`data.on_bad_row = "skip"`)."""

    prompts: tuple[Prompt, ...]
    left_out: tuple[Problem, ...] = ()


def read_evaluation(model: EvaluatedModelTable, tuned: WeightsTable, data: PromptDataTable) -> Prompts:
    """The prompts of a recipe. Raises BadInput with every problem of prompts and weights, Refused for `model.path`."""
    family = load_family(model)
    family.check()
    problems = weight_problems(tuned, model.family, family)
    try:
        found = _edits(model, data, family) if family.sees_source else _texts(data, _geometry(model, family, 1, 1))
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from error
    if problems:
        raise BadInput(problems)
    return Prompts(prompts=found.prompts[: data.max_prompts], left_out=found.left_out)


def weight_problems(tuned: WeightsTable, model_family: str, family: Family) -> list[Problem]:
    """What is wrong with `tuned`, as far as can be seen without loading it. `model_family` is `model.family`, for messages."""

    def problem(path: Path, field: str, what: str, remedy: str) -> list[Problem]:
        return [replace(whole(path, what, remedy), field=f"tuned.{field}")]

    if tuned.denoiser is not None:
        folder = Path(tuned.denoiser)
        example = f"give the folder of the trained weights, e.g. RUN/final/{family.denoiser_folder}"
        base = json.loads((Path(family.path) / family.denoiser_folder / "config.json").read_text())
        fault = trained_fault(folder, base)
        return problem(folder, "denoiser", fault, example) if fault else []
    path = Path(str(tuned.lora))
    file = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    example = f"give a LoRA in the diffusers layout or its folder, e.g. RUN/final/lora with {LORA_WEIGHT_NAME_SAFE}"
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        return problem(file, "lora", f"cannot be read: {error}", example)
    if not any(name.startswith(f"{family.lora_prefix}.") for name in names):  # diffusers would load nothing, and go on
        what = f"holds nothing for {family.lora_prefix!r}, its first tensor is {min(names, default=None)!r}"
        return problem(file, "lora", what, f"give a LoRA that was trained on {model_family}")
    return []


def _texts(data: PromptDataTable, geometry: Geometry) -> Prompts:
    """Prompts without pictures. A line without image_id is named after its number."""
    file, by_line = Path(data.path), Path(data.path).suffix == ".txt"
    column = "text" if by_line else data.prompt_column
    remedy = f"write what the picture shows, or set data.prompt_column, now {column!r}, to the field that says it"
    fields = (
        Field(name="image_id", required=False, unique=True, example='"10001"'),
        Field(name=column, example='"A red apple."', remedy="" if by_line else remedy),
    )
    records, problems = check_file(file, fields, key="data.path", otherwise=".jsonl")
    problems = [_or_text(problem) for problem in problems]
    items: Mapping[str, Item] | None = None
    item_problems: list[Problem] = []
    if data.item_metadata is not None:
        items, item_problems = parse_items(Path(data.item_metadata))
    given = {record.fields["image_id"] for record in records if "image_id" in record.fields}
    prompts = []
    for record in records:
        image_id = record.fields.get("image_id", f"line {record.number}")
        if "image_id" not in record.fields and image_id in given:
            what = f"is missing, and {image_id!r}, which would be its name, is another row's"
            problems.append(record.problem("image_id", what, "give every row its own image_id"))
        elif items is not None and image_id not in items:
            # Where the items cannot be read at all, that alone is told, and not of every row that it has none.
            if items or not item_problems:
                what, remedy = (
                    f"{image_id!r} has no row in {data.item_metadata}",
                    "add its row there or remove this one",
                )
                problems.append(record.problem("image_id", what, remedy))
        else:
            text, item = record.fields[column], items[image_id] if items is not None else {}
            prompts.append(Prompt(key=image_id, instruction=text, item=item, geometry=geometry))
    problems.sort(key=lambda problem: problem.line or 0)
    if not records and not problems:
        problems = [no_rows(file, ".jsonl")]
    problems += item_problems
    refuse(problems, prompts, data.on_bad_row)
    return Prompts(prompts=tuple(prompts), left_out=tuple(problems))


def _or_text(problem: Problem) -> Problem:
    if not problem.what.startswith("is not JSON"):
        return problem
    return replace(problem, remedy=f"{problem.remedy}, or name the file .txt, with one prompt per line")


def _edits(model: EvaluatedModelTable, data: PromptDataTable, family: Family) -> Prompts:
    if Path(data.path).suffix == ".txt":
        what = f"is a list of texts, but {model.family} edits pictures"
        raise BadInput([whole(data.path, what, "give a JSONL with image_id, prompt and image")])
    rows = read_rows(
        data.path, item_metadata=data.item_metadata, prompt_column=data.prompt_column, on_bad_row=data.on_bad_row
    )
    prompts = prompts_of(rows.rows, data.fit, lambda height, width: _geometry(model, family, height, width))
    return Prompts(prompts=tuple(prompts), left_out=rows.left_out)


def _geometry(model: EvaluatedModelTable, family: Family, height: int, width: int) -> Geometry:
    """For a prompt whose source has (H, W) pixels; 1×1 asks for the family's square."""
    if model.height is None or model.width is None:
        height, width = family.nearest_size(height, width)
        return Geometry(height=height, width=width)
    return Geometry(height=model.height, width=model.width)
