"""The training loop: take work, step, log, then whatever is due.

`source` and `trainer` stand for Ray actors in a job (`actors/`), or are objects of this process (`jobs.one_process`). The loop
holds references, scores and counters; no tensor ever lands here. A step is one optimizer update; row and file number s belong to
the s-th update.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.runs.folder import RunFolder
from rlhf.tables import RunConfig
from rlhf.types import Prompt, Score, seed_from


class Source(Protocol):
    """The driver's half of a source of work; the worker's half is `rlhf.data.work`.

    take: what each rank is handed for the update after `step` updates; None: ranks find their work themselves. metrics:
    scalars since the last call. snapshot: what a resume needs, JSON-able. restore: go on from a snapshot, or from the start.
    """

    def take(self, step: int) -> Sequence[Any] | None: ...
    def metrics(self) -> Mapping[str, float]: ...
    def snapshot(self) -> Mapping[str, Any]: ...
    def restore(self, step: int, saved: Mapping[str, Any] | None) -> None: ...


class Trainer(Protocol):
    def step(self, step: int, handed: Sequence[Any] | None) -> dict[str, float]: ...
    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> None: ...
    def export(self, folder: Path) -> None: ...


class Tracker(Protocol):
    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Duty:
    """`do`, which gets the number of steps done, after `every` so many (0: never); `at_start`: also before the first, with 0."""

    every: int
    do: Callable[[int], None]
    at_start: bool = False


def train(
    steps: int, run: RunFolder, source: Source, trainer: Trainer, tracker: Tracker, duties: Sequence[Duty]
) -> None:
    """Run from the last committed step to `steps`, then export into final/. Duties that are due are done in their order."""
    begun = resume(run, source, trainer)
    if begun == 0:
        for duty in duties:
            if duty.at_start:
                duty.do(0)
    for step in range(begun + 1, steps + 1):
        handed = source.take(step - 1)
        tracker.log(step, {**trainer.step(step, handed), **source.metrics()})
        for duty in duties:
            if duty.every and step % duty.every == 0:
                duty.do(step)
    with run.whole("final") as folder:
        trainer.export(folder)


def resume(run: RunFolder, source: Source, trainer: Trainer) -> int:
    """Restore the last committed step, if there is one, and return it."""
    step = run.last_committed()
    if step is None:
        source.restore(0, None)
        return 0
    state = run.checkpoint_path(step) / "state"
    trainer.restore(state)
    source.restore(step, json.loads((state / "source.json").read_text()))
    return step


def saving(table: RunConfig, run: RunFolder, source: Source, trainer: Trainer) -> list[Duty]:
    """Export loadable weights, which stay; then commit. In this order a resume cannot miss an export."""

    def export(step: int) -> None:
        with run.whole(f"exports/step_{step:06d}") as folder:
            trainer.export(folder)

    def commit(step: int) -> None:
        """Write everything a resume needs, then the marker that makes it count, then remove what is older."""
        with run.checkpoint(step) as folder:
            trainer.save(folder / "state")
            (folder / "state" / "source.json").write_text(json.dumps(source.snapshot()))
        run.prune(table.keep_checkpoints)

    return [Duty(every=table.export_every, do=export), Duty(every=table.save_every, do=commit)]


Publish = Callable[[str, int | None], None]
"""(side, step): make the samplers hold the `policy` or `ema` weights; step None: no pair may come of them."""


class Rollouts(Protocol):
    def score(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[Any, Any]]: ...


class ShowingTracker(Tracker, Protocol):
    def edits(self, step: int, name: str, prompts: Sequence[Prompt], answers: Sequence[tuple[Any, Any]]) -> None: ...


def evaluation(
    held_out: Sequence[Prompt],
    rollouts: Rollouts,
    tracker: ShowingTracker,
    publish: Publish,
    *,
    rewards: Sequence[str],
    variants: int,
    seed: int,
    ema: bool,
) -> Callable[[int], None]:
    """The duty that scores `variants` pictures per held-out prompt by the policy (step 0: the base) and by an EMA's weights."""
    prompts = [prompt for prompt in held_out for _ in range(variants)]
    seeds = [seed_from(seed, "eval", index) for index in range(len(prompts))]

    def measure(step: int, name: str) -> None:
        answers = rollouts.score(prompts, seeds)
        tracker.log(step, summary(name, [answer for _, answer in answers], rewards))
        tracker.edits(step, name, prompts, answers)

    def do(step: int) -> None:
        measure(step, "policy" if step else "base")
        if step and ema:
            publish("ema", None)
            measure(step, "ema")
            publish("policy", step)

    return do


def summary(name: str, answers: Sequence[Any], rewards: Sequence[str]) -> dict[str, float]:
    """`eval/NAME_REWARD` over the pictures that passed, and the shares that passed and that could be judged."""
    scores = [answer for answer in answers if isinstance(answer, Score)]
    passed = [score for score in scores if score.verdict.valid]
    scalars = {f"eval/{name}_judged": len(scores) / len(answers)}
    if scores:
        scalars[f"eval/{name}_pass_rate"] = len(passed) / len(scores)
    if passed:
        for reward in rewards:
            scalars[f"eval/{name}_{reward}"] = sum(score.rewards[reward] for score in passed) / len(passed)
    return scalars
