"""Encoding pairs beside the trainer: for data sets too large to encode ahead, and for random crops.

Encoders are stateless, so Ray restarts one that dies and repeats its calls. The driver hands out places of the stream and
hands on references: some steps ahead of the trainer, never more.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import ray
import torch

from actors.streaming import PreprocessFailed
from actors.trainer import TrainerLost
from rlhf.data.examples import pictures_of, read_index
from rlhf.data.media import decode_image, fit_image
from rlhf.data.pair_files import read_block
from rlhf.data.stream import PairStream, Visit
from rlhf.models import load_family
from rlhf.models.family import sees_source
from rlhf.offline_config import OfflineDPOConfig

STEPS_AHEAD = 2
RESTARTS = 3


class PairEncoder:
    """A frozen codec on one device that reads pairs where they lie and encodes their pictures."""

    def __init__(self, config: OfflineDPOConfig, index_file: Path):
        self._config, self._index = config, read_index(index_file)
        family = load_family(config.model, config.trainer.mixed_precision)
        self._codec = family.load_codec("cuda" if config.preprocess.num_gpus > 0 else "cpu")
        self._needs_source = sees_source(family)
        self._block = lru_cache(maxsize=config.data.shuffle_blocks)(read_block)

    def encode(self, visits: Sequence[Visit]) -> tuple[int, list[tuple[Visit, dict[str, np.ndarray]]]]:
        """(count, each visit with its `rlhf.data.offline_pairs.Latents`): the count tells the driver that all went well.

        Short batches are padded, so that no row depends on its neighbours.
        """
        pictures = [self._pictures(visit) for visit in visits]
        padding = [pictures[-1]] * (self._config.preprocess.batch_size - len(visits))
        sides = {name: _stack([some[name] for some in (*pictures, *padding)]) for name in pictures[0]}
        source = self._codec.encode_source(sides.pop("source")) if "source" in sides else {}
        named = {name: self._codec.encode_target(side) for name, side in sides.items()} | source
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in named.items()}
        latents = [{name: array[i].copy() for name, array in arrays.items()} for i in range(len(visits))]
        return len(visits), list(zip(visits, latents, strict=True))

    def _pictures(self, visit: Visit) -> dict[str, np.ndarray]:
        """uint8 (H, W, 3): `winner`, for DPO `loser`, for an edit family `source`."""
        pair = self._index[visit.row]
        first, second, *source = pictures_of(pair, self._index.blocks[pair.block], self._block)
        winner, loser = (first, second) if pair.winner == 0 else (second, first)
        files = {"winner": winner}
        if self._config.objective == "dpo":
            files["loser"] = loser
        if self._needs_source:
            (files["source"],) = source
        height, width = self._config.model.height, self._config.model.width
        fitted = {
            name: fit_image(decode_image(file), height, width, "crop", visit.crop) for name, file in files.items()
        }
        return {name: picture[:, ::-1] if visit.mirrored else picture for name, picture in fitted.items()}


def _stack(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures))


class PairFeed:
    """Latents of the coming steps, as references."""

    def __init__(self, config: OfflineDPOConfig, index_file: Path, stream: PairStream):
        self._config, self._stream = config, stream
        self._blocks = read_index(index_file).table["block"].to_numpy()
        settings = config.preprocess
        actor = ray.remote(PairEncoder).options(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        self._encoders = [actor.remote(config, index_file) for _ in range(settings.encoders)]
        self._ahead: dict[int, list[list[tuple[ray.ObjectRef, ray.ObjectRef]]]] = {}

    def take(self, step: int) -> list[list[ray.ObjectRef]]:
        """For every rank, references to its pairs of update `step` (from 1), some pairs each. Waits until they are done.

        Raises: PreprocessFailed with the cause; TrainerLost where an encoder is gone or past `trainer.timeout_s`, so that
        all are built anew from the last checkpoint.
        """
        for ahead in range(step, min(step + STEPS_AHEAD, self._config.trainer.max_train_steps) + 1):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._submit(ahead)
        parts = self._ahead.pop(step)
        waiting = [done for part in parts for done, _ in part]
        try:
            ray.get(waiting, timeout=self._config.trainer.timeout_s)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            raise TrainerLost(
                f"step {step}: an encoder is gone, or gave nothing in trainer.timeout_s: {error}"
            ) from error
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise PreprocessFailed(f"step {step}: the pairs could not be encoded: {cause}") from error
        return [[latents for _, latents in part] for part in parts]

    def _submit(self, step: int) -> list[list[tuple[ray.ObjectRef, ray.ObjectRef]]]:
        trainer, size = self._config.trainer, self._config.preprocess.batch_size
        parts = []
        for rank in range(trainer.ranks):
            first = (step - 1) * trainer.pairs_per_step + rank * trainer.pairs_per_rank
            visits = [self._stream[place] for place in range(first, first + trainer.pairs_per_rank)]
            part = []
            for number, encoder in enumerate(self._encoders):
                # A block has one encoder, so that it is read once and not by all of them.
                own = [visit for visit in visits if self._blocks[visit.row] % len(self._encoders) == number]
                for start in range(0, len(own), size):
                    part.append(tuple(encoder.encode.options(num_returns=2).remote(own[start : start + size])))
            parts.append(part)
        return parts

    def close(self) -> None:
        for encoder in self._encoders:
            ray.kill(encoder)
