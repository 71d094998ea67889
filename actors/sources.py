"""The driver's half of the sources of work: rollouts that become pairs, and examples that are already there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from actors.encoders import CallEncoder
from actors.publication import Publication
from actors.rollouts import Rollouts
from actors.trainer import Handed, TrainerLost
from rlhf.data.stream import PairStream
from rlhf.data.work import IndexedExamples
from rlhf.tables import ModelTable, PreprocessConfig
from rlhf.training_tables import TrainerConfig
from rlhf.types import Pair

STEPS_AHEAD = 2
RESTARTS = 3


class OnlineSource:
    """Pairs from rollouts, which sample with what this publishes."""

    def __init__(self, rollouts: Rollouts, publish: Callable[[int, str], Publication], pairs_per_rank: int):
        """publish: (version, side) → the trainer's weights in the object store."""
        self._rollouts, self._publish, self._per_rank = rollouts, publish, pairs_per_rank
        self.metrics, self.snapshot = rollouts.metrics, rollouts.snapshot
        self.pairs: tuple[Pair, ...] = ()
        """What the last step trained on."""

    def take(self, step: int) -> list[Handed]:
        """Rank r gets pairs [r·n, (r+1)·n), n = pairs per rank."""
        self.pairs = self._rollouts.take(step)
        n = self._per_rank
        return [_handed(self.pairs[i : i + n]) for i in range(0, len(self.pairs), n)]

    def publish(self, side: str, step: int | None) -> None:
        """Make the samplers hold the `policy` or `ema` weights; step None: no pair may come of them."""
        self._rollouts.load(self._publish(self._rollouts.version + 1, side), step)

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """Publishes the restored weights under the version that they had."""
        version = self._rollouts.restore(dict(saved) if saved else None)
        self._rollouts.load(self._publish(version, "policy"), step)


def _handed(pairs: Sequence[Pair]) -> Handed:
    """Latents go apart from the pairs, so that the rank fetches them all at once; it needs no pictures."""
    work = [pair.with_candidates(lambda side: replace(side, media=None, latents=None)) for pair in pairs]
    return work, [side.latents for pair in pairs for side in (pair.winner, pair.loser)]


class OfflineSource:
    """Examples that ranks find themselves; what is not cached, encoders make beside the trainer."""

    def __init__(self, feed: "Feed | None" = None, contributed: Callable[[int], dict[str, float]] = lambda step: {}):
        """contributed: scalars about the examples of an update (from 1)."""
        self._feed, self._contributed = feed, contributed
        self._scalars: dict[str, float] = {}

    def take(self, step: int) -> list[Handed] | None:
        self._scalars = self._contributed(step + 1)
        return self._feed.take(step + 1) if self._feed else None

    def metrics(self) -> dict[str, float]:
        return self._scalars

    def snapshot(self) -> dict[str, Any]:
        """Nothing: what an update trains on follows from its number."""
        return {}

    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None: ...


class Feed:
    """Rows of the coming steps, as references: for data sets too large to encode ahead, and for random crops. Encoders are
    stateless, so Ray restarts one that dies and repeats its calls.
    """

    def __init__(
        self,
        model: ModelTable,
        preprocess: PreprocessConfig,
        trainer: TrainerConfig,
        examples: IndexedExamples,
        stream: PairStream,
        blocks_held: int,
    ):
        """blocks_held: row groups that every encoder keeps."""
        self._preprocess, self._trainer, self._examples, self._stream = preprocess, trainer, examples, stream
        self._blocks = examples.blocks
        shares = {"num_cpus": preprocess.num_cpus, "num_gpus": preprocess.num_gpus}
        actor = ray.remote(CallEncoder).options(**shares, max_restarts=RESTARTS, max_task_retries=RESTARTS)
        self._encoders = [actor.remote(model, preprocess, blocks_held) for _ in range(preprocess.encoders)]
        self._ahead: dict[int, list[list[tuple[ray.ObjectRef, ray.ObjectRef]]]] = {}

    def take(self, step: int) -> list[Handed]:
        """For every rank, references to rows of update `step` (from 1), which are done. Raises: what an encoder raised, Refused
        for a picture that has changed; TrainerLost where one is gone or late, so that all are built anew.
        """
        for ahead in range(step, min(step + STEPS_AHEAD, self._trainer.max_train_steps) + 1):
            if ahead not in self._ahead:
                self._ahead[ahead] = [self._submit(ahead, rank) for rank in range(self._trainer.ranks)]
        parts = self._ahead.pop(step)
        try:
            ray.get([done for part in parts for done, _ in part], timeout=self._trainer.timeout_s)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            what = f"step {step}: an encoder is gone, or gave nothing in trainer.timeout_s: {error}"
            raise TrainerLost(what) from error
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        return [(None, [rows for _, rows in part]) for part in parts]

    def _submit(self, step: int, rank: int) -> list[tuple[ray.ObjectRef, ray.ObjectRef]]:
        visits = self._stream.of_rank(self._trainer, step, rank)
        calls, size = [], self._preprocess.batch_size
        for number, encoder in enumerate(self._encoders):
            # A block has one encoder, so that it is read once and not by all of them.
            own = [visit for visit in visits if self._blocks[visit.row] % len(self._encoders) == number]
            for start in range(0, len(own), size):
                encodings = [e for visit in own[start : start + size] for e in self._examples.encodings(visit)]
                wanted = [encoding for encoding in encodings if encoding.sources]  # texts alone are always cached
                calls.append(tuple(encoder.encode.options(num_returns=2).remote(wanted)))
        return calls

    def close(self) -> None:
        for encoder in self._encoders:
            ray.kill(encoder)
