"""Whether a model folder holds what will be needed: asked by every job before anything dear starts.

A family says what it needs (`Family.needs`); here it is looked for. JSON files and the headers of weights are read, and no
tensor; tokenizers are opened. A folder of 60 GB takes seconds. Left out: whether the values of the weights make sense.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import AutoProcessor, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.family import INDEX_FILE, NUMBER, Family, Need
from rlhf.models.folder import LONGEST
from rlhf.shards.files import (
    AGAIN,
    DIFFUSERS,
    SAFETENSORS_NAMES,
    TRANSFORMERS,
    SafetensorsFolder,
    Stored,
    read_json,
    refuse_broken,
)
from rlhf.tables import ModelTable, SolverTable

QUANTISED = "quantised models are not read: give the model in bfloat16, float16 or float32, and set model.base"


def check_model(model: ModelTable, *, weights: bool = True) -> Family:
    """The family of a recipe's [model], whose folder and denoiser hold all that it needs. Raises Refused.

    weights: False asks for the JSON files of the folder alone, from which its memory can be told.
    """
    family, root = load_family(model), Path(model.path)
    try:
        if not root.is_dir():
            what = "is a single file" if root.is_file() else "there is no such folder"
            raise Refused(
                f"{what}; give the folder of a whole model in the diffusers layout, with its model_index.json"
            )
        for name, need in family.needs():
            accepted = not name and model.accept_index
            need = replace(need, values={} if accepted else need.values, files=need.files if weights else ())
            _check_config(root / name, need)
            is_denoiser = name == family.denoiser_folder
            if weights and need.opens:
                _check_opens(root / name, need.opens)
            if need.network is None:
                continue
            network = on_meta(need.network, root / name)
            if weights and not (is_denoiser and model.denoiser):
                check_weights(root / name, network, exact=is_denoiser)
        _ = family.process  # which refuses a scheduler that it does not know
    except Refused as error:
        raise Refused(f"model.path = {model.path!r}: {error}") from error
    try:
        if weights and model.denoiser is not None:
            check_denoiser(family, Path(model.denoiser))
    except Refused as error:
        raise Refused(f"model.denoiser = {model.denoiser!r}: {error}") from error
    return family


def check_sampling(family: Family, sampling: SolverTable) -> None:
    """Raise Refused for a negative prompt that nothing would be told."""
    if sampling.negative_prompt is None:
        return
    given = f"sampling.negative_prompt = {sampling.negative_prompt!r}"
    if not family.needs_unguided(sampling.guidance_scale):
        raise Refused(
            f"{given} is never read: guidance has no other branch here; leave it out, or raise guidance_scale"
        )
    if not family.takes_negative_prompt:
        raise Refused(f"{given}, but this model's other branch sees zeros in place of a text; leave it out")


def check_denoiser(family: Family, folder: Path) -> None:
    """Raise Refused where a folder is no trained denoiser of a checked family's model."""
    need = next(need for name, need in family.needs() if name == family.denoiser_folder)
    assert need.network is not None, "a denoiser has a class"
    base, remedy = Path(family.path) / family.denoiser_folder, f"give e.g. RUN/final/{family.denoiser_folder}"
    if not (folder / need.file).is_file():
        raise Refused(f"{folder} holds no {need.file}; {remedy}")
    _check_config(folder, need)
    mine, ours = on_meta(need.network, folder), on_meta(need.network, base)
    for name in sorted({*mine.config, *ours.config}):
        given, known = mine.config.get(name), ours.config.get(name)
        if not name.startswith("_") and json.dumps(given) != json.dumps(known):
            what = f"{name} = {given!r}, but the base model has {known!r}"
            raise Refused(f"{folder / need.file}: {what}; give a folder that was trained from this model")
    check_weights(folder, mine, exact=True)


def _check_config(folder: Path, need: Need) -> None:
    """Raise Refused where the file that says what a folder is, or one that is needed beside it, is not what the family takes."""
    file = folder / need.file
    config, values = read_json(file), dict(need.values)
    if need.network is not None and issubclass(need.network, ModelMixin):
        values = {"_class_name": (need.network.__name__,)} | values
    if config.get("quantization_config") is not None:
        raise Refused(f"{file} has a quantization_config; {QUANTISED}")
    for key, known in values.items():
        value = config.get(key)
        if value not in known and not (NUMBER in known and isinstance(value, NUMBER)):
            wanted = " or ".join("a number" if one is NUMBER else str(one) for one in known if one is not None)
            remedy = "give a folder of this family's model, or set model.family to that of the folder"
            if need.file == INDEX_FILE:
                remedy += "; for a copy of the right model that has another's index set model.accept_index = true"
            raise Refused(f"{file}: {key} = {value!r}, but this family takes {wanted or 'none'}; {remedy}")
    if need.files and not any(all((folder / name).is_file() for name in names) for names in need.files):
        wanted = ", or ".join(" and ".join(names) for names in need.files)
        raise Refused(f"{folder} lacks {wanted}; download the whole folder")
    if need.files:
        refuse_broken(folder)


def _check_opens(folder: Path, opener: Any) -> None:
    """Raise Refused where the files of a tokenizer or processor make none."""
    kind = {AutoTokenizer: "tokenizer", AutoProcessor: "processor"}[opener]
    try:
        opened = opener.from_pretrained(folder, local_files_only=True)
        if kind == "tokenizer":
            limit = opened.model_max_length
            opened("a", padding="max_length", max_length=limit if limit <= LONGEST else 2, truncation=True)
        else:
            opened(text=["a"], return_tensors="pt")
    except Exception as error:  # from deep inside a library
        raise Refused(f"{folder} makes no {kind}: {type(error).__name__}: {error}; {AGAIN}") from error


def on_meta(cls: Any, folder: Path) -> Any:
    """The network of a folder without memory; of a class of diffusers or transformers. Raises Refused for a senseless config."""
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            if issubclass(cls, ModelMixin):
                return cls.from_config(config)
            return cls(cls.config_class.from_pretrained(folder))
    except Exception as error:  # from deep inside a library: whatever a wrong value leads to
        what = f"{folder / 'config.json'} makes no {cls.__name__}: {type(error).__name__}: {error}"
        raise Refused(f"{what}; {AGAIN}") from error


def check_weights(folder: Path, network: nn.Module, *, exact: bool = False) -> None:
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
    known = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers())
    if exact and (strange := sorted(stored.keys() - known.keys())):
        what = f"hold {len(strange)} tensors that a {type(network).__name__} of this config has not, the first is {strange[0]}"
        raise Refused(f"{folder}: the weights {what}; download weights and config of one model")


def _names(stored: Mapping[str, Stored], network: nn.Module) -> dict[str, list[Stored]]:
    """Tensors by the names that their library gives them when it loads them, since it renames those of older versions."""
    if isinstance(network, ModelMixin):
        renamed = dict(stored)
        network._fix_state_dict_keys_on_load(renamed)
        return {name: [found] for name, found in renamed.items()}
    renamings = get_model_conversion_mapping(network)
    plain = [one for one in renamings if not isinstance(one, WeightConverter)]
    converters = [one for one in renamings if isinstance(one, WeightConverter)]
    parameters, prefix = network.state_dict(), network.base_model_prefix
    named = dict[str, list[Stored]]()
    for name, found in stored.items():
        newer = rename_source_key(name, plain, converters, prefix, parameters)[0]
        if newer not in parameters and name in parameters:
            newer = name
        named.setdefault(newer, []).append(found)
    return named
