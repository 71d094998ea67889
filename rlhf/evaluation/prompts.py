"""What an evaluation is asked about: its prompts and weights, checked before any model loads.

A family that sees a source takes the JSONL of a run (`rlhf.data.prompts`). One that does not takes the same file without
pictures, or a .txt file with one prompt a line (blank lines are nothing). Everything that is wrong is said at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open

from rlhf.data.prompts import read_rows
from rlhf.data.records import BadInput, Problem, is_text, parse_items
from rlhf.evaluation.config import EvaluateConfig, EvaluateDataConfig, EvaluatedModelConfig
from rlhf.models import load_family
from rlhf.models.family import Family, sees_source
from rlhf.models.folder import trained_fault
from rlhf.types import Item, Prompt


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts to work on and the problems that were left out (`data.on_bad_row = "skip"`)."""

    prompts: tuple[Prompt, ...]
    """Where the model sees no source, `image` is empty. Nothing is cached, so the keys are the text and the picture's hash."""
    left_out: tuple[Problem, ...] = ()


def family_of(model: EvaluatedModelConfig) -> Family:
    """The family of the base model; reads small files at most."""
    return load_family(model, model.mixed_precision, model.guidance_scale)


def read_evaluation(config: EvaluateConfig) -> Prompts:
    """The prompts of a recipe. Raises BadInput with every problem of prompts and weights, Refused for `model.path`."""
    family = family_of(config.model)
    family.check()
    problems = weight_problems(config, family)
    try:
        found = _edits(config, family) if sees_source(family) else _texts(config, family)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from error
    if problems:
        raise BadInput(problems)
    return Prompts(prompts=found.prompts[: config.data.max_prompts], left_out=found.left_out)


def weight_problems(config: EvaluateConfig, family: Family) -> list[Problem]:
    """What is wrong with `tuned`, as far as can be seen without loading it."""

    def problem(path: Path, field: str, what: str, remedy: str) -> list[Problem]:
        return [Problem(file=str(path), line=None, field=f"tuned.{field}", what=what, remedy=remedy)]

    if config.tuned.denoiser is not None:
        folder = Path(config.tuned.denoiser)
        example = f"give the folder of the trained weights, e.g. RUN/final/{family.denoiser_folder}"
        base = json.loads((Path(family.path) / family.denoiser_folder / "config.json").read_text())
        fault = trained_fault(folder, base)
        return problem(folder, "denoiser", fault, example) if fault else []
    path = Path(str(config.tuned.lora))
    file = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    example = f"give a LoRA in the diffusers layout or its folder, e.g. RUN/final/lora with {LORA_WEIGHT_NAME_SAFE}"
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        return problem(file, "lora", f"cannot be read: {error}", example)
    if not any(name.startswith(f"{family.lora_prefix}.") for name in names):  # diffusers would load nothing, and go on
        what = f"holds nothing for {family.lora_prefix!r}, its first tensor is {min(names, default=None)!r}"
        return problem(file, "lora", what, f"give a LoRA that was trained on {config.model.family}")
    return []


def read_texts(data: EvaluateDataConfig) -> tuple[list[tuple[int, str, str]], list[Problem]]:
    """(line, image_id, prompt) of the well-formed lines of a .txt or JSONL without pictures, and the problems of the others.

    A line without image_id is named after its number. Of lines with one image_id the first counts.
    """
    path = Path(data.path)
    problems: list[Problem] = []

    def problem(number: int | None, field: str | None, what: str, remedy: str) -> None:
        problems.append(Problem(file=str(path), line=number, field=field, what=what, remedy=remedy))

    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        problem(None, None, f"cannot be read: {error.strerror}", "set data.path to a readable file")
        return [], problems
    first: dict[str, int] = {}
    found = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError as error:
            problem(number, None, f"is not UTF-8 ({error.reason})", "save the file as UTF-8")
            continue
        if path.suffix == ".txt":
            found.append((number, f"line {number}", text))
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem(number, None, f"is not JSON: {error}", "write one JSON object per line, or name the file .txt")
            continue
        if not isinstance(row, dict):
            problem(number, None, "is no JSON object", f'write {{"{data.prompt_column}": "A red apple."}}')
            continue
        image_id, prompt = row.get("image_id", f"line {number}"), row.get(data.prompt_column)
        if data.prompt_column not in row:
            remedy = f'add "{data.prompt_column}": "A red apple.", or set data.prompt_column to the field that holds it'
            problem(number, data.prompt_column, "is missing", remedy)
        elif not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
            what = "is empty" if isinstance(prompt, str) and not prompt.strip() else f"is {prompt!r}, not a text"
            problem(number, data.prompt_column, what, "write what the picture shows")
        elif not isinstance(image_id, str) or not image_id or not is_text(image_id):
            problem(number, "image_id", f"is {image_id!r}, not a text", "write a text, or leave it out")
        elif image_id in first:
            problem(number, "image_id", f"{image_id!r} is already on line {first[image_id]}", "give each row its own")
        else:
            first[image_id] = number
            found.append((number, image_id, prompt))
    if not found and not problems:
        problem(None, None, "has no prompts", "write one a line")
    return found, problems


def _texts(config: EvaluateConfig, family: Family) -> Prompts:
    data = config.data
    texts, problems = read_texts(data)
    items: Mapping[str, Item] | None = None
    if data.item_metadata is not None:
        items, item_problems = parse_items(Path(data.item_metadata))
        problems += item_problems
        if item_problems and not items:
            raise BadInput(problems)
        for number, image_id, _ in texts:
            if image_id not in items:
                what, remedy = f"{image_id!r} has no row in {data.item_metadata}", "add it there or remove the prompt"
                problems.append(Problem(file=data.path, line=number, field="image_id", what=what, remedy=remedy))
        texts = [text for text in texts if text[1] in items]
    fatal = any(problem.line is None for problem in problems)
    if problems and (fatal or data.on_bad_row == "stop" or not texts):
        raise BadInput(problems)
    height, width = _size(config.model, family, 1, 1)
    prompts = tuple(
        Prompt(
            image_id=image_id,
            instruction=text,
            image="",
            item=items[image_id] if items is not None else None,
            height=height,
            width=width,
            text_key=text,
            source_key="",
        )
        for _, image_id, text in texts
    )
    return Prompts(prompts=prompts, left_out=tuple(problems))


def _edits(config: EvaluateConfig, family: Family) -> Prompts:
    data = config.data
    if Path(data.path).suffix == ".txt":
        what = f"is a list of texts, but {config.model.family} edits pictures"
        remedy = "give a JSONL with image_id, prompt and image"
        raise BadInput([Problem(file=data.path, line=None, field="data.path", what=what, remedy=remedy)])
    rows = read_rows(
        data.path, item_metadata=data.item_metadata, prompt_column=data.prompt_column, on_bad_row=data.on_bad_row
    )
    prompts = []
    for row in rows.rows:
        height, width = _size(config.model, family, row.height, row.width)
        prompts.append(
            Prompt(
                image_id=row.image_id,
                instruction=row.instruction,
                image=row.image,
                item=row.item,
                height=height,
                width=width,
                text_key=row.instruction,
                source_key=row.content,
            )
        )
    return Prompts(prompts=tuple(prompts), left_out=rows.left_out)


def _size(model: EvaluatedModelConfig, family: Family, height: int, width: int) -> tuple[int, int]:
    """(H, W) for a prompt whose source has that many pixels; 1×1 asks for the family's square."""
    if model.height is None or model.width is None:
        return family.nearest_size(height, width)
    return model.height, model.width
