"""Edit one picture, or every row of a JSONL, with the base model, a trained transformer or a LoRA; writes PNGs.

    python -m jobs.edit --model.path data/flux-kontext --model.size auto --edit.image dish.jpg --edit.prompt "Warm light" \\
        --edit.transformer runs/NAME/v0/final/transformer --edit.out edits

Runs in one process, without Ray, on the GPU if there is one. Each PNG is named after its image and variant.
"""

from pathlib import Path

import torch
from PIL import Image

from jobs.cli import parse, resolved_toml, run_main
from rlhf.data.media import decode_image, load_image
from rlhf.data.prompts import read_rows
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.sampling import sample
from rlhf.tables import EditConfig
from rlhf.types import noise_from, seed_from


def rows_of(config: EditConfig) -> list[tuple[str, str, Path]]:
    """(name, instruction, picture) of everything to edit. Raises Refused."""
    edit = config.edit
    if edit.image is not None:
        if not Path(edit.image).is_file():
            raise Refused(f"edit.image = {edit.image!r} is no file; give a PNG, JPEG or WEBP")
        return [(Path(edit.image).stem, edit.prompt, Path(edit.image))]
    assert edit.data is not None
    return [(row.image_id, row.instruction, Path(row.image)) for row in read_rows(edit.data).rows]


def main() -> None:
    arguments = parse(EditConfig, description=__doc__ or "")
    config = arguments.config
    edit, model, rollout = config.edit, config.model, config.rollout
    rows = rows_of(config)
    family = load_family(model, "bf16", rollout.guidance_scale)
    sizes = []
    for _, _, picture in rows:
        height, width = decode_image(picture.read_bytes()).shape[:2]
        sizes.append(family.nearest_size(height, width) if model.size == "auto" else (model.height, model.width))
    if arguments.dry_run:
        print(resolved_toml(config))
        print(f"{len(rows)} pictures × {edit.variants} variants → {edit.out}")
        return
    device = ("cuda" if torch.cuda.is_available() else "cpu") if edit.device == "auto" else edit.device
    denoiser = family.load_denoiser(
        device, Path(edit.transformer) if edit.transformer else None, Path(edit.lora) if edit.lora else None
    )
    codec = family.load_codec(device)
    out = Path(edit.out)
    out.mkdir(parents=True, exist_ok=True)
    for (name, instruction, picture), (height, width) in zip(rows, sizes, strict=True):
        source = torch.from_numpy(load_image(picture, height, width, edit.fit))[None]
        condition = codec.encode_text([instruction]) | codec.encode_source(source)
        for variant in range(edit.variants):
            noise = noise_from(seed_from(edit.seed, name, variant), (1, *family.latent_shape(height, width)))
            latents = sample(family, denoiser, condition, noise.to(device), rollout.steps)
            file = out / f"{name}_{variant}.png"
            Image.fromarray(codec.decode(latents)[0].numpy()).save(file)
            print(file, flush=True)


if __name__ == "__main__":
    run_main(main)
