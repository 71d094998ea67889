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
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from jobs.cli import run_main, say
from jobs.report import newest
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.models.lora import MODULES_FILE, read_lora
from rlhf.models.lora_layouts import Layout, from_diffusers
from rlhf.runs.durable import durable
from rlhf.runs.folder import made
from rlhf.tables import ModelTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with final/lora, or a LoRA file")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file; with --form merged a folder")
    parser.add_argument("--form", choices=("lora", "merged"), default="lora")
    parser.add_argument("--layout", choices=("diffusers", "comfyui", "kohya"), default="diffusers", help="of a LoRA")
    parser.add_argument("--model", type=Path, help="the model's folder; of a run the one in its config.toml")
    parser.add_argument("--family", default="flux_kontext", help="of --model")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of what is written"
    )
    given = parser.parse_args()
    if given.out.exists():
        raise Refused(f"--out {given.out} is there already; choose another")
    lora, model = found(given.run.absolute(), given.model, given.family)
    family = load_family(model)
    made(given.out.absolute().parent, "--out")
    if given.form == "merged":
        merge(family, lora, given.out, getattr(torch, given.dtype))
    else:
        convert(family, lora, given.out, given.layout, getattr(torch, given.dtype))
    say(str(given.out))


def found(path: Path, model: Path | None, family: str) -> tuple[Path, ModelTable]:
    """The LoRA's folder or file, and its model, in float32. Raises Refused."""
    if path.is_file():
        if model is None:
            raise Refused(f"{path} is a file: give --model, the folder of the model that it belongs to")
        return path, ModelTable(family=family, path=str(model), dtype="float32")
    run = newest(path)
    config, loras = run / "config.toml", sorted(run.glob("final/lora*"))
    if not config.is_file() or not loras:
        raise Refused(f"{run} holds no config.toml and final/lora: give a finished run of a LoRA, or a LoRA file")
    table = tomllib.loads(config.read_text(encoding="utf-8"))["model"]
    known = {key: value for key, value in table.items() if key in ModelTable.model_fields}
    changes = {"dtype": "float32"} | ({"path": str(model)} if model else {})
    return loras[0], ModelTable.model_validate(known | changes)


def convert(family: Family, lora: Path, out: Path, layout: Literal["diffusers"] | Layout, dtype: torch.dtype) -> None:
    """Write a LoRA in a layout. Raises Refused for one that does not fit, or that was trained together with modules."""
    if (lora / MODULES_FILE).is_file():
        raise Refused(f"{lora} holds whole modules beside the LoRA, which no other layout has: give --form merged")
    denoiser = family.empty_denoiser(torch.float32)
    tensors = read_lora(denoiser, lora, family.denoiser_folder)
    if layout != "diffusers":
        if not isinstance(denoiser, FluxTransformer2DModel):
            raise Refused(
                f"--layout {layout} is known of FLUX alone, not of a {type(denoiser).__name__}: give diffusers"
            )
        tensors = from_diffusers(tensors, denoiser, family.denoiser_folder, layout)
    written = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in tensors.items()}
    with durable(out) as partial:
        save_file({key: value.contiguous() for key, value in written.items()}, partial)


def merge(family: Family, lora: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the whole denoiser, its weights changed by the LoRA in float32 and then rounded to `dtype`."""
    denoiser = family.load_denoiser("cpu", lora=lora)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    denoiser.to(dtype).save_pretrained(out)


if __name__ == "__main__":
    run_main(main)
