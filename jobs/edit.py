"""Edit one picture, or every row of a JSONL, with the base model, a trained denoiser or a LoRA; writes PNGs, or of a model of
videos MP4s, each with a PNG of its references and of three of its frames.

    python -m jobs.edit --model.path data/flux-kontext --model.size auto --edit.image dish.jpg --edit.prompt "Warm light" \\
        --tuned.denoiser runs/NAME/v0/final/transformer --edit.out edits

Runs in one process, without Ray, on the GPU if there is one. Each file is named after its image_id and variant; an id that cannot
name a file is made safe (`rlhf.names`). A file that is there already is never overwritten.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from actors.sampler import Sampler, SampleRequest
from jobs.cli import parse, resolved_toml, run_main, say
from jobs.recipes import EditRecipe, EditRequestConfig
from rlhf.data.instructions import Unread, unread_report
from rlhf.data.media import PictureFile, picture_file
from rlhf.data.prompts import prompt_of, read_prompts, sized
from rlhf.data.records import BadInput
from rlhf.errors import Refused
from rlhf.evaluation.prompts import weight_problems
from rlhf.models.checks import check_model, check_sampling
from rlhf.names import file_names
from rlhf.runs.folder import check_place, made
from rlhf.tables import SamplingTable
from rlhf.types import Prompt, seed_from


def prompts(recipe: EditRecipe) -> list[Prompt]:
    """Everything to edit. Raises Refused."""
    edit, model = recipe.edit, recipe.model
    family = check_model(model)
    if not max(family.source_counts):
        raise Refused(
            f"model.family = {model.family!r} sees no picture, and so edits none; give a model that does, like Kontext"
        )
    check_sampling(family, recipe.sampling)
    if "cuda" in (edit.device, edit.encoder_device) and not torch.cuda.is_available():
        key = "edit.device" if edit.device == "cuda" else "edit.encoder_device"
        raise Refused(f'{key} = "cuda", but torch finds no GPU here; set "cpu" or leave it out')
    if problems := weight_problems(recipe.tuned, family):
        raise BadInput(problems)
    geometry = sized(model, family, model.frames)
    if edit.data is not None:
        try:
            found = read_prompts(edit.data, edit.fit, geometry, key="edit.data", source_counts=family.source_counts)
        except BadInput as error:
            raise BadInput(error.problems, skippable=False) from error
        return [*found.prompts]
    pictures = [_picture("edit.image", str(edit.image)), *(_picture("edit.references", one) for one in edit.references)]
    if len(pictures) not in family.source_counts:
        most = max(family.source_counts)
        raise Refused(f"edit.references = {list(edit.references)!r}: this model takes at most {most} pictures in all")
    return [prompt_of(Path(str(edit.image)).stem, edit.prompt, pictures, {}, edit.fit, geometry)]


def _picture(key: str, given: str) -> PictureFile:
    """Raises Refused."""
    path = Path(given).absolute()
    if not path.is_file():
        raise Refused(f"{key} = {given!r} is no file; give a PNG, JPEG or WEBP")
    picture = picture_file(path.read_bytes())
    if isinstance(picture, tuple):
        what, remedy = picture
        raise Refused(f"{key} = {given!r} {what}; {remedy}")
    return replace(picture, path=str(path))


def files_of(edit: EditRequestConfig, todo: Sequence[Prompt]) -> dict[tuple[str, int], Path]:
    """The PNG of each prompt's key and variant. Raises Refused where one is there already, or none can be."""
    check_place(Path(edit.out), "edit.out")
    names = file_names(prompt.key for prompt in todo)
    files = {
        (prompt.key, variant): Path(edit.out)
        / f"{names[prompt.key]}_{variant}.{'mp4' if prompt.geometry.frames > 1 else 'png'}"
        for prompt in todo
        for variant in range(edit.variants)
    }
    if there := [file for video in files.values() for file in {video, video.with_suffix(".png")} if file.exists()]:
        what = f"{len(there)} of the {len(files)} pictures are there already, the first is {there[0].name}"
        raise Refused(f"edit.out = {edit.out!r}: {what}; choose another folder")
    return files


def main() -> None:
    recipe, is_dry = parse(EditRecipe, description=__doc__ or "")
    edit, todo = recipe.edit, prompts(recipe)
    files = files_of(edit, todo)
    if is_dry:
        say(resolved_toml(recipe))
        say(f"{len(todo)} pictures × {edit.variants} variants → {edit.out}")
        return
    device = ("cuda" if torch.cuda.is_available() else "cpu") if edit.device == "auto" else edit.device
    made(Path(edit.out), "edit.out")
    sampling, not_read = SamplingTable(**dict(recipe.sampling), batch_size=1), Unread()
    sampler = Sampler(recipe.model, sampling, device, codec_device=edit.encoder_device)
    for prompt in todo:
        for variant in range(edit.variants):
            request = SampleRequest(prompt=prompt, noise_seed=seed_from(edit.seed, prompt.key, variant), slot=0)
            not_read |= sampler.paint(recipe.tuned, [(request, files[prompt.key, variant], None)])
            say(str(files[prompt.key, variant]))
    for warning in unread_report(not_read, len(todo)):
        say(warning)


if __name__ == "__main__":
    run_main(main, "the pictures named above are whole")
