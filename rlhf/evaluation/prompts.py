"""What an evaluation is asked about: its prompts and weights, checked before any model loads.

A family that sees a source takes the JSONL of a run (`rlhf.data.prompts`). One that does not takes the same file without
pictures, or a .txt file with one prompt a line (blank lines are nothing). Everything that is wrong is said at once.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rlhf.data.checks import check_file, no_rows, refuse
from rlhf.data.prompts import Prompts, read_items, read_prompts
from rlhf.data.records import BadInput, Field, Problem, whole
from rlhf.errors import Refused
from rlhf.models.checks import check_denoiser, check_model
from rlhf.models.family import Family
from rlhf.models.lora import Misfit, check_lora
from rlhf.tables import EvaluatedModelTable, PromptDataTable, WeightsTable
from rlhf.types import Geometry, Prompt


def read_evaluation(model: EvaluatedModelTable, tuned: WeightsTable, data: PromptDataTable) -> Prompts:
    """The prompts of a recipe. Raises BadInput with every problem of prompts and weights, Refused for `model.path`."""
    family = check_model(model)
    problems = weight_problems(tuned, family)
    try:
        found = (
            _edits(model, data, family) if max(family.source_counts) else _texts(data, _geometry(model, family, 1, 1))
        )
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from error
    if problems:
        raise BadInput(problems)
    return Prompts(prompts=found.prompts[: data.max_prompts], left_out=found.left_out)


def weight_problems(tuned: WeightsTable, family: Family) -> list[Problem]:
    """What is wrong with `tuned`, as far as can be seen without loading it; nothing where it is not set."""
    if tuned.denoiser is not None:
        try:
            check_denoiser(family, Path(tuned.denoiser))
        except Refused as error:
            what, _, remedy = str(error).rpartition("; ")
            return [replace(whole(tuned.denoiser, what, remedy), field="tuned.denoiser")]
    if tuned.lora is not None:
        try:
            plain = cast(Family, replace(cast(Any, family), base="bf16"))  # a base is quantised after a LoRA is read
            check_lora(Path(tuned.lora), plain.empty_denoiser(family.dtype), family.denoiser_folder)
        except Misfit as error:
            return [replace(whole(error.file, error.what, error.remedy), field="tuned.lora")]
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
    or_text = ", or name the file .txt, with one prompt per line"
    problems = [replace(p, remedy=p.remedy + or_text) if p.what.startswith("is not JSON") else p for p in problems]
    items, item_problems = read_items(data.item_metadata)
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
                what = f"{image_id!r} has no row in {data.item_metadata}"
                problems.append(record.problem("image_id", what, "add its row there or remove this one"))
        else:
            text, item = record.fields[column], items[image_id] if items is not None else {}
            prompts.append(Prompt(key=image_id, instruction=text, item=item, geometry=geometry))
    problems.sort(key=lambda problem: problem.line or 0)
    if not records and not problems:
        problems = [no_rows(file, ".jsonl")]
    problems += item_problems
    refuse(problems, prompts, data.on_bad_row)
    return Prompts(prompts=tuple(prompts), left_out=tuple(problems))


def _edits(model: EvaluatedModelTable, data: PromptDataTable, family: Family) -> Prompts:
    if Path(data.path).suffix == ".txt":
        what = f"is a list of texts, but {model.family} edits pictures"
        raise BadInput([whole(data.path, what, "give a JSONL with image_id, prompt and image")])
    return read_prompts(
        data.path,
        data.fit,
        partial(_geometry, model, family),
        item_metadata=data.item_metadata,
        prompt_column=data.prompt_column,
        on_bad_row=data.on_bad_row,
        source_counts=family.source_counts,
    )


def _geometry(model: EvaluatedModelTable, family: Family, height: int, width: int) -> Geometry:
    """For a prompt whose source has (H, W) pixels; 1×1 asks for the family's square."""
    if model.height is None or model.width is None:
        height, width = family.nearest_size(height, width)
        return Geometry(height=height, width=width)
    return Geometry(height=model.height, width=model.width)
