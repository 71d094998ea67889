"""Edits from Python, without recipe, cluster or cache:

    from rlhf.data.editor import Editor

    editor = Editor("data/flux-kontext", lora="runs/NAME/v0/final/lora", device="cuda")
    Image.fromarray(editor.edit("Warm light", "dish.jpg")).save("edit.png")

With the same model, size, steps, seed and device it makes the pictures of `jobs.edit`. Left out: batches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from rlhf.data.media import picture_file
from rlhf.data.prompts import prompt_of, sized
from rlhf.data.sampler import encoded_now, sample_prompts
from rlhf.errors import Refused
from rlhf.models.checks import check_denoiser, check_model, check_sampling
from rlhf.section import Section
from rlhf.tables import EditModelTable, SamplingTable
from rlhf.types import Encoding, seed_from

S = TypeVar("S", bound=Section)


def _table(kind: type[S], name: str, given: Mapping[str, Any]) -> S:
    """A recipe's table. Raises Refused for a key or value that it may not have."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Refused("; ".join(f"[{name}] {_said(each)}" for each in error.errors())) from error


def _check_device(name: str, value: str) -> None:
    try:
        there = torch.device(value).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        there = False
    if not there:
        raise Refused(f'{name} = {value!r} is no device of this machine: give "cpu", or "cuda" where there is a GPU')


def _said(detail: Mapping[str, Any]) -> str:
    what = detail["msg"].removeprefix("Value error, ")
    return f"{detail['loc'][0]} = {detail['input']!r}: {what}" if detail["loc"] else what


class Editor:
    """A model on one device."""

    def __init__(
        self,
        path: str | Path,
        *,
        family: str = "flux_kontext",
        denoiser: str | Path | None = None,
        lora: str | Path | None = None,
        device: str = "cpu",
        encoder_device: str | None = None,
        **model: Any,
    ):
        """path: a folder in the diffusers layout. denoiser: a trained folder in place of its own. lora: a file or its folder.
        encoder_device: of the encoders and the VAE; None: `device`. "cpu" leaves the card to the denoiser.
        model: other keys of a recipe's [model]; height and width, or size = "auto", which is the default. Raises Refused.
        """
        fixed = model.keys() & {"height", "width"}
        given = {"path": str(path), "family": family, "size": "fixed" if fixed else "auto"} | model
        self._model = _table(EditModelTable, "model", given)
        if len(fixed) == 1:
            raise Refused(f"{next(iter(fixed))} alone: give height and width, or neither")
        if denoiser and lora:
            raise Refused(f"denoiser = {str(denoiser)!r} and lora = {str(lora)!r}: give one of them")
        for name, value in (("device", device), ("encoder_device", encoder_device or device)):
            _check_device(name, value)
        self._family, self._device = check_model(self._model), device
        folder = Path(denoiser) if denoiser else None
        if folder:
            check_denoiser(self._family, folder)
        self._sized = sized(self._model, self._family, self._model.frames)
        self._denoiser = self._family.load_denoiser(device, folder, Path(lora) if lora else None)
        self._codec = self._family.load_codec(encoder_device or device)

    def edit(
        self, instruction: str, *pictures: str | Path, seed: int = 0, variant: int = 0, **sampling: Any
    ) -> np.ndarray:
        """uint8 (H, W, 3), edited from files; of a model of videos (F, H, W, 3). sampling: keys of a recipe's [sampling], such as
        steps. Raises Refused.
        """
        table = _table(SamplingTable, "sampling", {"batch_size": 1} | sampling)
        check_sampling(self._family, table)
        files = []
        for picture in pictures:
            found = picture_file(str(Path(picture).absolute()), Path("/"))
            if isinstance(found, tuple):
                raise Refused(f"{picture}: {'; '.join(found)}")
            files.append(found)
        key = Path(pictures[0]).stem if pictures else ""
        prompt = prompt_of(key, instruction, files, {}, "crop", self._sized)
        rows = encoded_now(self._family, self._codec, [prompt], table)

        def row(encoding: Encoding) -> Any:
            return rows[encoding].tensors

        x0 = sample_prompts(
            self._family,
            self._denoiser,
            row,
            table,
            self._device,
            prompts=[prompt],
            noise_seeds=[seed_from(seed, key, variant)],
            slots=[0],
        )
        (made,) = self._codec.decode(x0).numpy()
        return made if len(made) > 1 else made[0]
