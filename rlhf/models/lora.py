"""LoRA files, and whole modules trained with them: read into a denoiser only where all that they hold fits it.

diffusers loads the keys that it knows and passes over the rest, down to none: a file in another program's layout would give the
base model's pictures. So every key is held against the denoiser's layers first, by the file's header alone. Read are files in
the diffusers layout, `transformer.NAME.lora_A.weight` with its `lora_B` (families with a UNet: `unet.`), and for FLUX and
Qwen-Image those of other programs (`lora_layouts`). Left out: DoRA, biases of adapters, adapters of text encoders.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rlhf.errors import Refused, last_line
from rlhf.models import lora_layouts
from rlhf.shards.files import SAFETENSORS_NAMES, is_pointer

LORA_FILE = LORA_WEIGHT_NAME_SAFE
PEFT_FILE, PEFT_SETTINGS = SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME
MODULES_FILE, MODULES_TABLE = "modules.safetensors", "modules.json"
"""Whole submodules that were trained, by their plain names, and the patterns that chose them."""
LAYOUTS = {
    r"diffusion_model\.": "ComfyUI's layout (diffusion_model.…)",
    r"base_model\.model\.": "PEFT's layout (base_model.model.…)",
    r"lora_te\d?_": "kohya's layout of a text encoder (lora_te…)",
    r"lora_(unet|transformer|prior\w*)_": "kohya's layout (lora_unet_…)",
    r"lycoris_": "LyCORIS' layout (lycoris_…)",
    r"double_blocks\.|single_blocks\.": "Black Forest Labs' layout (double_blocks.…)",
    r"transformer\.": "the diffusers layout of a transformer (transformer.…)",
    r"unet\.": "the diffusers layout of a UNet (unet.…)",
    r"text_encoder": "the diffusers layout of a text encoder (text_encoder.…)",
}
"""How the keys of a layout begin, and its name."""
REWRITE = f"export it again, or take the entry {LORA_ADAPTER_METADATA_KEY} out of its header"
Shapes = Mapping[str, tuple[int, ...]]


class Misfit(Refused):
    """What is wrong with a file of trained weights; `file`, `what` and `remedy` make its message."""

    def __init__(self, file: Path, what: str, remedy: str):
        super().__init__(file, what, remedy)
        self.file, self.what, self.remedy = file, what, remedy

    def __str__(self) -> str:
        return f"{self.file} {self.what}; {self.remedy}"


def check_lora(path: Path, denoiser: nn.Module, prefix: str) -> None:
    """Raise Misfit unless a LoRA file, or its folder with the modules trained beside it, fits the denoiser entirely.

    A folder of modules alone is one too. prefix: what the keys begin with. Reads no matrix, so the denoiser may be on the meta
    device.
    """
    if is_modules(path):
        check_modules(path, denoiser)
        return
    file, example = file_of(path), f"{prefix}.NAME.lora_A.weight"
    remedy = f"give a LoRA for this model in the diffusers layout ({example} and lora_B), e.g. RUN/final/lora"
    shapes, others = _shapes(file, remedy), lora_layouts.prefixes(denoiser)
    if others and any(key.startswith(others) for key in shapes):
        remedy += ", or in ComfyUI's, kohya's or PEFT's; of the denoiser alone"
    if shapes and all(key.startswith(others) for key in shapes):
        shapes = _in_diffusers(shapes, file, denoiser, prefix, remedy)
    if not shapes:
        raise Misfit(file, "holds no tensors", remedy)
    if file.name == MODULES_FILE:
        raise Misfit(file, "holds whole modules", f"give their folder, {file.parent}")
    if not any("lora" in key or "lokr" in key or "hada" in key for key in shapes):
        what = f"is no LoRA: none of its {len(shapes)} keys names an adapter, the first is {min(shapes)!r}"
        raise Misfit(file, what, f"{remedy}; whole weights are given by their folder, as tuned.denoiser")
    mine = {key.removeprefix(f"{prefix}."): shape for key, shape in shapes.items() if key.startswith(f"{prefix}.")}
    if len(mine) < len(shapes):
        unread = [key for key in shapes if not key.startswith((f"{prefix}.", *others))]
        unread = unread or [key for key in shapes if not key.startswith(f"{prefix}.")]  # two layouts in one file
        found = " and ".join(f"{count} in {name}" for name, count in Counter(map(_layout, unread)).most_common())
        what = f"has {len(unread)} of {len(shapes)} keys that are not read: {found}; the first is {min(unread)!r}"
        raise Misfit(file, what, remedy)
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, _ConvNd))}
    if faults := [fault for key in sorted(mine) if (fault := _fault(key, mine, layers))]:
        what = f"fits this {type(denoiser).__name__} in {len(mine) - len(faults)} of {len(mine)} keys; the first that does not"
        raise Misfit(file, f"{what}, {prefix}.{faults[0]}", remedy)
    _check_settings(file, prefix)
    if (path / MODULES_FILE).is_file():
        check_modules(path, denoiser)
    elif file.name == LORA_FILE and (file.parent / MODULES_FILE).is_file():
        raise Misfit(file, f"was trained together with {MODULES_FILE} beside it", f"give their folder, {file.parent}")


def _in_diffusers(
    shapes: Shapes, file: Path, denoiser: nn.Module, prefix: str, remedy: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of another program's file under diffusers' names. Raises Misfit."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with safe_open(file, "pt") as opened:
        tensors |= {key: opened.get_tensor(key) for key in tensors if key.endswith(".alpha")}
    try:
        found = lora_layouts.to_diffusers(tensors, denoiser, prefix)
    except lora_layouts.Unreadable as error:
        raise Misfit(file, f"does not fit: {error}", remedy) from error
    if min(tensors).startswith(lora_layouts.PEFT):
        _peft_settings(file, prefix)
    return {key: tuple(tensor.shape) for key, tensor in found.items()}


def _check_settings(file: Path, prefix: str) -> None:
    """Raise Misfit where a file's header has settings of its adapters, as diffusers writes them, and some are missing."""
    with safe_open(file, "pt") as tensors:
        settings = (tensors.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if settings is None:
        return
    try:
        known = json.loads(settings)
        about = {key: known.get(f"{prefix}.{key}") for key in ("r", "lora_alpha", "target_modules")}
    except (ValueError, AttributeError) as error:
        raise Misfit(file, f"has a header whose {LORA_ADAPTER_METADATA_KEY} is no JSON object", REWRITE) from error
    if absent := [key for key, value in about.items() if not value]:
        raise Misfit(file, f"has a header whose {LORA_ADAPTER_METADATA_KEY} lacks {', '.join(absent)}", REWRITE)


def _layout(key: str) -> str:
    return next((name for begins, name in LAYOUTS.items() if re.match(begins, key)), "no layout that is known")


def _fault(key: str, shapes: Shapes, layers: Mapping[str, nn.Module]) -> str:
    """Why a key, without its prefix, fits no layer; empty: it does."""
    found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
    if found is None:
        return f"{key}, is neither a lora_A.weight nor a lora_B.weight"
    name, half = found.groups()
    if name not in layers:
        return f"{key}, belongs to no layer of it"
    other = f"{name}.lora_{'B' if half == 'A' else 'A'}.weight"
    if other not in shapes:
        return f"{key}, lacks its other half {other.removeprefix(f'{name}.')}"
    layer: Any = layers[name]
    whole = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
    rank, ones = next(iter(shapes[f"{name}.lora_A.weight"]), 0), (1,) * (len(whole) - 2)
    fits = (rank, *whole[1:]) if half == "A" else (whole[0], rank, *ones)
    return "" if shapes[key] == fits and rank else f"{key}, has shape {shapes[key]}, but its layer takes {fits}"


def _shapes(file: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor in a safetensors file, by its key."""
    if not file.is_file():
        raise Misfit(file, "does not exist", remedy)
    if is_pointer(file):
        raise Misfit(file, "is a Git LFS pointer, not the file itself", f"run `git lfs pull` in {file.parent}")
    try:
        with safe_open(file, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  no mapping
            if odd := [key for key, found in slices.items() if found.get_dtype() not in SAFETENSORS_NAMES]:
                raise Misfit(file, f"stores {odd[0]} as {slices[odd[0]].get_dtype()}", remedy)
            return {key: tuple(found.get_shape()) for key, found in slices.items()}
    except (OSError, SafetensorError) as error:
        raise Misfit(file, f"cannot be read as safetensors: {error}", remedy) from error


def load_lora(denoiser: Any, path: Path, prefix: str) -> None:
    """Put a LoRA, from its file or its folder with the modules trained beside it, into a diffusers model. Raises Misfit."""
    check_lora(path, denoiser, prefix)
    file = file_of(path)
    if (path / MODULES_FILE).is_file():
        load_modules(denoiser, path)
    if is_modules(path):
        return
    with safe_open(file, "pt") as tensors:
        is_ours = next(iter(tensors.keys())).startswith(f"{prefix}.")
    if not is_ours:
        denoiser.load_lora_adapter(read_lora(denoiser, path, prefix), prefix=prefix)
        return
    try:
        # Without a weight_name diffusers finds no file in a folder, and does not read alpha from a file's header.
        denoiser.load_lora_adapter(str(file), weight_name=file.name, prefix=prefix)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Misfit(
            file, f"does not load, its header does not fit its tensors: {last_line(error)}", REWRITE
        ) from error


def read_lora(denoiser: nn.Module, path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """A LoRA's tensors in diffusers' layout, with alpha / rank multiplied into lora_B. Raises Misfit.

    The denoiser may be on the meta device.
    """
    file = file_of(path)
    if is_modules(path):
        raise Misfit(path, "holds whole modules, and no LoRA", "give the LoRA of another run")
    check_lora(path, denoiser, prefix)
    tensors = load_file(file)
    if min(tensors).startswith(f"{prefix}."):
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        settings = {key.removeprefix(f"{prefix}."): value for key, value in header.items()}
    else:
        settings = _peft_settings(file, prefix) if min(tensors).startswith(lora_layouts.PEFT) else {}
        try:
            tensors = lora_layouts.to_diffusers(tensors, denoiser, prefix)
        except lora_layouts.Unreadable as error:
            raise Misfit(file, f"does not fit: {error}", "give a LoRA that was trained") from error
    if settings.get("use_rslora") or settings.get("use_dora"):
        raise Misfit(file, "is scaled by rsLoRA or DoRA, which is not read", REWRITE)
    alphas = settings.get("alpha_pattern") or {}
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        layer, rank = key.removeprefix(f"{prefix}.").removesuffix(".lora_B.weight"), tensors[key].shape[1]
        alpha = alphas.get(get_pattern_key(alphas, layer), settings.get("lora_alpha")) or rank
        tensors[key] = tensors[key] * (alpha / rank)
    return tensors


def is_modules(path: Path) -> bool:
    """Whether a folder holds trained modules and no LoRA beside them."""
    return (path / MODULES_FILE).is_file() and not file_of(path).is_file()


def read_modules(denoiser: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an export of modules, by their names in a denoiser, which may be on the meta device. Raises Misfit."""
    check_modules(folder, denoiser)
    return load_file(folder / MODULES_FILE)


def file_of(path: Path) -> Path:
    """The file of a LoRA that is given by it or by its folder."""
    if not path.is_dir():
        return path
    return path / PEFT_FILE if (path / PEFT_FILE).is_file() and not (path / LORA_FILE).is_file() else path / LORA_FILE


def _peft_settings(file: Path, prefix: str) -> dict[str, Any]:
    """PEFT's settings of a file in its layout, which alone know alpha. Raises Misfit."""
    beside = file.parent / PEFT_SETTINGS
    try:
        settings = json.loads(beside.read_text())
        assert settings["lora_alpha"] > 0
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        what = f"is in PEFT's layout, of which {beside.name} beside it says the strength, but that cannot be read"
        remedy = f"copy it there, or give the LoRA in the diffusers layout ({prefix}.NAME.lora_A.weight)"
        raise Misfit(file, f"{what} ({last_line(error)})", remedy) from error
    return settings


def check_modules(folder: Path, denoiser: nn.Module) -> None:
    """Raise Misfit unless the modules of an export are all that its patterns choose in a denoiser, in their shapes."""
    file, table = folder / MODULES_FILE, folder / MODULES_TABLE
    remedy = f"give the whole folder of an export of this model, with {MODULES_TABLE}"
    shapes = _shapes(file, remedy)
    try:
        patterns = json.loads(table.read_text())["patterns"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Misfit(table, f"cannot be read: {last_line(error)}", remedy) from error
    model = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    if strange := [name for name, shape in shapes.items() if model.get(name) != shape]:
        shown = f"{min(strange)} of shape {shapes[min(strange)]}"
        raise Misfit(
            file, f"has {len(strange)} of {len(shapes)} tensors that are none of this model's: {shown}", remedy
        )
    if lacking := {name for name in model if _chosen(name, patterns)} - shapes.keys():
        raise Misfit(file, f"lacks {len(lacking)} tensors that {patterns} chose: {min(lacking)}", remedy)


def _chosen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter lies in a module, at any depth, that a pattern matches."""
    parts = name.split(".")
    modules = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(fnmatchcase(module, pattern) for module in modules for pattern in patterns)


@torch.no_grad()
def load_modules(denoiser: nn.Module, folder: Path) -> None:
    """Put the modules of an export into a plain denoiser. Raises Misfit."""
    parameters = dict(denoiser.named_parameters())
    for name, value in read_modules(denoiser, folder).items():
        parameters[name].copy_(value)
