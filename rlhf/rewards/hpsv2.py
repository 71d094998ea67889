"""Human Preference Score v2: CLIP ViT-H/14 cosine between picture and prompt (arXiv 2306.09341).

Loads the published checkpoints (`HPS_v2_compressed.pt`, `HPS_v2.1_compressed.pt`) into open_clip's maintained ViT-H-14.
A JSON file of the same stem beside a checkpoint holds another open_clip model config, so a tiny checkpoint of the same
format loads through the same code.

The transform is the official one (longest side to the model's size, bicubic on the tensor, zero padding around the
centre, normalise). open_clip's own would centre-crop and lose 40 % of a 1312×784 picture. Scores equal those of the
`hpsv2` package's own code; two kinds of picture, which it fails on, get one here: not square with a longest side of
exactly the model's size, and so narrow that the shorter side rounds to 0.

bfloat16 instead of float32 moved scores by at most 0.005 and 0.0015 on average, where they spread by 0.09–0.19, in the
tiny config on a CPU (24 pictures, 6 prompts, 4 seeds); it was not measured on the published checkpoints.

Left out: the logit scale (tables print the cosine ×100), and the `hpsv2` package's scoring code, which reloads the
checkpoint on every call and lacks its vocabulary file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from rlhf.data.media import check_array
from rlhf.errors import Refused
from rlhf.rewards.config import HPSJudgeConfig
from rlhf.rewards.features import TextFeatures, existing, forward_rows
from rlhf.rewards.protocols import Sources, check_batch, checked_scores, fingerprint, picture_of
from rlhf.types import Item

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
_BUFFERS = ("attn_mask", "position_ids")


class HPSv2Reward:
    """The `Reward` "hps": L2-normalised image feature · text feature, in [−1, 1], around 0.2–0.3 for real weights."""

    name = "hps"

    def __init__(
        self,
        path: Path | str,
        *,
        version: Literal["v2.0", "v2.1"] = "v2.1",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_rows: int | None = None,
    ) -> None:
        """path: a checkpoint file, or a folder that holds the file of `version` under its published name.

        batch_rows: see `forward_rows`.
        """
        file = find_checkpoint(Path(path), version)
        self.device = device
        self.dtype = dtype
        self.batch_rows = batch_rows
        self.model = load_model(file, device=device, dtype=dtype)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.image_size = _square(self.model.visual.image_size)
        self.version = f"{file.stem}@{fingerprint(file)}"
        self.texts = TextFeatures(lambda prompt: self.model.encode_text(self.tokenizer([prompt]).to(device)))

    @classmethod
    def from_config(cls, name: str, judge: HPSJudgeConfig, device: str) -> Self:
        """`judges.hps` on `device`."""
        return cls(
            existing("judges.hps.path", judge.path, f"a checkpoint, or a folder that holds {FILES[judge.version]}"),
            version=judge.version,
            device=device,
            dtype=getattr(torch, judge.dtype),
            batch_rows=judge.max_batch_size if judge.pad_batches else None,
        )

    @torch.inference_mode()
    def score(
        self, media: Sequence[np.ndarray], prompts: Sequence[str], sources: Sequence[Sources], items: Sequence[Item]
    ) -> list[float]:
        """Cosine of each picture with its prompt; sources and items are not read. See `Reward.score`."""
        check_batch(media, prompts, sources, items)
        if not media:
            return []
        pixels = torch.stack([transform(picture_of(medium), self.image_size) for medium in media])
        cosines = (forward_rows(self._encode_images, pixels, self.batch_rows) * self.texts(prompts)).sum(dim=-1)
        return checked_scores(self.name, cosines.tolist(), len(media))

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(pixels.to(self.device, self.dtype)).float(), dim=-1)


def transform(image: np.ndarray, size: int) -> Tensor:
    """The official HPSv2 transform of one uint8 (H, W, 3) picture: fp32 (3, size, size), normalised as CLIP is."""
    check_array(image)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    height, width = tensor.shape[1:]
    scale = size / max(height, width)
    if scale != 1.0:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        tensor = resize(tensor, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    tensor = F.pad(tensor, [left, size - width - left, top, size - height - top])
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    return (tensor - mean[:, None, None]) / std[:, None, None]


def find_checkpoint(path: Path, version: str) -> Path:
    """`path` itself, or the published file of `version` in the folder `path`. Raises: Refused."""
    file = path / FILES[version] if path.is_dir() else path
    if not file.is_file():
        raise Refused(
            f"judges.hps.path: no HPSv2 checkpoint at {file}; give a .pt or .safetensors file, or a folder that holds "
            f"{FILES[version]} (judges.hps.version = {version!r})"
        )
    return file


def load_model(file: Path, *, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """An open_clip CLIP in eval mode with the weights of `file`.

    Raises: Refused if the file is no HPSv2-format checkpoint or a tensor is missing, unknown or of another shape.
    """
    sidecar = file.with_suffix(".json")
    source = f"the config {sidecar.name}" if sidecar.is_file() else "ViT-H-14"
    config = json.loads(sidecar.read_text()) if sidecar.is_file() else open_clip.get_model_config("ViT-H-14")
    model = open_clip.CLIP(**config)
    state = _read_state(file)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Refused(f"{file} does not fit {source}: {error}") from error
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _read_state(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        state: Any = load_file(file)
    else:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
        if not isinstance(state, dict):
            raise Refused(f"{file} is no HPSv2 checkpoint: it has no `state_dict`")
    names = {name: name.removeprefix("module.") for name in state}
    return {new: state[old] for old, new in names.items() if not new.endswith(_BUFFERS)}


def _square(image_size: int | tuple[int, int]) -> int:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise Refused(f"an HPSv2 model reads square pictures, not {height}×{width}")
    return height
