"""The CTR model of the miniature world: the small one of `jobs.train_ctr`, trained on the click log without Ray.

All epochs are trained: the few products that would be held out for early stopping end it at random, after the fourth of sixteen.
"""

from collections.abc import Callable
from pathlib import Path

from rlhf.rewards.ctr.clicks import Rows, read_clicks
from rlhf.rewards.ctr.config import CTRModelSection, CTRTrainConfig
from rlhf.rewards.ctr.training import Learner, fit


def train_ctr(data: Path, folder: Path, *, epochs: int, seed: int, say: Callable[[str], None]) -> None:
    """Train on `data`/ctr_train.csv and write the checkpoint into `folder`."""
    config = CTRTrainConfig(epochs=epochs)
    learner = Learner(Rows(train=read_clicks(data / "ctr_train.csv")[0]), CTRModelSection(), config, seed)
    fit(learner.epoch, learner.keep, config, say)
    learner.finish(folder)
