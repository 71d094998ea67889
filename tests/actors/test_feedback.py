"""AI feedback against a real HTTP judge: who wins, what a failing judge does, and what an interruption keeps."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.feedback import Scores, _keep, _prompts, read_scores, relabel, score_pairs, write_record
from actors.judging import Judging
from rlhf.data.examples import read_index
from rlhf.data.media import decode_image
from rlhf.data.sizes import Sizes
from rlhf.errors import Refused
from rlhf.rewards.config import JudgesConfig
from rlhf.rewards.questions import sources_of
from rlhf.rollouts.reliability import JudgeUnreliable
from rlhf.types import Geometry
from tests.judge_server import warmth
from tests.rlhf.data.pair_tables import index_of, row, write_jsonl, write_parquet

SIZE = Geometry(height=16, width=16)
SIZED = Sizes(sizes=(SIZE,))
ROWS = [row(seed, label=seed % 2) for seed in range(40)]


@pytest.fixture
def index(tmp_path):
    return read_index(index_of(write_parquet(tmp_path / "pairs.parquet", ROWS, row_group_size=16)))


def scored(index, kept, url, max_failure_rate=0.5):
    judges = JudgesConfig.model_validate({"hps": {"url": f"{url}/hpsv2"}, "retries": 0, "timeout_s": 30.0})
    judging = Judging(judges, ["hps"], {})
    said: list[str] = []
    try:
        score_pairs(index, SIZED, "hps", judging, {}, kept, max_failure_rate, said.append)
    finally:
        judging.close()
    return said


def test_the_higher_score_wins_ties_keep_the_human_and_swaps_are_counted(index):
    five = index.relabelled(np.arange(40, dtype=np.int8) % 2, np.arange(40) < 5)  # humans said 0, 1, 0, 1, 0
    values = np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 3.0], [3.0, 3.0], [np.nan, np.nan]])
    answer = relabel(five, Scores(values=values, failed=np.array([False] * 4 + [True])))
    assert answer.winners[:4].tolist() == [1, 1, 0, 1]
    assert answer.scored.tolist() == [True] * 4 + [False]
    assert answer.swapped == 0.25


def test_every_pair_gets_the_judges_scores_and_a_second_call_asks_nothing(cluster, judge_server, index, tmp_path):
    kept = tmp_path / "scores.npz"
    scored(index, kept, judge_server())
    scores = read_scores(kept, index)
    expected = [[warmth(decode_image(pair[side])) for side in ("jpg_0", "jpg_1")] for pair in ROWS]
    assert scores.values == pytest.approx(np.array(expected)) and not scores.failed.any()
    assert scored(index, kept, "http://127.0.0.1:9") == ["feedback: hps scores 0 of 40 pairs"]


def test_what_another_job_has_scored_meanwhile_is_kept_too(index, tmp_path):
    kept, nothing = tmp_path / "scores.npz", np.full((40, 2), np.nan)
    mine, theirs = (Scores(values=nothing.copy(), failed=np.zeros(40, bool)) for _ in range(2))
    mine.values[20:], theirs.values[:20] = 0.5, 0.25
    for scores in (mine, theirs, mine):
        _keep(kept, scores, index)
    assert read_scores(kept, index).values.tolist() == [[0.25] * 2] * 20 + [[0.5] * 2] * 20


def test_pairs_that_the_judge_fails_on_are_told_and_left_out(cluster, judge_server, index, tmp_path):
    kept = tmp_path / "scores.npz"
    said = scored(index, kept, judge_server(fail=0.1))
    answer = relabel(index, read_scores(kept, index))
    left_out = [line for line in said if line.startswith("feedback: left out")]
    assert 0 < (~answer.scored).sum() == len(left_out) < 20
    assert all("pairs.parquet row " in line and "status 500" in line for line in left_out)
    assert len(index.relabelled(answer.winners, answer.scored).table) == answer.scored.sum()
    write_record(tmp_path / "feedback.parquet", index, answer)
    record = pq.read_table(tmp_path / "feedback.parquet").to_pylist()
    assert [pair["winner"] is None for pair in record] == (~answer.scored).tolist()
    assert all((pair["score_0"] is None) == (pair["winner"] is None) for pair in record)


def test_a_judge_that_fails_too_often_stops_and_is_asked_again_later(cluster, judge_server, index, tmp_path):
    kept = tmp_path / "scores.npz"
    with pytest.raises(JudgeUnreliable, match=r"judge 'hps' failed \d+ of its last \d+ calls .*row \d+: .*status 500"):
        scored(index, kept, judge_server(fail=0.9))
    assert not read_scores(kept, index).failed.any() and read_scores(kept, index).unasked().size
    scored(index, kept, judge_server())
    assert np.isfinite(read_scores(kept, index).values).all()


def test_a_picture_that_changed_stops_it_and_is_named(cluster, judge_server, tmp_path):
    index = read_index(index_of(write_jsonl(tmp_path, 20)))
    (tmp_path / "pictures/19_l.png").write_bytes((tmp_path / "pictures/19_w.png").read_bytes())
    with pytest.raises(Refused, match=r"19_l\.png changed since it was checked; start the job again"):
        scored(index, tmp_path / "scores.npz", judge_server())


def test_each_picture_is_judged_with_its_pairs_caption_item_and_source_at_its_own_size(tmp_path):
    items = {"0": {"price": "3"}, "1": {"price": "4"}}
    index = read_index(index_of(write_jsonl(tmp_path, 2, source=True), source_counts=range(1, 2), items=items))
    pairs = list(index.examples(range(2), SIZED))
    prompts = _prompts(pairs, items, [(8, 8), (8, 16), (4, 8), (8, 8)])
    assert [(prompt.geometry.height, prompt.geometry.width) for prompt in prompts] == [(8, 8), (8, 16), (4, 8), (8, 8)]
    assert [prompt.sources for prompt in prompts] == [pair.prompt.sources for pair in pairs for _ in range(2)]
    assert [prompt.item["price"] for prompt in prompts] == ["3", "3", "4", "4"]
    assert [prompt.instruction for prompt in prompts] == [pair.prompt.instruction for pair in pairs for _ in range(2)]
    assert sources_of(prompts[1])[0].shape == (1, 8, 16, 3)
