"""Training online: the driver hands every rank its pairs; ranks fetch latents from the object store and conditions from the
cache, and write the record of the pairs before they train on them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup

from actors.ranks import FETCH_TIMEOUT_S
from actors.trainer import TrainerGroup, TrainerWorker
from rlhf.data.audit import write_pairs
from rlhf.data.batches import collate
from rlhf.diffusion.objectives import DPO
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.runs.folder import Fence
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Pair


class OnlineWorker(TrainerWorker):
    config: OnlineDPOConfig

    def objective(self) -> DPO:
        return DPO(beta=self.config.dpo.beta)

    def family(self) -> Family:
        config = self.config
        return load_family(config.model, config.trainer.mixed_precision, config.rollout.guidance_scale)

    def step(self, step: int, pairs: Sequence[Pair], pairs_folder: Path) -> dict[str, float]:
        """Fetch, write the record, train. `pairs` are this rank's own."""
        references = [side.latents for pair in pairs for side in (pair.winner, pair.loser)]
        latents = iter(ray.get(references, timeout=FETCH_TIMEOUT_S))
        pairs = [
            replace(
                pair,
                winner=replace(pair.winner, image=None, latents=next(latents)),
                loser=replace(pair.loser, image=None, latents=next(latents)),
            )
            for pair in pairs
        ]
        config, process = self.config, self.trainer.family.process
        first = self.rank * config.trainer.pairs_per_rank
        self.fence.check()
        write_pairs(
            pairs_folder / f"step_{step:06d}.rank_{self.rank}.parquet",
            pairs,
            process,
            seed=config.run.seed,
            step=step,
            first_index=first,
            save_latents=config.run.save_latents,
        )
        size = config.trainer.train_batch_size
        micro_batches = [
            collate(
                pairs[i : i + size],
                self.cache.condition,
                process,
                seed=config.run.seed,
                step=step,
                first_index=first + i,
            )
            for i in range(0, len(pairs), size)
        ]
        return self.trainer.step(micro_batches)


class OnlineTrainer(TrainerGroup):
    """The group that `rlhf.loops.online_dpo` drives."""

    config: OnlineDPOConfig

    def __init__(self, config: OnlineDPOConfig, fence: Fence, placement: PlacementGroup, meanwhile: Callable[[], None]):
        """`meanwhile` is called again and again while ranks work, so that rollouts go on."""
        super().__init__(OnlineWorker, lambda rank: (rank, config, fence), config, placement, meanwhile)

    def step(self, step: int, pairs: Sequence[Pair], pairs_folder: Path) -> dict[str, float]:
        """One optimizer update; rank r trains pairs [r·n, (r+1)·n), n = pairs per rank.

        Returns `train/…` scalars over all ranks, and the seconds of this step and of the last publish.
        """
        n = self.config.trainer.pairs_per_rank
        assert len(pairs) == n * self.config.trainer.ranks, "a step needs the same count of pairs on every rank"
        parts = [list(pairs[i : i + n]) for i in range(0, len(pairs), n)]
        return self.train(lambda rank: (step, parts[rank], pairs_folder)) | {"time/publish": self._publish_s}
