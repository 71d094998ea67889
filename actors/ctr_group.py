"""The CTR training as ranks: one `rlhf.rewards.ctr.training.Learner` each, driven by its `fit` from the driver.

Left out: going on after a lost rank. Training takes minutes to hours, and the same command starts it again.
"""

from pathlib import Path
from time import monotonic
from typing import Any

from ray.util.placement_group import PlacementGroup

from actors.ranks import Rank, RankGroup
from rlhf.rewards.ctr.clicks import Rows
from rlhf.rewards.ctr.config import TrainCTRConfig
from rlhf.rewards.ctr.training import Learner
from rlhf.shards import distributed

COLLECTIVE_TIMEOUT_S = 1800.0


class CTRWorker(Rank):
    def __init__(self, rank: int, config: TrainCTRConfig, rows: Rows):
        self.rank, self.config, self.rows = rank, config, rows

    def join(self, host: str, port: int) -> None:
        """Join the process group, where there is more than one rank, and build the model."""
        train = self.config.train
        if train.ranks > 1:
            store, timeout_s = self.rendezvous(host, port), min(train.timeout_s, COLLECTIVE_TIMEOUT_S)
            world, device = train.ranks, train.device
            distributed.start(rank=self.rank, world=world, store=store, device=device, timeout_s=timeout_s)
        self.learner = Learner(self.rows, self.config.model, train, self.config.seed, self.rank)

    def epoch(self, index: int) -> dict[str, float]:
        return self.learner.epoch(index)

    def keep(self) -> None:
        self.learner.keep()

    def finish(self, folder: Path) -> dict[str, float]:
        """Rank 0: write checkpoint and plots into `folder`. Returns the figures of the held-out rows."""
        return {} if self.rank else self.learner.finish(folder)


class CTRGroup:
    """The ranks, as the driver sees them: `fit` drives `epoch` and `keep`. `train.timeout_s` is for all calls together."""

    def __init__(self, config: TrainCTRConfig, rows: Rows, placement: PlacementGroup):
        self._deadline = monotonic() + config.train.timeout_s
        self._group = RankGroup(CTRWorker, config.train, placement, config, rows, name="CTR rank")
        self.kill = self._group.kill

    def epoch(self, index: int) -> dict[str, float]:
        return self._all("epoch", index)[0]

    def keep(self) -> None:
        self._all("keep")

    def finish(self, folder: Path) -> dict[str, float]:
        """See `CTRWorker.finish`; every rank must see `folder`'s parent."""
        return self._all("finish", folder)[0]

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._group.all(method, *arguments, timeout_s=max(1.0, self._deadline - monotonic()))
