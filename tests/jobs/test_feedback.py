"""Whose scores may be used again, and what is left of a recipe's pairs after a judge could not score some."""

from functools import partial

import numpy as np
import pytest

from actors import checks
from actors.feedback import Scores, _keep
from jobs.example_sets import read_example_sets, refuse_too_few
from jobs.feedback import relabel_by_judge, scores_file
from rlhf.errors import Refused
from rlhf.models.tiny import write_stable_diffusion
from tests.jobs.offline_world import offline_config
from tests.rlhf.data.pair_tables import row, write_jsonl, write_parquet

IN_THREADS = partial(checks.in_threads, str)
ROLES = ("winner", "loser")
JUDGE = {"python": {"green": {"function": "tests.jobs.light:greenness"}}}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def scored_beforehand(config, pairs, failed: int = 0):
    """Scores that prefer every second picture, but for the first `failed`; nothing is left to ask a judge."""
    for found in filter(None, (pairs.training, pairs.evaluation)):
        kept = scores_file(config.judges, "green", found)
        values = np.tile([0.0, 1.0], (len(found.index.table), 1))
        values[:failed] = np.nan
        _keep(kept, Scores(values=values, failed=np.arange(len(values)) < failed), found.index)


def test_the_judges_winners_come_with_records_and_the_share_swapped(stable_diffusion, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [row(i, i % 2) for i in range(12)])
    config = offline_config(
        tmp_path, stable_diffusion, train, data={"choice_model": "green"}, judges=JUDGE, eval={"path": None}
    )
    pairs = read_example_sets(config, ROLES, IN_THREADS)
    scored_beforehand(config, pairs, failed=3)
    labelled = relabel_by_judge(config.judges, config.serve, "green", pairs, "name", str)
    # Of rows 3 … 11 the odd ones had preferred the first picture.
    assert labelled.swapped == {"feedback/swapped": 5 / 9}
    assert labelled.examples.training.index.table["winner"].to_pylist() == [1] * 9
    assert labelled.examples.training.place != pairs.training.place
    ((name, (index, answer)),) = labelled.records.items()
    assert name == "feedback.parquet" and len(index.table) == 12 and int(answer.scored.sum()) == 9


def test_too_few_held_out_pairs_are_told_also_after_the_judge_failed_on_some(stable_diffusion, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [row(i) for i in range(12)])
    held_out = write_parquet(tmp_path / "test.parquet", [row(100 + i) for i in range(8)])
    data, evaluation = {"choice_model": "green"}, {"path": str(held_out)}
    config = offline_config(tmp_path, stable_diffusion, train, data=data, judges=JUDGE, eval=evaluation)
    pairs = read_example_sets(config, ROLES, IN_THREADS)
    scored_beforehand(config, pairs, failed=1)
    labelled = relabel_by_judge(config.judges, config.serve, "green", pairs, "name", str)
    with pytest.raises(Refused, match=r"has 7 pairs, .* is 8: hold out more"):
        refuse_too_few(config, labelled.examples.evaluation)


def test_no_pair_left_is_told(stable_diffusion, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [row(i) for i in range(4)])
    config = offline_config(
        tmp_path, stable_diffusion, train, data={"choice_model": "green"}, judges=JUDGE, eval={"path": None}
    )
    pairs = read_example_sets(config, ROLES, IN_THREADS)
    scored_beforehand(config, pairs, failed=4)
    with pytest.raises(Refused, match="'green' scored none of 4 pairs"):
        relabel_by_judge(config.judges, config.serve, "green", pairs, "name", str)


def test_scores_hold_for_the_items_that_the_judge_was_told_of(stable_diffusion, tmp_path):
    items = tmp_path / "items.csv"
    header = "image_id,food_name,food_type,city_name,shop_name\n"
    file = write_jsonl(tmp_path, 4)

    def kept(rows):
        items.write_text(header + "".join(rows))
        data = {"choice_model": "green", "item_metadata": str(items)}
        config = offline_config(tmp_path, stable_diffusion, file, data=data, judges=JUDGE, eval={"path": None})
        training = read_example_sets(config, ROLES, IN_THREADS).training
        return scores_file(config.judges, "green", training).name

    rows = [f"{i},Apple,Fruit,Utrecht,Shop\n" for i in range(4)]
    first = kept(rows)
    assert kept([*rows, "9,Pear,Fruit,Utrecht,Shop\n"]) == first
    assert kept([*rows[:3], "3,Pear,Fruit,Utrecht,Shop\n"]) != first
