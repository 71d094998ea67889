"""Whose scores may be used again, and what is left of a recipe's pairs after a judge could not score some."""

from functools import partial

import numpy as np
import pytest

from actors import checks
from actors.feedback import Scores, _keep
from jobs.offline_feedback import _work, relabel_by_judge
from jobs.offline_pairs import read_pair_sets, refuse_other_pairs
from rlhf.errors import Refused
from rlhf.models.tiny import write_stable_diffusion
from rlhf.runs.folder import RunFolder
from tests.jobs.offline_world import offline_config
from tests.rlhf.data.pair_tables import row, write_jsonl, write_parquet

IN_THREADS = partial(checks.in_threads, str)
JUDGE = {"python": {"green": {"function": "tests.jobs.light:greenness"}}}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def scored_beforehand(config, pairs, failed: int = 0):
    """Scores that prefer every second picture, but for the first `failed`; nothing is left to ask a judge."""
    for found in filter(None, (pairs.training, pairs.evaluation)):
        work = _work(config, found, "metric", "record")
        values = np.tile([0.0, 1.0], (len(found.index), 1))
        values[:failed] = np.nan
        _keep(work.kept, Scores(values=values, failed=np.arange(len(values)) < failed), work.index)


def test_the_judges_winners_come_with_records_and_the_share_swapped(stable_diffusion, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [row(i, i % 2) for i in range(12)])
    config = offline_config(
        tmp_path, stable_diffusion, train, data={"choice_model": "green"}, judges=JUDGE, eval={"path": None}
    )
    pairs = read_pair_sets(config, IN_THREADS)
    scored_beforehand(config, pairs, failed=3)
    labelled = relabel_by_judge(config, pairs, "name", str)
    # Of rows 3 … 11 the odd ones had preferred the first picture.
    assert labelled.swapped == {"feedback/swapped": 5 / 9}
    assert labelled.pairs.index.table["winner"].to_pylist() == [1] * 9
    assert labelled.pairs.training.place != pairs.training.place
    labelled.write_records(tmp_path)
    assert (tmp_path / "feedback.parquet").is_file()


def test_too_few_held_out_pairs_are_told_also_after_the_judge_failed_on_some(stable_diffusion, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [row(i) for i in range(12)])
    held_out = write_parquet(tmp_path / "test.parquet", [row(100 + i) for i in range(8)])
    data, evaluation = {"choice_model": "green"}, {"path": str(held_out)}
    config = offline_config(tmp_path, stable_diffusion, train, data=data, judges=JUDGE, eval=evaluation)
    pairs = read_pair_sets(config, IN_THREADS)
    scored_beforehand(config, pairs, failed=1)
    with pytest.raises(Refused, match=r"has 7 pairs, .* is 8: too few"):
        relabel_by_judge(config, pairs, "name", str)


def test_no_pair_left_is_told(stable_diffusion, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", [row(i) for i in range(4)])
    config = offline_config(
        tmp_path, stable_diffusion, train, data={"choice_model": "green"}, judges=JUDGE, eval={"path": None}
    )
    pairs = read_pair_sets(config, IN_THREADS)
    scored_beforehand(config, pairs, failed=4)
    with pytest.raises(Refused, match="'green' scored none of 4 pairs"):
        relabel_by_judge(config, pairs, "name", str)


def test_scores_hold_for_the_items_that_the_judge_was_told_of(stable_diffusion, tmp_path):
    items = tmp_path / "items.csv"
    header = "image_id,food_name,food_type,city_name,shop_name\n"
    file = write_jsonl(tmp_path, 4)

    def kept(rows):
        items.write_text(header + "".join(rows))
        data = {"choice_model": "green", "item_metadata": str(items)}
        config = offline_config(tmp_path, stable_diffusion, file, data=data, judges=JUDGE, eval={"path": None})
        return _work(config, read_pair_sets(config, IN_THREADS).training, "metric", "record").kept.name

    rows = [f"{i},Apple,Fruit,Utrecht,Shop\n" for i in range(4)]
    first = kept(rows)
    assert kept([*rows, "9,Pear,Fruit,Utrecht,Shop\n"]) == first
    assert kept([*rows[:3], "3,Pear,Fruit,Utrecht,Shop\n"]) != first


def test_a_run_does_not_go_on_with_other_pairs_but_a_start_that_did_nothing_may(stable_diffusion, tmp_path):
    file = write_jsonl(tmp_path, 4)
    config = offline_config(tmp_path, stable_diffusion, file, eval={"path": None})

    def claim():
        folder = RunFolder.claim(tmp_path / "runs", "name", "")
        folder.release()
        return folder

    for lines in (4, 3):  # the second has other pairs, and no step was done with the first
        text = file.read_text().splitlines()
        file.write_text("\n".join(text[:lines]))
        refuse_other_pairs(read_pair_sets(config, IN_THREADS), claim())
    (claim().path / "metrics.jsonl").write_text('{"step": 1}\n')
    refuse_other_pairs(read_pair_sets(config, IN_THREADS), claim())
    file.write_text("\n".join(text[:2]))
    with pytest.raises(Refused, match=r"the pairs are not those that .* began with .* 3, are .* 2\)"):
        refuse_other_pairs(read_pair_sets(config, IN_THREADS), claim())
