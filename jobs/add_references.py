"""Give a Wan text-to-video model the layers by which it sees pictures of subjects, untrained:

    python -m jobs.add_references data/wan2.1-t2v-1.3b --clip data/wan2.1-i2v --out data/wan-subject [--fused]

All folders are in the diffusers layout. --clip holds image_encoder/ and image_processor/, as Wan's image-to-video model does.
What is written is a folder for model.family = "wan_subject", which makes the videos that the first one makes until its new
layers are trained. --fused adds a third attention, to references and text together.
"""

import argparse
import os
import shutil
from contextlib import suppress
from pathlib import Path

from diffusers import WanTransformer3DModel

from jobs.cli import run_main, say
from rlhf.errors import Refused
from rlhf.models.checks import check_weights
from rlhf.models.wan_network import is_new, with_references
from rlhf.shards.files import read_json

CLIP = ("image_encoder", "image_processor")
TEXT_TOKENS = 512
"""That Wan pads a text to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a WanPipeline")
    parser.add_argument("--clip", type=Path, required=True, help="folder with image_encoder/ and image_processor/")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--fused", action="store_true", help="with k_fused, v_fused and norm_k_fused")
    parser.add_argument("--text_len", type=int, default=TEXT_TOKENS, help="tokens of a text (default: %(default)s)")
    given = parser.parse_args()
    add_references(given.base, given.clip, given.out, fused=given.fused, text_len=given.text_len)


def add_references(base: Path, clip: Path, out: Path, *, fused: bool, text_len: int = TEXT_TOKENS) -> None:
    """Write the folder. Raises Refused for folders that are not those of such models, and for an `out` that is there."""
    if out.exists():
        raise Refused(f"--out {out} is there already: give a new folder")
    if (kind := read_json(base / "model_index.json").get("_class_name")) != "WanPipeline":
        raise Refused(f"{base} is a {kind}: give the folder of a WanPipeline, which makes videos of texts")
    config = read_json(base / "transformer" / "config.json")
    if config.get("_class_name") != "WanTransformer3DModel" or config.get("image_dim") is not None:
        raise Refused(f"{base}/transformer is no text-to-video network: give the base model")
    for name in CLIP:
        if not (clip / name).is_dir():
            raise Refused(
                f"--clip {clip} holds no {name}/: give the folder of Wan's image-to-video model, or of its two parts"
            )
    width = read_json(clip / "image_encoder" / "config.json")["hidden_size"]
    network = WanTransformer3DModel.from_pretrained(base / "transformer")
    check_weights(base / "transformer", network, exact=True)
    whole = with_references(network, clip_dim=width, text_len=text_len, fused=fused)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(base, beside, ignore=shutil.ignore_patterns("transformer", ".*"), copy_function=_linked)
    for name in CLIP:
        shutil.copytree(clip / name, beside / name, copy_function=_linked)
    whole.save_pretrained(beside / "transformer")
    beside.rename(out)
    count = sum(parameter.numel() for name, parameter in whole.named_parameters() if is_new(name))
    say(f'{out}: {count:,} new parameters; model.family = "wan_subject"')


def _linked(source: str, target: str) -> None:
    """A second name of a file of weights, which costs no space; of what may be edited, and on another disk, a copy."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            os.link(os.path.realpath(source), target)
            return
    shutil.copy2(source, target)


if __name__ == "__main__":
    run_main(main)
