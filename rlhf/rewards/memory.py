"""Peak memory of a judge's replica, traced from its config alone: a batch of `max_batch_size` through the network it loads.

The filter's is what vLLM is told to take. Left out: judges whose code is a user's, and services elsewhere.

Shapes: B batch, S picture side, L tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf.models.memory import Peak, Tracing, without_data
from rlhf.rewards.config import FilterJudgeConfig, JudgeConfig, ModelJudgeConfig

Forward = Callable[[int], Any]
"""A forward pass of B pictures, without gradients."""


def judge_peak(name: str, judge: JudgeConfig, card: float | None) -> Peak | None:
    """card: bytes of one. None where the judge's memory cannot be known beforehand, or its folder is not there."""
    if isinstance(judge, FilterJudgeConfig):
        known = card is not None and judge.path is not None
        return Peak(kinds={"vLLM's share": round(judge.gpu_memory_utilization * card)}) if known and card else None
    if not isinstance(judge, ModelJudgeConfig) or name not in _NETWORKS or not Path(str(judge.path)).exists():
        return None
    with torch.device("meta"):
        network, forward = _NETWORKS[name](judge)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    nn.Module.to(network, getattr(torch, judge.dtype)).eval().requires_grad_(True)
    without_data(network, fake)
    with fake, Tracing(network) as tracing:
        forward(judge.max_batch_size)
    return tracing.peak(network)


def _hps(judge: Any) -> tuple[nn.Module, Forward]:
    from rlhf.rewards import hpsv2  # each needs its own library, which takes seconds to load

    network = hpsv2.empty_model(hpsv2.checkpoint_of(judge))
    side = network.visual.image_size
    shape = (3, *(side if isinstance(side, tuple) else (side, side)))
    return network, lambda B: network.encode_image(torch.zeros(B, *shape, dtype=_dtype(judge)))


def _ctr(judge: Any) -> tuple[nn.Module, Forward]:
    from rlhf.rewards.ctr import model

    config, _ = model.check(Path(str(judge.path)))
    network = model.CTRModel(config)

    def forward(B: int) -> Any:
        ids = torch.zeros(B, config.max_tokens, dtype=torch.int64)
        return network(torch.zeros(B, 3, config.image_size, config.image_size, dtype=_dtype(judge)), ids, ids)

    return network, forward


def _clip(judge: Any) -> tuple[nn.Module, Forward]:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(judge.path, local_files_only=True)
    network, side = CLIPModel(config), config.vision_config.image_size
    return network, lambda B: network.get_image_features(torch.zeros(B, 3, side, side, dtype=_dtype(judge)))


def _dtype(judge: ModelJudgeConfig) -> torch.dtype:
    return getattr(torch, judge.dtype)


_NETWORKS = {"hps": _hps, "ctr": _ctr, "pickscore": _clip, "clip": _clip, "aesthetic": _clip}
