"""Human Preference Score v2: CLIP ViT-H/14 cosine between picture and prompt (arXiv 2306.09341).

Loads the published checkpoints (`HPS_v2_compressed.pt`, `HPS_v2.1_compressed.pt`) into open_clip's maintained ViT-H-14.
A JSON file of the same stem beside a checkpoint holds another open_clip model config, so a tiny checkpoint of the same
format loads through the same code.

The transform is the official one (longest side to the model's size, bicubic on the tensor, zero padding around the
centre, normalise). open_clip's own would centre-crop and lose 40 % of a 1312×784 picture. Scores equal those of the
`hpsv2` package's own code, which fails on two kinds of picture: not square with a longest side of exactly the model's size,
and so narrow that the shorter side rounds to 0.

bfloat16 instead of float32 moved scores by at most 0.005 and 0.0015 on average, where they spread by 0.09–0.19, in the
tiny config on a CPU (24 pictures, 6 prompts, 4 seeds); it was not measured on the published checkpoints.

Left out: the logit scale (tables print the cosine ×100), and the `hpsv2` package's scoring code, which reloads the
checkpoint on every call and lacks its vocabulary file.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode

from rlhf.errors import Refused
from rlhf.rewards.config import HPSJudgeConfig
from rlhf.rewards.features import cached_texts, existing, forward_rows, letterbox, read_torch
from rlhf.rewards.protocols import Items, Media, Reward, Sources, picture_of, quick_fingerprint
from rlhf.shards.files import read_header, read_json

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
_BUFFERS = ("attn_mask", "position_ids")


class HPSv2Reward(Reward):
    """The `Reward` "hps": L2-normalised image feature · text feature, in [−1, 1], around 0.2–0.3 for real weights."""

    def __init__(self, name: str, judge: HPSJudgeConfig, device: str) -> None:
        self.name, self.device = name, device
        file = checkpoint_of(judge)
        self.version = f"{file.stem}@{quick_fingerprint(file)}"
        self.rows, self.dtype = judge.padded_rows, getattr(torch, judge.dtype)
        self.model = load_model(file).to(device=device, dtype=self.dtype)
        height, *width = np.ravel(self.model.visual.image_size).tolist()  # one number, or both
        if width not in ([], [height]):
            raise Refused(f"an HPSv2 model reads square pictures, not {height}×{width[0]}")
        self.image_size = height
        tokenize = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.texts = cached_texts(lambda prompt: self.model.encode_text(tokenize([prompt]).to(device)))

    @classmethod
    def check(cls, key: str, judge: HPSJudgeConfig) -> None:
        load_model(checkpoint_of(judge), "meta")

    @torch.inference_mode()
    def _scores(self, media: Media, prompts: Sequence[str], sources: Sequence[Sources], items: Items) -> list[float]:
        """Cosine of each picture with its prompt; sources and items are not read."""
        pixels = torch.stack([transform(picture_of(medium), self.image_size) for medium in media])
        return (forward_rows(self._encode_images, self.rows, pixels) * self.texts(prompts)).sum(dim=-1).tolist()

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(pixels.to(self.device, self.dtype)).float(), dim=-1)


def transform(image: np.ndarray, size: int) -> Tensor:
    """The official HPSv2 transform of one uint8 (H, W, 3) picture: fp32 (3, size, size), normalised as CLIP is."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return letterbox(image, size, InterpolationMode.BICUBIC, fill=0.0, mean=mean, std=std)


def checkpoint_of(judge: HPSJudgeConfig) -> Path:
    """The file of a judge. Raises: Refused."""
    needed = f"a checkpoint, or a folder that holds {FILES[judge.version]}"
    return find_checkpoint(existing("judges.hps.path", judge.path, needed), judge.version)


def find_checkpoint(path: Path, version: str) -> Path:
    """`path` itself, or the published file of `version` in the folder `path`. Raises: Refused."""
    file = path / FILES[version] if path.is_dir() else path
    if not file.is_file():
        raise Refused(
            f"judges.hps.path: no HPSv2 checkpoint at {file}; give a .pt or .safetensors file, or a folder that holds "
            f"{FILES[version]} (judges.hps.version = {version!r})"
        )
    return file


def load_model(file: Path, device: str = "cpu") -> torch.nn.Module:
    """An open_clip CLIP in eval mode with the weights of `file`, fp32 on the CPU; on "meta" without their values.

    Raises: Refused if the file is no HPSv2-format checkpoint or a tensor is missing, unknown or of another shape.
    """
    with torch.device(device):
        model = empty_model(file)
    state = _read_state(file, device)
    names = {name: name.removeprefix("module.") for name in state}
    try:
        model.load_state_dict({new: state[old] for old, new in names.items() if not new.endswith(_BUFFERS)})
    except RuntimeError as error:
        sidecar = file.with_suffix(".json")
        source = f"the config {sidecar.name}" if sidecar.is_file() else "ViT-H-14"
        _, *faults = str(
            error
        ).splitlines()  # torch's: a line that names the class, then one per kind of fault or tensor
        shown = "; ".join(fault.strip()[:200] for fault in faults[:3])
        raise Refused(f"{file} does not fit {source}: {shown}; give {' or '.join(FILES.values())}") from error
    return model.eval().requires_grad_(False)


def empty_model(file: Path) -> torch.nn.Module:
    """The network of a checkpoint before its weights are read."""
    sidecar = file.with_suffix(".json")
    return open_clip.CLIP(**(read_json(sidecar) if sidecar.is_file() else open_clip.get_model_config("ViT-H-14")))


def _read_state(file: Path, device: str) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        header = read_header(file)
        if device == "meta":
            return {name: torch.empty(stored.shape, device=device) for name, stored in header.items()}
        return load_file(file)
    checkpoint = read_torch(file, device)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise Refused(f"{file} is no HPSv2 checkpoint: it has no `state_dict`")
    return state
