"""Whether a model folder holds what will be needed: asked by every job before anything dear starts.

A family says what it needs (`Family.parts`); here it is looked for. JSON files and the headers of weights are read, and no
tensor: a folder of 60 GB takes a second. Left out: whether the values of the weights make sense.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.family import INDEX_FILE, NUMBER, Family, Part
from rlhf.shards.files import (
    AGAIN,
    DIFFUSERS,
    SAFETENSORS_NAMES,
    TRANSFORMERS,
    SafetensorsFolder,
    Stored,
    read_json,
    refuse_pointer,
)
from rlhf.tables import ModelTable

QUANTISED = "quantised models are not read: give the model in bfloat16, float16 or float32"


def check_model(model: ModelTable) -> Family:
    """The family of a recipe's [model], whose folder and denoiser hold all that it needs. Raises Refused."""
    family, root = load_family(model), Path(model.path)
    try:
        if not root.is_dir():
            what = "is a single file" if root.is_file() else "there is no such folder"
            raise Refused(
                f"{what}; give the folder of a whole model in the diffusers layout, with its model_index.json"
            )
        for name, part in family.parts():
            if name or not model.accept_index:
                config = _config(root / name, part)
                elsewhere = name == family.denoiser_folder and model.denoiser is not None
                if part.network is not None and not elsewhere:
                    network = _on_meta(part.network, root / name, config)
                    _check_weights(root / name, network, exact=name == family.denoiser_folder)
        _ = family.process  # which refuses a scheduler that it does not know
    except Refused as error:
        raise Refused(f"model.path = {model.path!r}: {error}") from error
    try:
        if model.denoiser is not None:
            check_denoiser(family, Path(model.denoiser))
    except Refused as error:
        raise Refused(f"model.denoiser = {model.denoiser!r}: {error}") from error
    return family


def check_denoiser(family: Family, folder: Path) -> None:
    """Raise Refused where a folder is no trained denoiser of a checked family's model."""
    part = next(part for name, part in family.parts() if name == family.denoiser_folder)
    assert part.network is not None, "a denoiser has a class"
    base, remedy = Path(family.path) / family.denoiser_folder, f"give e.g. RUN/final/{family.denoiser_folder}"
    if not (folder / part.file).is_file():
        raise Refused(f"{folder} holds no {part.file}; {remedy}")
    mine = _on_meta(part.network, folder, _config(folder, part))
    ours = _on_meta(part.network, base, read_json(base / part.file))
    for name in sorted({*mine.config, *ours.config}):
        given, known = mine.config.get(name), ours.config.get(name)
        if not name.startswith("_") and json.dumps(given) != json.dumps(known):
            what = f"{name} = {given!r}, but the base model has {known!r}"
            raise Refused(f"{folder / part.file}: {what}; give a folder that was trained from this model")
    _check_weights(folder, mine, exact=True)


def _config(folder: Path, part: Part) -> dict[str, Any]:
    """What the part's file says. Raises Refused where that, or a file that it needs beside, is not what the family takes."""
    file = folder / part.file
    config, values = read_json(file), dict(part.values)
    if part.network is not None and issubclass(part.network, ModelMixin):
        values = {"_class_name": (part.network.__name__,)} | values
    if config.get("quantization_config") is not None:
        raise Refused(f"{file} has a quantization_config; {QUANTISED}")
    for key, known in values.items():
        value = config.get(key)
        if value not in known and not (NUMBER in known and isinstance(value, NUMBER)):
            wanted = " or ".join("a number" if one is NUMBER else str(one) for one in known if one is not None)
            remedy = "give a folder of the model that model.family is for"
            if part.file == INDEX_FILE:
                remedy += ", or set model.accept_index = true if this is one whose index was copied from another"
            raise Refused(f"{file}: {key} = {value!r}, but this family takes {wanted or 'none'}; {remedy}")
    if part.files and not any(all((folder / name).is_file() for name in names) for names in part.files):
        wanted = ", or ".join(" and ".join(names) for names in part.files)
        raise Refused(f"{folder} lacks {wanted}; download the whole folder")
    for other in sorted(folder.iterdir()) if part.files else ():
        if other.suffix == ".json":
            read_json(other)
        elif other.is_file():
            refuse_pointer(other)
    return config


def _on_meta(cls: type[nn.Module], folder: Path, config: dict[str, Any]) -> Any:
    """The network of a folder, without memory. Raises Refused where its class makes nothing of the config."""
    try:
        with torch.device("meta"):
            if issubclass(cls, ModelMixin):
                return cls.from_config(config)
            return cls(cls.config_class.from_pretrained(folder))
    except Exception as error:  # from deep inside a library: whatever a wrong value leads to
        what = f"{folder / 'config.json'} makes no {cls.__name__}: {type(error).__name__}: {error}"
        raise Refused(f"{what}; {AGAIN}") from error


def _check_weights(folder: Path, network: nn.Module, *, exact: bool) -> None:
    """Raise Refused unless the headers of a folder's weights have every parameter of its network, with its shape.

    exact: by its own name, as the trainer reads it; otherwise by any that its library knows.
    """
    stem = DIFFUSERS if isinstance(network, ModelMixin) else TRANSFORMERS
    stored = SafetensorsFolder(folder, stem).where
    named = {name: [found] for name, found in stored.items()} if exact else _names(stored, network)
    same = dict[int, list[str]]()  # parameters that are tied have several names
    for name, parameter in network.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    lacking = []
    for name, parameter in network.named_parameters():
        found = [one for alias in same[id(parameter)] for one in named.get(alias, ())]
        if odd := [one for one in found if one.dtype not in SAFETENSORS_NAMES]:
            raise Refused(f"{odd[0].file}: {name} is stored as {odd[0].dtype}; {QUANTISED}")
        if not found:
            lacking.append(name)
        elif list(parameter.shape) not in [one.shape for one in found]:
            what = f"{name} has the shape {found[0].shape}, but by config.json it is {list(parameter.shape)}"
            raise Refused(f"{found[0].file}: {what}; download weights and config of one model")
    if lacking:
        what = f"lack {len(lacking)} tensors of a {type(network).__name__}, the first is {lacking[0]}"
        raise Refused(f"{folder}: the weights {what}; {AGAIN}")


def _names(stored: Mapping[str, Stored], network: nn.Module) -> dict[str, list[Stored]]:
    """Tensors by every end of their names, since transformers adds and drops prefixes; of old VAEs by their newer names."""
    if isinstance(network, ModelMixin):
        renamed = dict(stored)
        network._fix_state_dict_keys_on_load(renamed)
        return {name: [found] for name, found in renamed.items()}
    named = dict[str, list[Stored]]()
    for name, found in stored.items():
        words = name.split(".")
        for first in range(len(words)):
            named.setdefault(".".join(words[first:]), []).append(found)
    return named
