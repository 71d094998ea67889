"""An evaluation's pictures through every judge: read from their files by an actor and scored by reference.

A failed score never becomes a number: it is listed with its reason, and too many of one judge end the evaluation.
`actors.asking` does the asking and retries. Left out: keeping scores for an evaluation that starts again; asking is
cheap beside painting.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from actors.asking import FIRST_BACKOFF_S, Failure, last_line
from actors.judges import reward_text
from actors.painters import picture_file, source_file
from actors.placement import JUDGES_CPUS, Role
from actors.reading import Reader
from rlhf.errors import Refused
from rlhf.evaluation.config import EvaluateConfig
from rlhf.evaluation.duels import SIDES, Duel, FailedScore, Picture, Side
from rlhf.evaluation.prompts import family_of
from rlhf.models.family import sees_source
from rlhf.rollouts.reliability import FailureRates
from rlhf.types import Prompt

READER_CPUS = 0.05
READING_TIMEOUT_S = 120.0
AT_ONCE = 32
"""Pictures in the object store at a time."""


Place = tuple[int, int, Side]
"""(place of the prompt, variant, side) of a picture."""


class JudgingFailed(Refused):
    """The actor that asks the judges, or a reader of pictures, was lost."""


def asking_role() -> Role:
    """The actor that asks the judges and the one that reads the pictures."""
    return Role(name="scorer and reader", count=1, num_cpus=JUDGES_CPUS + READER_CPUS, num_gpus=0, nbytes=0)


def judge_all(
    config: EvaluateConfig, prompts: Sequence[Prompt], scorer: ray.actor.ActorHandle, log: Callable[[str], None]
) -> tuple[list[Duel], list[FailedScore]]:
    """Every painted picture through every judge. Raises JudgeUnreliable, JudgingFailed.

    scorer: an `actors.asking.Scorer`. The pictures stay in the object store.
    """
    out, judges = Path(config.out), config.judges
    edits = sees_source(family_of(config.model))
    reader = ray.remote(Reader).options(num_cpus=READER_CPUS).remote()
    read = reader.read.options(num_returns=2)
    silent_s = READING_TIMEOUT_S + 3 * (judges.timeout_s + FIRST_BACKOFF_S * 2**judges.retries) * (judges.retries + 1)
    seeds = range(config.sampling.seeds)
    todo: deque[Place] = deque(
        (index, variant, side) for index in range(len(prompts)) for variant in seeds for side in SIDES
    )
    total = len(todo)
    busy: dict[ray.ObjectRef, tuple[Place, ray.ObjectRef]] = {}
    pictures: dict[Place, Picture] = {}
    failed: list[FailedScore] = []
    rates = FailureRates(judges.max_failure_rate)
    while todo or busy:
        while todo and len(busy) < AT_ONCE:
            place = todo.popleft()
            prompt = prompts[place[0]]
            image, distance = read.remote(out / picture_file(*place), out / source_file(place[0]) if edits else None)
            busy[scorer.score.remote([image], text_of(config, prompt), prompt.item)] = (place, distance)
        ready, _ = ray.wait(list(busy), timeout=silent_s)
        if not ready:
            raise JudgingFailed(f"no score of any of {len(busy)} pictures in {silent_s:.0f} s")
        place, distance = busy.pop(ready[0])
        file = picture_file(*place)
        try:
            answers = ray.get(ready[0], timeout=READING_TIMEOUT_S)
            measured = ray.get(distance, timeout=READING_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise JudgingFailed(f"{file} cannot be judged: {last_line(error)}") from error
        for name, answer in answers.items():
            reason = answer.reason if isinstance(answer, Failure) else None
            if reason is not None:
                failed.append(FailedScore(judge=name, file=file, reason=reason))
            rates.add(name, reason)
        scores = {name: answer for name, answer in answers.items() if not isinstance(answer, Failure)}
        pictures[place] = Picture(file=file, scores=scores, source_distance=measured)
        if len(pictures) % AT_ONCE == 0 or len(pictures) == total:
            log(f"judged: {len(pictures)}/{total} pictures")
    for name in config.reward.names:
        rates.check(name)
    duels = [
        Duel(
            prompt=index,
            variant=variant,
            image_id=prompt.image_id,
            instruction=prompt.instruction,
            height=prompt.height,
            width=prompt.width,
            source=source_file(index) if edits else None,
            base=pictures[index, variant, "base"],
            tuned=pictures[index, variant, "tuned"],
        )
        for index, prompt in enumerate(prompts)
        for variant in seeds
    ]
    return duels, sorted(failed, key=lambda score: (score.judge, score.file))


def text_of(config: EvaluateConfig, prompt: Prompt) -> str:
    """What the judges read. Raises Refused where the instruction is empty and nothing can stand in for it."""
    reads = any(config.judges[name].reads_prompt for name in config.reward.names)
    return reward_text(prompt, config.reward.hps.empty_prompt) if reads else prompt.instruction
