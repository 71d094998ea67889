"""AI feedback: a judge's scores decide the winners of an offline recipe's pairs (`data.choice_model`)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from actors.feedback import Feedback, Scores, read_scores, relabel, score_pairs, write_record
from actors.judging import Judging, judging_actor
from jobs.example_sets import ExampleSet, ExampleSets
from rlhf.data.examples import PairIndex, write_index
from rlhf.errors import Refused
from rlhf.rewards import protocols as reward
from rlhf.rewards import python
from rlhf.rewards.config import JudgeConfig, JudgesConfig, PythonJudgeConfig, ServeConfig
from rlhf.section import local_paths
from serve_apps import deploy

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One data set to relabel, and where the judge's scores of it are kept."""

    pairs: ExampleSet
    index: PairIndex
    kept: Path
    """The scores, beside the index, for whoever asks the same judge about the same pictures."""
    labelled: Path
    """The index with the judge's winners."""
    metric: str
    record: str
    """Name of the file in the run's folder, for people."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Pairs with the judge's winners."""

    examples: ExampleSets
    swapped: dict[str, float]
    """Metric → share of the scored pairs whose winner is not the human's."""
    records: dict[str, tuple[PairIndex, Feedback]]
    """File name → the pairs as they were, and what the judge said of them."""

    def write_records(self, folder: Path) -> None:
        """All scores, into a run's folder."""
        for name, (index, feedback) in self.records.items():
            write_record(folder / name, index, feedback)


def relabel_by_judge(
    judges: JudgesConfig, serve: ServeConfig, judge: str, pairs: ExampleSets, name: str, say: Say
) -> Labelled:
    """The same pairs with the winners that `judge` (`data.choice_model`) prefers, without those that it could not score.

    The judge is deployed for this alone, in the name of `name`, and only if some pair was not scored yet. Raises:
    DeployError, JudgeUnreliable, JudgingFailed; Refused where it scored no pair at all.
    """
    todo = [_work(judges, judge, pairs.training, "feedback/swapped", "feedback.parquet")]
    if pairs.evaluation:
        todo.append(_work(judges, judge, pairs.evaluation, "feedback/swapped_eval", "feedback_eval.parquet"))
    scores = [read_scores(work.kept, work.index) for work in todo]
    if any(found.unasked().size for found in scores):
        scores = _score(judges, serve, judge, todo, name, say)
    for work, found in zip(todo, scores, strict=True):
        if found.failed.all():
            raise Refused(f"data.choice_model = {judge!r} scored none of {len(work.index)} pairs")
    answers = [relabel(work.index, found) for work, found in zip(todo, scores, strict=True)]
    done = [_labelled(judge, work, answer, say) for work, answer in zip(todo, answers, strict=True)]
    return Labelled(
        examples=replace(pairs, training=done[0], evaluation=done[1] if len(done) > 1 else None),
        swapped={work.metric: answer.swapped for work, answer in zip(todo, answers, strict=True)},
        records={work.record: (work.index, answer) for work, answer in zip(todo, answers, strict=True)},
    )


def _work(judges: JudgesConfig, judge: str, pairs: ExampleSet, metric: str, record: str) -> Work:
    if pairs.index is None:
        raise Refused("data.choice_model cannot relabel an online run's record: it holds latents and no pictures")
    digest, place = _digest(judges, judge, pairs, pairs.index), pairs.place.path
    return Work(
        pairs=pairs,
        index=pairs.index,
        kept=place.with_name(f"scores-{digest}.npz"),
        labelled=place.with_name(f"index-{digest}.arrow"),
        metric=metric,
        record=record,
    )


def _digest(judges: JudgesConfig, judge: str, pairs: ExampleSet, index: PairIndex) -> str:
    """Of what decides a score: the judge, its weights or code, and what it sees; not of how many replicas it has."""
    settings = judges[judge]
    source = settings.model_dump_json(exclude=set(JudgeConfig.model_fields))
    weights = [reward.fingerprint(Path(path)) for _, path in local_paths(settings)]
    if isinstance(settings, PythonJudgeConfig):
        function = str(settings.function)
        weights.append(python.version(python.resolve(judge, function), function))
    # The contents too: a JSONL's pictures, or an item's words, may change where the index keeps its name.
    about = xxhash.xxh3_64()
    for image_id in index.table["image_id"].to_pylist() if pairs.items else ():
        about.update(json.dumps([image_id, dict(pairs.items[image_id])]).encode())
    return xxhash.xxh3_64_hexdigest(f"{judge} {source} {weights} {index.digest()} {about.hexdigest()}".encode())


def _score(
    judges: JudgesConfig, serve: ServeConfig, judge: str, todo: Sequence[Work], name: str, say: Say
) -> list[Scores]:
    judges_up = deploy.deploy(judges, serve, [judge], name)
    judging = Judging(judges, judging_actor(judges, [judge], judges_up.apps))
    try:
        return [
            score_pairs(work.index, judge, judging, work.pairs.items, work.kept, judges.max_failure_rate, say)
            for work in todo
        ]
    finally:
        judging.close()
        deploy.undeploy(name, [judge])


def _labelled(judge: str, work: Work, answer: Feedback, say: Say) -> ExampleSet:
    left_out = int((~answer.scored).sum())
    say(
        f"feedback: {judge} swaps {answer.swapped:.1%} of {len(work.index)} pairs"
        f"{f', {left_out} left out, as it failed on them' if left_out else ''}; all scores: {work.record} of the run"
    )
    index = work.index.relabelled(answer.winners, answer.scored)
    write_index(work.labelled, index)
    assert work.pairs.checked is not None
    checked = replace(work.pairs.checked, file=work.labelled, index=index)
    return replace(work.pairs, place=replace(work.pairs.place, path=work.labelled), checked=checked)
