"""An evaluation's pictures: samplers that make what is missing, base before tuned, and every judge's scores of them.

Base and tuned start from the same noise, made from (seed, prompt, variant), at the same place of a batch. A failed score never
becomes a number: it is listed with its reason, and too many of one judge end the evaluation. Left out: replacing a dead sampler
(the same command goes on with the pictures that are there), and keeping scores (asking is cheap beside painting).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from time import monotonic

import ray

from actors import reading
from actors.judging import Judging, Read, judge_all
from actors.sampler import Painting, Sampler, SampleRequest
from rlhf.data.instructions import Unread, unread_report
from rlhf.errors import Refused
from rlhf.evaluation.duels import SIDES, Duel, FailedScore, Picture, Side
from rlhf.models import load_family
from rlhf.models.family import Family
from rlhf.rollouts.reliability import FailureRates
from rlhf.tables import EvaluateSamplingTable, ModelTable, SamplersConfig, WeightsTable
from rlhf.types import Prompt, seed_from

PICTURES_PER_READ = 8
LOG_EVERY = 32
"""Pictures between two lines of progress."""
Place = tuple[int, int, Side]
"""(place of the prompt, variant, side) of a picture."""


class PaintingFailed(Refused):
    """Samplers gave nothing in time; what was painted before is kept."""


def painted_file(index: int, variant: int, side: Side) -> str:
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
    """Paint what `out` lacks, and warn of what encoders do not read. Raises PaintingFailed at the deadline, and what a
    sampler raised.
    """
    family, weights = load_family(model), {"base": WeightsTable(), "tuned": tuned}
    todo = [(weights[side], batch) for side in SIDES for batch in batches(prompts, sampling, out, side, seed, family)]
    total, done = sum(len(batch) for _, batch in todo), 0
    log(f"{total} pictures to paint, {2 * len(prompts) * sampling.seeds - total} are there")
    device = "cuda" if samplers.num_gpus > 0 else "cpu"
    options = {"num_cpus": samplers.num_cpus, "num_gpus": samplers.num_gpus, "max_restarts": 0, "max_task_retries": 0}
    new_sampler = ray.remote(Sampler).options(**options).remote
    actors = [new_sampler(model, sampling, device) for _ in range(min(samplers.count, len(todo)))]
    idle, busy, started = list(actors), dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, int]](), monotonic()
    not_read = Unread()
    try:
        while todo or busy:
            while todo and idle:
                actor, (chosen, batch) = idle.pop(), todo.pop(0)
                busy[actor.paint.remote(chosen, batch)] = actor, len(batch)
            ready, _ = ray.wait(list(busy), timeout=samplers.timeout_s)
            if not ready:
                free = ray.available_resources()
                raise PaintingFailed(
                    f"no picture in samplers.timeout_s = {samplers.timeout_s:g} s; the cluster has {free} free"
                )
            actor, count = busy.pop(ready[0])
            idle.append(actor)
            try:
                not_read |= ray.get(ready[0], timeout=samplers.timeout_s)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            done += count
            log(f"painted: {done}/{total} pictures, {monotonic() - started:.0f} s")
    finally:
        for actor in actors:
            ray.kill(actor)
    for warning in unread_report(not_read, len(prompts)):
        log(warning)


def batches(
    prompts: Sequence[Prompt], sampling: EvaluateSamplingTable, out: Path, side: Side, seed: int, family: Family
) -> list[list[Painting]]:
    """The missing pictures of one side, in batches. A picture's place in its batch follows from its number alone."""
    waiting: dict[Hashable, list[dict[int, Painting]]] = defaultdict(list)
    edits = any(prompt.sources for prompt in prompts)
    for (index, prompt), variant in product(enumerate(prompts), range(sampling.seeds)):
        file = out / painted_file(index, variant, side)
        if file.exists():
            continue
        slot = (index * sampling.seeds + variant) % sampling.batch_size
        same = waiting[family.bucket(prompt)]
        if all(slot in batch for batch in same):
            same.append({})
        batch = next(batch for batch in same if slot not in batch)
        request = SampleRequest(prompt=prompt, noise_seed=seed_from(seed, "evaluate", index, variant), slot=slot)
        batch[slot] = request, file, out / source_file(index) if edits else None
    return [list(batch.values()) for batch in chain(*waiting.values())]


def judge_pictures(
    out: Path,
    prompts: Sequence[Prompt],
    judging: Judging,
    names: Sequence[str],
    *,
    seeds: int,
    edits: bool,
    max_failure_rate: float,
    log: Callable[[str], None],
) -> tuple[list[Duel], list[FailedScore]]:
    """Every painted picture in `out` through every judge of `names`. Raises JudgeUnreliable, JudgingFailed.

    seeds: pictures per prompt and side; edits: whether the model saw sources, which then lie in `out` too.
    """
    pictures, failed = dict[Place, Picture](), list[FailedScore]()
    rates, total = FailureRates(max_failure_rate), len(prompts) * seeds * len(SIDES)
    for judged in judge_all(judging, _reads(out, prompts, seeds, edits)):
        for place, distance, answer in zip(judged.key, judged.about, judged.answers, strict=True):
            file, reasons = painted_file(*place), {failure.judge: failure.reason for failure in answer.failures}
            failed += [FailedScore(judge=name, file=file, reason=reason) for name, reason in reasons.items()]
            for name in names:
                rates.add(name, reasons.get(name))
            pictures[place] = Picture(file=file, scores=answer.rewards, source_distance=distance)
            if len(pictures) % LOG_EVERY == 0 or len(pictures) == total:
                log(f"judged: {len(pictures)}/{total} pictures")
    for name in names:
        rates.check(name)
    duels = [
        Duel(
            prompt=index,
            variant=variant,
            key=prompt.key,
            instruction=prompt.instruction,
            height=prompt.geometry.height,
            width=prompt.geometry.width,
            source=source_file(index) if edits else None,
            base=pictures[index, variant, "base"],
            tuned=pictures[index, variant, "tuned"],
        )
        for index, prompt in enumerate(prompts)
        for variant in range(seeds)
    ]
    return duels, sorted(failed, key=lambda score: (score.judge, score.file))


def _reads(out: Path, prompts: Sequence[Prompt], seeds: int, edits: bool) -> Iterator[Read[list[Place]]]:
    def read(part: list[Place]) -> Read[list[Place]]:
        files = [(out / painted_file(*place), out / source_file(place[0]) if edits else None) for place in part]
        start = partial(reading.start, reading.painted, files)
        return Read(key=part, start=start, prompts=lambda _: [prompts[index] for index, _, _ in part])

    places: list[Place] = list(product(range(len(prompts)), range(seeds), SIDES))
    return (read(places[i : i + PICTURES_PER_READ]) for i in range(0, len(places), PICTURES_PER_READ))
