"""Painters: the actors that sample an evaluation's pictures into files, and the driver's side of them.

Base and tuned start from the same noise, made from (seed, prompt, variant). A picture's name says what it shows, so those
that an interrupted evaluation has made are not made again.

Left out: replacing a dead painter; the same command goes on with what is painted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from uuid import uuid4

import numpy as np
import ray
import torch

from actors.asking import last_line
from actors.placement import ModelSizes, Role
from rlhf.data.media import encode_png, load_image
from rlhf.errors import Refused
from rlhf.evaluation.config import EvaluateConfig
from rlhf.evaluation.duels import SIDES, Side
from rlhf.evaluation.prompts import family_of
from rlhf.models.family import sees_source
from rlhf.models.sampling import sample
from rlhf.types import Prompt, noise_from, seed_from


class PaintingFailed(Refused):
    """A painter died, raised or fell silent; what was painted before is kept."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One picture to paint."""

    index: int
    """Place of its prompt in the evaluation."""
    prompt: Prompt
    variant: int


def picture_file(index: int, variant: int, side: Side) -> str:
    """Where a generated picture lies in the evaluation's folder."""
    return f"pictures/{index:05d}_{variant}_{side}.png"


def source_file(index: int) -> str:
    """Where a prompt's source lies, as the model saw it."""
    return f"pictures/{index:05d}_source.png"


def painter_role(config: EvaluateConfig) -> Role:
    """What the painters need: the denoiser, text encoders and VAE in each."""
    model, painters = ModelSizes(family_of(config.model)), config.painters
    return Role(
        name="painter (before the judges)",
        count=painters.count,
        num_cpus=painters.num_cpus,
        num_gpus=painters.num_gpus,
        nbytes=model.compute_bytes * model.parameters + model.encoders + model.vae,
    )


class Painter:
    """The family's codec and one side's weights at a time on one device."""

    def __init__(self, config: EvaluateConfig, device: str):
        self.config, self.device = config, device
        self.family = family_of(config.model)
        self.codec = self.family.load_codec(device)
        self.side: Side | None = None
        self.denoiser: torch.nn.Module | None = None

    def load(self, side: Side) -> None:
        """Take that side's weights in place of the other's."""
        if side == self.side:
            return
        self.side, self.denoiser = None, None  # first, so that both are never in memory
        folder, lora = (self.config.tuned.denoiser, self.config.tuned.lora) if side == "tuned" else (None, None)
        self.denoiser = self.family.load_denoiser(
            self.device, Path(folder) if folder else None, Path(lora) if lora else None
        )
        self.side = side

    def paint(self, side: Side, orders: Sequence[Order]) -> int:
        """Paint and save; returns how many. All of one picture size, `sampling.batch_size` of them at most.

        Short batches are padded with the last prompt and zero noise, so that a picture never depends on its neighbours.
        """
        self.load(side)
        assert self.denoiser is not None
        sampling, out = self.config.sampling, Path(self.config.out)
        padding = sampling.batch_size - len(orders)
        prompts = [order.prompt for order in orders]
        height, width = prompts[0].height, prompts[0].width
        shape = self.family.latent_shape(height, width)
        seeds = [seed_from(self.config.seed, "evaluate", order.index, order.variant) for order in orders]
        noise = torch.stack([noise_from(seed, shape) for seed in seeds])
        noise = torch.cat([noise, noise.new_zeros(padding, *shape)]).to(self.device)
        filled = [*prompts, *[prompts[-1]] * padding]
        condition = self.codec.encode_text([prompt.instruction for prompt in filled])
        if sees_source(self.family):
            sources = [load_image(prompt.image, height, width, self.config.data.fit) for prompt in filled]
            condition |= self.codec.encode_source(torch.from_numpy(np.stack(sources)))
            for order, source in zip(orders, sources, strict=False):
                save(out / source_file(order.index), source)
        condition = {name: tensor.to(self.device) for name, tensor in condition.items()}
        images = self.codec.decode(sample(self.family, self.denoiser, condition, noise, sampling.steps)).numpy()
        for order, image in zip(orders, images, strict=False):
            save(out / picture_file(order.index, order.variant, side), image)
        return len(orders)


def save(file: Path, image: np.ndarray) -> None:
    """A PNG that is either whole or absent."""
    partial = file.with_name(f".{file.name}.{uuid4().hex}")  # several painters may save one source
    partial.write_bytes(encode_png(image))
    partial.replace(file)


def paint_all(config: EvaluateConfig, prompts: Sequence[Prompt], log: Callable[[str], None]) -> None:
    """Paint what `out` lacks, base before tuned. Raises PaintingFailed."""
    todo = [(side, orders) for side in SIDES for orders in _batches(config, prompts, side)]
    total, done = sum(len(orders) for _, orders in todo), 0
    log(f"{total} pictures to paint, {2 * len(prompts) * config.sampling.seeds - total} are there")
    painters = config.painters
    device = "cuda" if painters.num_gpus > 0 else "cpu"
    options = {"num_cpus": painters.num_cpus, "num_gpus": painters.num_gpus, "max_restarts": 0, "max_task_retries": 0}
    actors = [
        ray.remote(Painter).options(**options).remote(config, device) for _ in range(min(painters.count, len(todo)))
    ]
    try:
        busy = {actor.paint.remote(*todo.pop(0)): actor for actor in actors}
        started = monotonic()
        while busy:
            ready, _ = ray.wait(list(busy), timeout=painters.timeout_s)
            if not ready:
                raise PaintingFailed(
                    f"no picture in painters.timeout_s = {painters.timeout_s:g} s; the cluster has "
                    f"{ray.available_resources()} free"
                )
            actor = busy.pop(ready[0])
            try:
                done += ray.get(ready[0], timeout=painters.timeout_s)
            except ray.exceptions.RayError as error:
                raise PaintingFailed(f"a painter failed: {last_line(error)}") from error
            log(f"painted: {done}/{total} pictures, {monotonic() - started:.0f} s")
            if todo:
                busy[actor.paint.remote(*todo.pop(0))] = actor
    finally:
        for actor in actors:
            ray.kill(actor)


def _batches(config: EvaluateConfig, prompts: Sequence[Prompt], side: Side) -> Iterator[list[Order]]:
    """What is missing, in batches of one picture size."""
    sizes: dict[tuple[int, int], list[Order]] = {}
    for index, prompt in enumerate(prompts):
        for variant in range(config.sampling.seeds):
            if not (Path(config.out) / picture_file(index, variant, side)).exists():
                order = Order(index=index, prompt=prompt, variant=variant)
                sizes.setdefault((prompt.height, prompt.width), []).append(order)
    for orders in sizes.values():
        for start in range(0, len(orders), config.sampling.batch_size):
            yield orders[start : start + config.sampling.batch_size]
