"""The pictures of an evaluation: which are missing, and samplers that make them, base before tuned.

Base and tuned start from the same noise, made from (seed, prompt, variant), at the same place of a batch. A picture's name says
what it shows, so those that an interrupted evaluation has made are not made again.

Left out: replacing a dead sampler; the same command goes on with what is there.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import ray

from actors.sampler import Sampler, SampleRequest
from rlhf.errors import Refused
from rlhf.evaluation.duels import SIDES, Side
from rlhf.models import load_family
from rlhf.tables import EvaluateSamplingTable, ModelTable, SamplersConfig, WeightsTable
from rlhf.types import Prompt, seed_from


class PaintingFailed(Refused):
    """Samplers gave nothing in time; what was painted before is kept."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures of one side to paint together."""

    side: Side
    requests: tuple[SampleRequest, ...]
    files: tuple[Path, ...]
    sources: tuple[Path, ...]
    """Where the prompts' sources go; empty where the model sees none."""


def picture_file(index: int, variant: int, side: Side) -> str:
    """Where a generated picture lies in the evaluation's folder."""
    return f"pictures/{index:05d}_{variant}_{side}.png"


def source_file(index: int) -> str:
    """Where a prompt's source lies, as the model saw it."""
    return f"pictures/{index:05d}_source.png"


def paint_all(
    model: ModelTable,
    tuned: WeightsTable,
    sampling: EvaluateSamplingTable,
    samplers: SamplersConfig,
    prompts: Sequence[Prompt],
    out: Path,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Paint what `out` lacks. Raises PaintingFailed at the deadline, and what a sampler raised."""
    bucket = load_family(model).bucket
    todo = [batch for side in SIDES for batch in batches(prompts, sampling, out, side, seed, bucket)]
    total, done = sum(len(batch.requests) for batch in todo), 0
    log(f"{total} pictures to paint, {2 * len(prompts) * sampling.seeds - total} are there")
    weights = {"base": WeightsTable(), "tuned": tuned}
    device = "cuda" if samplers.num_gpus > 0 else "cpu"
    options = {"num_cpus": samplers.num_cpus, "num_gpus": samplers.num_gpus, "max_restarts": 0, "max_task_retries": 0}
    actors = [
        ray.remote(Sampler).options(**options).remote(model, sampling, device)
        for _ in range(min(samplers.count, len(todo)))
    ]

    def paint(actor: ray.actor.ActorHandle, batch: Batch) -> ray.ObjectRef:
        return actor.paint.remote(weights[batch.side], batch.requests, batch.files, batch.sources)

    try:
        busy = {paint(actor, todo.pop(0)): actor for actor in actors}
        started = monotonic()
        while busy:
            ready, _ = ray.wait(list(busy), timeout=samplers.timeout_s)
            if not ready:
                raise PaintingFailed(
                    f"no picture in samplers.timeout_s = {samplers.timeout_s:g} s; the cluster has "
                    f"{ray.available_resources()} free"
                )
            actor = busy.pop(ready[0])
            try:
                done += ray.get(ready[0], timeout=samplers.timeout_s)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            log(f"painted: {done}/{total} pictures, {monotonic() - started:.0f} s")
            if todo:
                busy[paint(actor, todo.pop(0))] = actor
    finally:
        for actor in actors:
            ray.kill(actor)


def batches(
    prompts: Sequence[Prompt],
    sampling: EvaluateSamplingTable,
    out: Path,
    side: Side,
    seed: int,
    bucket: Callable[[Prompt], Hashable],
) -> Iterator[Batch]:
    """What is missing of one side. A picture's place in its batch follows from its number alone."""
    waiting: dict[Hashable, list[dict[int, tuple[int, int]]]] = {}
    for index, prompt in enumerate(prompts):
        for variant in range(sampling.seeds):
            if (out / picture_file(index, variant, side)).exists():
                continue
            slot = (index * sampling.seeds + variant) % sampling.batch_size
            some = waiting.setdefault(bucket(prompt), [])
            free = next((batch for batch in some if slot not in batch), None)
            if free is None:
                some.append(free := {})
            free[slot] = index, variant
    edits = any(prompt.sources for prompt in prompts)
    for placed in (batch for some in waiting.values() for batch in some):
        yield Batch(
            side=side,
            requests=tuple(
                SampleRequest(prompt=prompts[index], noise_seed=seed_from(seed, "evaluate", index, variant), slot=slot)
                for slot, (index, variant) in placed.items()
            ),
            files=tuple(out / picture_file(index, variant, side) for index, variant in placed.values()),
            sources=tuple(out / source_file(index) for index, _ in placed.values()) if edits else (),
        )
