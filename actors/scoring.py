"""An evaluation's pictures through every judge: read from their files by tasks and judged by reference.

A failed score never becomes a number: it is listed with its reason, and too many of one judge end the evaluation. Left out:
keeping scores for an evaluation that starts again; asking is cheap beside painting.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from actors.judges import Answer
from actors.judging import READS_AT_ONCE, Judging, Read, judge_all
from actors.painting import picture_file, source_file
from actors.placement import JUDGES_CPUS, Role
from actors.reading import READER_CPUS, start_painted
from rlhf.evaluation.duels import SIDES, Duel, FailedScore, Picture, Side
from rlhf.rollouts.reliability import FailureRates
from rlhf.types import Prompt

PICTURES_PER_READ = 8
LOG_EVERY = 32
"""Pictures between two lines of progress."""

Place = tuple[int, int, Side]
"""(place of the prompt, variant, side) of a picture."""


def judging_role() -> Role:
    """The judging actor and the tasks that read the pictures."""
    cpus = JUDGES_CPUS + READS_AT_ONCE * READER_CPUS
    return Role(name="judging actor and readers", count=1, num_cpus=cpus, num_gpus=0, nbytes=0)


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
    pictures: dict[Place, Picture] = {}
    failed: list[FailedScore] = []
    rates = FailureRates(max_failure_rate)
    total = len(prompts) * seeds * len(SIDES)
    for judged in judge_all(judging, _reads(out, prompts, seeds, edits)):
        for place, distance, answer in zip(judged.key, judged.about, judged.answers, strict=True):
            file = picture_file(*place)
            failed += _failures(answer, file, names, rates)
            pictures[place] = Picture(file=file, scores=answer.rewards, source_distance=distance)
            if len(pictures) % LOG_EVERY == 0 or len(pictures) == total:
                log(f"judged: {len(pictures)}/{total} pictures")
    for name in names:
        rates.check(name)
    return _duels(prompts, pictures, seeds, edits), sorted(failed, key=lambda score: (score.judge, score.file))


def _reads(out: Path, prompts: Sequence[Prompt], seeds: int, edits: bool) -> Iterator[Read[list[Place]]]:
    """Some pictures at a time, prompt by prompt."""
    places: list[Place] = [
        (i, variant, side) for i in range(len(prompts)) for variant in range(seeds) for side in SIDES
    ]
    for start in range(0, len(places), PICTURES_PER_READ):
        part = places[start : start + PICTURES_PER_READ]
        files = [(out / picture_file(*place), out / source_file(place[0]) if edits else None) for place in part]
        asked = [prompts[place[0]] for place in part]
        yield Read(key=part, start=partial(start_painted, files), prompts=partial(_known, asked))


def _known(prompts: list[Prompt], distances: Sequence[float | None]) -> list[Prompt]:
    """The prompts of pictures, whatever their source distances."""
    return prompts


def _failures(answer: Answer, file: str, names: Sequence[str], rates: FailureRates) -> list[FailedScore]:
    """The judges that failed on a picture; every call is counted. Raises JudgeUnreliable."""
    reasons = {failure.judge: failure.reason for failure in answer.failures}
    failed = [FailedScore(judge=name, file=file, reason=reason) for name, reason in reasons.items()]
    for name in names:
        rates.add(name, reasons.get(name))
    return failed


def _duels(prompts: Sequence[Prompt], pictures: Mapping[Place, Picture], seeds: int, edits: bool) -> list[Duel]:
    return [
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
