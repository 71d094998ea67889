"""A trained LoRA for other programs: python -m jobs.export RUN --layout comfyui --out lora.safetensors

RUN is runs/NAME or runs/NAME/vN; a LoRA file of any layout that is read (diffusers, ComfyUI, kohya, PEFT) may stand in its place,
with --model, the folder of the model that it belongs to. --form merged writes the whole denoiser with the LoRA in its weights, as
a folder in the diffusers layout. One process, on the CPU, without Ray.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Literal

import torch

from jobs.cli import run_main, say
from jobs.report import newest
from rlhf.errors import Refused, last_line
from rlhf.models.checks import check_model
from rlhf.models.family import Family
from rlhf.models.lora import file_of
from rlhf.models.lora_files import check_layout, converted, write
from rlhf.models.lora_layouts import Layout
from rlhf.runs.folder import check_place, made
from rlhf.tables import ModelTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with final/lora, or a LoRA file")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file; with --form merged a folder")
    parser.add_argument("--form", choices=("lora", "merged"), default="lora")
    parser.add_argument("--layout", choices=("diffusers", "comfyui", "kohya"), help="of a LoRA; default: diffusers")
    parser.add_argument("--model", type=Path, help="the model's folder; of a run the one in its config.toml")
    parser.add_argument("--family", default="flux_kontext", help="of --model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of what is written"
    )
    given = parser.parse_args()
    out, merged = given.out.absolute(), given.form == "merged"
    if out.exists():
        raise Refused(f"--out {out} is there already; choose another")
    if merged and given.layout:
        raise Refused(
            f"--layout {given.layout} is of a LoRA, but --form merged writes whole weights: leave one of them out"
        )
    if merged == (out.suffix == ".safetensors"):
        raise Refused(f"--out {out}: give {'a folder' if merged else 'a file that ends with .safetensors'}")
    check_place(out.parent, "--out")
    lora, model = found(given.run.absolute(), given.model, given.family)
    try:
        family = check_model(model)
        layout: Literal["diffusers"] | Layout = given.layout or "diffusers"
        check_layout(family, layout, "--layout")
        tensors = None if merged else converted(family, lora, layout)
        made(out.parent, "--out")
        if tensors is None:
            merge(family, lora, out, getattr(torch, given.dtype))
        else:
            write(tensors, out, getattr(torch, given.dtype))
    except OSError as error:
        raise Refused(f"--out {out} cannot be written: {error.strerror}; choose another") from error
    say(str(out))


def found(path: Path, model: Path | None, family: str) -> tuple[Path, ModelTable]:
    """The LoRA's folder or file, and its model, in float32. Raises Refused."""
    if not path.exists():
        raise Refused(f"{path}: no such file or folder")
    if file_of(path).is_file():
        if file_of(path).suffix != ".safetensors":
            raise Refused(f"{path} is no LoRA: give a .safetensors file, its folder, or a finished run")
        if model is None:
            raise Refused(f"{path} is a LoRA: give --model, the folder of the model that it belongs to")
        return path, ModelTable(family=family, path=str(model), dtype="float32")
    run = newest(path)
    config, loras = run / "config.toml", sorted(run.glob("final/lora*"))
    if not config.is_file() or not loras:
        raise Refused(f"{run} holds no config.toml and final/lora: give a finished run of a LoRA, or a LoRA file")
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))["model"]
        known = {key: value for key, value in table.items() if key in ModelTable.model_fields}
        changes = {"dtype": "float32", "base": "bf16"} | ({"path": str(model)} if model else {})
        return loras[0], ModelTable.model_validate(known | changes)
    except (ValueError, LookupError) as error:
        raise Refused(
            f"{config} names no model ({last_line(error)}): give the LoRA itself, {loras[0]}, and --model"
        ) from error


def merge(family: Family, lora: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the whole denoiser, its weights changed by the LoRA in float32 and then rounded to `dtype`."""
    denoiser = family.load_denoiser("cpu", lora=lora)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    torch.nn.Module.to(denoiser, dtype)
    denoiser.register_to_config(_name_or_path="")  # a path of this machine
    denoiser.save_pretrained(out)


if __name__ == "__main__":
    run_main(main)
