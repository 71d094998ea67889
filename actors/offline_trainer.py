"""Training offline: every rank finds its own pairs from the number of the step, in the cache or in an online run's record.

Pairs that are encoded on the fly are handed to it as references.
"""

from collections.abc import Sequence

import ray
from ray.util.placement_group import PlacementGroup

from actors.pair_encoders import PairFeed
from actors.ranks import FETCH_TIMEOUT_S
from actors.trainer import TrainerGroup, TrainerWorker
from rlhf.data.offline_pairs import HandedPairs, OfflinePairs, PairsPlace, PicturePairs, batch_of
from rlhf.data.stream import Visit, held_out_visits, training_stream
from rlhf.diffusion.objectives import DPO, SFT, Objective
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.offline_config import OfflineDPOConfig
from rlhf.runs.folder import Fence
from rlhf.types import PairBatch

HELD_OUT_STEP = 0
"""The step whose noise the evaluation uses: training begins at 1."""


class OfflineWorker(TrainerWorker):
    config: OfflineDPOConfig

    def __init__(
        self, rank: int, config: OfflineDPOConfig, fence: Fence, train: PairsPlace, held_out: PairsPlace | None
    ):
        super().__init__(rank, config, fence)
        self._places = train, held_out

    def objective(self) -> Objective:
        return DPO(beta=self.config.dpo.beta) if self.config.objective == "dpo" else SFT()

    def family(self) -> Family:
        config = self.config
        return load_family(config.model, config.trainer.mixed_precision, config.model.guidance_scale)

    def join(self, host: str, port: int) -> str:
        host = super().join(host, port)
        train, held_out = self._places
        self._train = train.open(self.cache)
        self._held_out = held_out.open(self.cache) if held_out else None
        self._stream = training_stream(self.config.data, self._train.block_sizes, self.config.run.seed)
        return host

    def step(self, step: int, handed: Sequence[ray.ObjectRef] | None) -> dict[str, float]:
        """Train on this rank's pairs of update `step`; `handed`: their latents, where they are encoded on the fly."""
        trainer, pairs = self.config.trainer, self._train
        first = self.rank * trainer.pairs_per_rank
        start = (step - 1) * trainer.pairs_per_step + first
        visits = [self._stream[place] for place in range(start, start + trainer.pairs_per_rank)]
        if handed is not None:
            assert isinstance(pairs, PicturePairs)
            parts = ray.get(list(handed), timeout=FETCH_TIMEOUT_S)
            pairs = HandedPairs(pairs, {visit: latents for part in parts for visit, latents in part})
        return self.trainer.step(self._micro_batches(pairs, visits, step, first))

    def evaluate(self) -> dict[str, float]:
        """The objective on this rank's share of the held-out pairs, `eval.draws` times, at noise that never changes."""
        assert self._held_out is not None
        visits = held_out_visits(self.config.eval, self.config.trainer, sum(self._held_out.block_sizes))
        mine = len(visits) // self.config.trainer.ranks
        batches: list[PairBatch] = []
        for draw in range(self.config.eval.draws):
            first = self.rank * mine
            chosen = visits[first : first + mine]
            batches += self._micro_batches(
                self._held_out, chosen, HELD_OUT_STEP, draw * self.config.eval.max_pairs + first
            )
        return self.trainer.evaluate(batches)

    def _micro_batches(
        self, pairs: OfflinePairs, visits: Sequence[Visit], step: int, first_index: int
    ) -> list[PairBatch]:
        size, seed = self.config.trainer.train_batch_size, self.config.run.seed
        process = self.trainer.family.process
        return [
            batch_of(pairs, visits[i : i + size], process, seed=seed, step=step, first_index=first_index + i)
            for i in range(0, len(visits), size)
        ]


class OfflineTrainer(TrainerGroup):
    """The group that `rlhf.loops.offline_dpo` drives."""

    config: OfflineDPOConfig

    def __init__(
        self,
        config: OfflineDPOConfig,
        fence: Fence,
        placement: PlacementGroup,
        train: PairsPlace,
        held_out: PairsPlace | None,
        feed: PairFeed | None,
    ):
        self._held_out, self._feed = held_out, feed
        super().__init__(OfflineWorker, lambda rank: (rank, config, fence, train, held_out), config, placement)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer update; `train/…` scalars over all ranks."""
        handed = self._feed.take(step) if self._feed else None
        return self.train(lambda rank: (step, handed[rank] if handed else None))

    def evaluate(self) -> dict[str, float]:
        """`eval/…` scalars on the held-out pairs; empty without any."""
        if self._held_out is None:
            return {}
        return {f"eval/{name}": value for name, value in self.group.all("evaluate")[0].items()}
