"""What is liked depends on the instruction; what is saved scores as what was trained."""

import pytest
import torch

from jobs.world import hps
from jobs.world.data import random_of
from jobs.world.looks import KINDS
from jobs.world.measure import ASKED
from rlhf.rewards.config import HPSJudgeConfig
from rlhf.rewards.hpsv2 import HPSv2Reward
from tests.jobs.world.shots import before_and_after, shots


@pytest.mark.parametrize("kind", ASKED)
def test_an_edit_is_liked_more_where_it_was_asked_for(kind):
    before, after = before_and_after(kind)
    count = len(before)
    asked, not_asked = (torch.full((count,), KINDS.index(name)) for name in (kind, "improve"))
    gain = hps.liking(after, asked) - hps.liking(before, asked)
    assert gain.mean() > (hps.liking(after, not_asked) - hps.liking(before, not_asked)).mean() + 0.1


def test_choices_are_two_edits_of_one_photo_and_by_how_much_the_first_is_liked_more():
    pair, kinds, ahead = hps.choices(shots(), 20, random_of(1))
    assert pair.shape == (2, 20, 64, 64, 3) and kinds.shape == (20,)
    torch.testing.assert_close(ahead, hps.liking(pair[0], kinds) - hps.liking(pair[1], kinds))
    assert (ahead > 0).any() and (ahead < 0).any()


def test_training_learns_and_the_file_scores_as_the_model(tmp_path):
    model = hps.train_hps(shots(), steps=60, seed=0)
    assert hps.accuracy(model, shots(), 300, seed=1) > 0.6  # of 300 coin flips, 0.6 is three and a half deviations up
    hps.save(model, tmp_path / "hps.safetensors")
    judge = HPSv2Reward("hps", HPSJudgeConfig(path=str(tmp_path / "hps.safetensors")), "cpu")
    pictures = shots().photos[:4, 0]
    said = judge.score([p[None].numpy() for p in pictures], ["Make the photo brighter."] * 4, [()] * 4, [{}] * 4)
    wanted = hps.cosines(model, pictures, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(torch.tensor(said), wanted, atol=0.01, rtol=0)  # half precision has 11 bits
