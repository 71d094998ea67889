"""AI feedback: a judge's scores decide the winners of an offline recipe's pairs (`data.choice_model`)."""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import xxhash

from actors.feedback import Feedback, read_scores, relabel, score_pairs
from actors.judging import Judging
from jobs.cli import Say
from jobs.example_sets import ExampleSet, ExampleSets
from rlhf.data.examples import PairIndex, write_index
from rlhf.errors import Refused
from rlhf.rewards import protocols as reward
from rlhf.rewards import python
from rlhf.rewards.config import JudgeConfig, JudgesConfig, PythonJudgeConfig, ServeConfig
from rlhf.section import local_paths
from serve_apps import deploy


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Pairs with a judge's winners, if one was asked."""

    examples: ExampleSets
    swapped: Mapping[str, float] = field(default_factory=dict)
    """Metric → share of the scored pairs whose winner is not the human's."""
    records: Mapping[str, tuple[PairIndex, Feedback]] = field(default_factory=dict)
    """File name → the pairs as they were, and what the judge said of them."""


def relabel_by_judge(
    judges: JudgesConfig, serve: ServeConfig, judge: str, pairs: ExampleSets, name: str, say: Say
) -> Labelled:
    """The same pairs with the winners that `judge` (`data.choice_model`) prefers, without those that it could not score.

    The judge is deployed for this alone, in the name of `name`, and only if some pair was not scored yet. Raises:
    DeployError, JudgeUnreliable, JudgingFailed; Refused where it scored no pair at all.
    """
    sets = [pairs.training, *([pairs.evaluation] if pairs.evaluation else [])]
    files = [scores_file(judges, judge, found) for found in sets]
    scores = [read_scores(file, _index(found)) for file, found in zip(files, sets, strict=True)]
    if any(found.unasked().size for found in scores):
        judges_up = deploy.deploy(judges, serve, [judge], name)
        try:
            with closing(Judging(judges, [judge], judges_up.apps)) as judging:
                ask = partial(
                    score_pairs, judge=judge, judging=judging, max_failure_rate=judges.max_failure_rate, log=say
                )
                scores = [
                    ask(_index(s), s.place.sizes[0], items=s.items, kept=file)
                    for s, file in zip(sets, files, strict=True)
                ]
        finally:
            deploy.undeploy(name, [judge])
    labelled, swapped, records = list[ExampleSet](), dict[str, float](), dict[str, tuple[PairIndex, Feedback]]()
    for found, file, given, ending in zip(sets, files, scores, ("", "_eval"), strict=False):
        index, record = _index(found), f"feedback{ending}.parquet"
        if given.failed.all():
            raise Refused(f"data.choice_model = {judge!r} scored none of {len(index.table)} pairs")
        answer = relabel(index, given)
        left_out = int((~answer.scored).sum())
        say(
            f"feedback: {judge} swaps {answer.swapped:.1%} of {len(index.table)} pairs"
            f"{f', {left_out} left out, as it failed on them' if left_out else ''}; all scores: {record} of the run"
        )
        labelled.append(_relabelled(found, file, answer))
        swapped[f"feedback/swapped{ending}"], records[record] = answer.swapped, (index, answer)
    examples = replace(pairs, training=labelled[0], evaluation=labelled[1] if pairs.evaluation else None)
    return Labelled(examples=examples, swapped=swapped, records=records)


def _index(pairs: ExampleSet) -> PairIndex:
    assert pairs.index is not None, "the record of an online run is refused with a choice_model"
    return pairs.index


def _relabelled(pairs: ExampleSet, scores: Path, answer: Feedback) -> ExampleSet:
    """The pairs with the winners of `answer`, in an index of their own beside the scores."""
    file = scores.with_name(scores.name.replace("scores-", "index-")).with_suffix(".arrow")
    index = _index(pairs).relabelled(answer.winners, answer.scored)
    write_index(file, [index])
    return replace(pairs, place=replace(pairs.place, path=file), index=index)


def scores_file(judges: JudgesConfig, judge: str, pairs: ExampleSet) -> Path:
    """Where a judge's scores are kept: beside the index, for whoever asks the same judge about the same pictures.

    Named after what decides a score: the judge, its weights or code, and what it sees; not after how many replicas it has.
    """
    index, settings = _index(pairs), judges[judge]
    source = settings.model_dump_json(exclude=set(JudgeConfig.model_fields))
    weights = [reward.quick_fingerprint(Path(path)) for _, path in local_paths(settings)]
    if isinstance(settings, PythonJudgeConfig):
        function = str(settings.function)
        weights.append(python.version(python.resolve(judge, function), function))
    # The contents too: a JSONL's pictures, or an item's words, may change where the index keeps its name.
    about = xxhash.xxh3_64()
    for image_id in index.table["image_id"].to_pylist() if pairs.items else ():
        about.update(json.dumps([image_id, dict(pairs.items[image_id])]).encode())
    seen = f"{judge} {source} {weights} {index.digest()} {about.hexdigest()}"
    return pairs.place.path.with_name(f"scores-{xxhash.xxh3_64_hexdigest(seen.encode())}.npz")
