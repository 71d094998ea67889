"""Online DPO: the loop. Sample with the current policy, judge, train on the pairs, publish, repeat.

The loop holds references, scores and counters; no tensor ever lands here. `rollouts` and `trainer` are whatever has the
methods below: Ray actors in a run (`actors/`), objects of one process in tests. A step is one optimizer update; row and
file number s belong to the s-th update.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.runs.folder import RunFolder
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Pair, Prompt, Score, seed_from


class Rollouts(Protocol):
    @property
    def version(self) -> int: ...
    def load(self, publication: Any, step: int | None) -> None: ...
    def take(self, step: int) -> Sequence[Pair]: ...
    def score(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[Any, Any]]: ...
    def metrics(self) -> dict[str, float]: ...
    def snapshot(self) -> dict[str, Any]: ...
    def restore(self, saved: dict[str, Any] | None) -> int: ...


class Exporter(Protocol):
    def export(self, folder: Path) -> None: ...


class Trainer(Exporter, Protocol):
    def step(self, step: int, pairs: Sequence[Pair], pairs_folder: Path) -> dict[str, float]: ...
    def refresh_reference(self) -> None: ...
    def publish(self, version: int, which: str = "policy") -> Any: ...
    def save(self, folder: Path) -> None: ...
    def restore(self, folder: Path) -> int: ...


class Tracker(Protocol):
    def log(self, step: int, scalars: dict[str, float]) -> None: ...
    def pairs(self, step: int, pairs: Sequence[Pair]) -> None: ...
    def edits(self, step: int, name: str, prompts: Sequence[Prompt], answers: Sequence[tuple[Any, Any]]) -> None: ...


def online_dpo(
    config: OnlineDPOConfig,
    run: RunFolder,
    rollouts: Rollouts,
    trainer: Trainer,
    tracker: Tracker,
    held_out: Sequence[Prompt] = (),
) -> None:
    """Run from the last committed step to `trainer.max_train_steps`, then export into final/."""
    step = resume(run, rollouts, trainer)
    if step == 0:
        evaluate(config, step, held_out, rollouts, trainer, tracker)
    while step < config.trainer.max_train_steps:
        pairs = rollouts.take(step)
        step += 1
        metrics = trainer.step(step, pairs, run.path / "pairs")
        tracker.log(step, metrics | rollouts.metrics())
        if due(step, config.run.sample_every):
            tracker.pairs(step, pairs)
        if due(step, config.dpo.reference_refresh_every):
            trainer.refresh_reference()
        if due(step, config.rollout.publish_every):
            rollouts.load(trainer.publish(rollouts.version + 1), step)
        if due(step, config.eval.every):
            evaluate(config, step, held_out, rollouts, trainer, tracker)
        if due(step, config.run.export_every):
            export(run, step, trainer)
        if due(step, config.run.save_every):
            commit(config, run, step, rollouts, trainer)
    trainer.export(run.begin_final())
    run.finish()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def resume(run: RunFolder, rollouts: Rollouts, trainer: Trainer) -> int:
    """Restore the last committed step, if any, and publish it under the version it had."""
    step, saved = run.last_committed(), None
    if step is not None:
        state = run.checkpoint_path(step) / "state"
        trainer.restore(state)
        saved = json.loads((state / "rollouts.json").read_text())
    rollouts.load(trainer.publish(rollouts.restore(saved)), step or 0)
    return step or 0


def export(run: RunFolder, step: int, trainer: Exporter) -> None:
    """Loadable weights of this step, which stay. Before a commit of the same step, so that a resume cannot miss them."""
    trainer.export(run.begin_export(step))
    run.finish_export(step)


def commit(config: OnlineDPOConfig, run: RunFolder, step: int, rollouts: Rollouts, trainer: Trainer) -> None:
    """Write everything a resume needs, then the marker that makes it count, then remove what is older."""
    folder = run.begin_checkpoint(step)
    trainer.save(folder / "state")
    (folder / "state" / "rollouts.json").write_text(json.dumps(rollouts.snapshot()))
    run.commit(step)
    run.prune(config.run.keep_checkpoints)


def evaluate(
    config: OnlineDPOConfig,
    step: int,
    held_out: Sequence[Prompt],
    rollouts: Rollouts,
    trainer: Trainer,
    tracker: Tracker,
) -> None:
    """Score held-out prompts at fixed noise with the policy (step 0: the base) and, if one is kept, the EMA weights."""
    if not held_out:
        return
    prompts = [prompt for prompt in held_out for _ in range(config.eval.seeds)]
    seeds = [seed_from(config.run.seed, "eval", index) for index in range(len(prompts))]

    def measure(name: str) -> None:
        answers = rollouts.score(prompts, seeds)
        tracker.log(step, summary(name, [answer for _, answer in answers], config.reward.names))
        tracker.edits(step, name, prompts, answers)

    measure("policy" if step else "base")
    if step and config.trainer.ema_decay is not None:
        rollouts.load(trainer.publish(rollouts.version + 1, which="ema"), None)
        measure("ema")
        rollouts.load(trainer.publish(rollouts.version + 1), step)


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
