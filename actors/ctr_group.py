"""The CTR training as ranks: one `rlhf.rewards.ctr.training.Learner` each, driven by `ctr_training.fit` from the driver.

Left out: going on after a lost rank. Training takes minutes to hours, and the same command starts it again.
"""

from collections.abc import Callable
from pathlib import Path
from time import monotonic

from ray.util.placement_group import PlacementGroup

from actors.ranks import Rank, RankGroup
from rlhf.rewards.ctr.clicks import Rows
from rlhf.rewards.ctr.config import TrainCTRConfig
from rlhf.rewards.ctr.training import Learner
from rlhf.shards import distributed

COLLECTIVE_TIMEOUT_S = 1800.0


class CTRWorker(Rank):
    """One rank. Each public method is called on every rank at once."""

    def __init__(self, rank: int, config: TrainCTRConfig, rows: Rows):
        self.rank, self.config, self.rows = rank, config, rows

    def join(self, host: str, port: int) -> None:
        """Join the process group, where there is more than one rank, and build the model."""
        train = self.config.train
        device = "cuda" if train.num_gpus else "cpu"
        if train.ranks > 1:
            distributed.start(
                rank=self.rank,
                world=train.ranks,
                store=self.rendezvous(host, port),
                device=device,
                timeout_s=min(train.timeout_s, COLLECTIVE_TIMEOUT_S),
            )
        self.learner = Learner(
            self.rows,
            self.config.model,
            train,
            seed=self.config.seed,
            device=device,
            rank=self.rank,
            world=train.ranks,
        )

    def epoch(self, index: int) -> dict[str, float]:
        return self.learner.epoch(index)

    def keep(self) -> None:
        self.learner.keep()

    def finish(self, folder: Path) -> dict[str, float]:
        """Rank 0: write checkpoint and plots into `folder`. Returns the figures of the held-out rows."""
        if self.rank:
            return {}
        trained = self.learner.finish()
        trained.write(folder)
        return trained.metrics


class CTRGroup:
    """The ranks, as the driver sees them: the `Epochs` that `fit` drives. `train.timeout_s` is for all calls together."""

    def __init__(self, config: TrainCTRConfig, rows: Rows, placement: PlacementGroup):
        train = config.train
        self._deadline = monotonic() + train.timeout_s
        self.group = RankGroup(
            CTRWorker,
            lambda rank: (rank, config, rows),
            ranks=train.ranks,
            num_cpus=train.num_cpus,
            num_gpus=train.num_gpus,
            placement=placement,
            timeout_s=train.timeout_s,
            name="CTR rank",
        )

    def epoch(self, index: int) -> dict[str, float]:
        return self._all("epoch", lambda rank: (index,))[0]

    def keep(self) -> None:
        self._all("keep")

    def finish(self, folder: Path) -> dict[str, float]:
        """See `CTRWorker.finish`; every rank must see `folder`'s parent."""
        return self._all("finish", lambda rank: (folder,))[0]

    def _all(self, method: str, arguments: Callable[[int], tuple] = lambda rank: ()) -> list:
        return self.group.all(method, arguments, timeout_s=max(1.0, self._deadline - monotonic()))

    def kill(self) -> None:
        self.group.kill()
