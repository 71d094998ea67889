"""What is told of cards before anything starts: figures, hours, and refusals with remedies that are what they say."""

import shutil
from dataclasses import replace

import pytest

from actors import cards
from actors.cards import RESERVE, Share
from actors.placement import GIB, NotEnoughResources, Role
from jobs import fit, train
from rlhf.models.memory import Peak
from rlhf.rewards.config import PythonJudgeConfig
from rlhf.section import ClusterConfig
from rlhf.training_tables import TrainerConfig
from tests.jobs.offline_world import offline_config

PEAK = Peak(
    kinds={
        "parameters": 11 * GIB,
        "gradients": 11 * GIB,
        "optimizer": 22 * GIB,
        "gathered": 3 * GIB,
        "activations": 14 * GIB,
        "temporaries": 9 * GIB,
        "frozen sides": 6 * GIB,
        "average": 11 * GIB,
    }
)


def share(nbytes, num_gpus=1.0, count=1, name="sampler", remedies=()):
    role = Role(kind="trainer", name=name, count=count, num_cpus=1, num_gpus=num_gpus, nbytes=0)
    return Share(role=role, peak=Peak(kinds={"parameters": int(nbytes)}), remedies=remedies)


def test_remedies_take_away_what_they_say_the_cheapest_first():
    config = TrainerConfig(ranks=4, train_batch_size=2, ema_decay=0.9)
    found = {what: peak.nbytes / GIB for what, peak in cards.trainer_remedies(config, PEAK)}
    assert PEAK.nbytes == 87 * GIB
    assert found == {
        'trainer.offload = "ema"': 76,
        'trainer.offload = "reference"': 70,
        'trainer.optimizer = "adamw_8bit"': pytest.approx(87 - 22 * 3 / 4),
        "trainer.train_batch_size = 1 and twice the gradient_accumulation_steps": 87 - 23 / 2,
        'trainer.offload = "optimizer"': 87 - 61,
        "trainer.ranks = 8": 87 - 61 / 2,
    }
    assert next(iter(found)) == 'trainer.offload = "ema"'


def test_a_remedy_that_this_trace_does_not_tell_has_no_figure():
    config = TrainerConfig(ranks=4, train_batch_size=1, gradient_checkpointing="half", offload="optimizer")
    kinds = PEAK.kinds | dict.fromkeys(("parameters", "gradients", "optimizer", "frozen sides", "average"), 0)
    found = dict(cards.trainer_remedies(config, Peak(kinds=kinds)))
    assert found['trainer.gradient_checkpointing = "all"'] is None
    role = replace(share(0, name="trainer rank", remedies=[*found.items()]), peak=PEAK)
    with pytest.raises(NotEnoughResources, match=r'set trainer\.gradient_checkpointing = "all"; or'):
        cards.check([role], 80 * GIB)


def test_what_has_nothing_to_take_away_is_no_remedy():
    kinds = dict.fromkeys(PEAK.kinds, 0) | {"activations": GIB, "optimizer": GIB}
    config = TrainerConfig(train_batch_size=1, optimizer="adafactor")
    assert [what for what, _ in cards.trainer_remedies(config, Peak(kinds=kinds))] == ["trainer.ranks = 2"]


def test_a_role_that_has_a_card_is_refused_with_the_remedies_that_fit():
    remedies = [*cards.trainer_remedies(TrainerConfig(ranks=4, train_batch_size=2, ema_decay=0.9), PEAK)]
    role = replace(share(0, name="trainer rank", remedies=remedies), peak=PEAK)
    with pytest.raises(NotEnoughResources) as caught:
        cards.check([role], 80 * GIB)
    assert str(caught.value) == (
        "a trainer rank needs 87.0 GiB at its peak, a card of 80.0 GiB has 78.5 to give: set "
        'trainer.offload = "ema" (76.0 GiB); or trainer.offload = "reference" (70.0 GiB)'
    )
    cards.check([role], 87 * GIB + RESERVE)
    cards.check([role], None)


def test_roles_that_share_a_card_are_refused_together():
    """Each of them would fit alone; what is over before they start does not count."""
    before = replace(
        share(70 * GIB, 0.5),
        role=Role(kind="encoder", name="e", count=1, num_cpus=1, num_gpus=0.5, nbytes=0, before=True),
    )
    shares = [share(40 * GIB, 0.5, name="trainer rank"), share(30 * GIB, 0.4), before]
    cards.check(shares, 74 * GIB)
    with pytest.raises(
        NotEnoughResources, match=r"roles that share 1 card need 73\.0 GiB of 72\.0 \(trainer rank 40\.0, s"
    ):
        cards.check(shares, 72 * GIB)
    cards.check([*shares, share(60 * GIB, 0.2)], 74 * GIB)  # 1.1 cards are two


def test_the_card_is_the_recipes(monkeypatch):
    assert cards.card_bytes(ClusterConfig(card="80GB")) == pytest.approx(78.8 * GIB)
    with pytest.raises(ValueError, match="card"):
        ClusterConfig(card="80")


def test_hours_follow_from_operations():
    """3.96e14 operations a second on each of two processes; a step of 60 s, and 120 of them."""
    assert cards.seconds(60 * 2 * 3.96e14, 2) == pytest.approx(60)
    assert cards.hours(120, {"training": 20.0, "sampling": 40.0}).startswith("about 2 h for 120 steps")


def test_a_recipe_is_told_from_json_files_alone_and_refused_where_it_does_not_fit(kontext, tmp_path, capsys):
    ignore = shutil.ignore_patterns("*.safetensors", "merges.txt", "*.model")
    bare = shutil.copytree(kontext, tmp_path / "model", ignore=ignore)
    model = {"family": "flux_kontext", "height": 48, "width": 32}
    gpus = offline_config(
        tmp_path, bare, tmp_path, model=model, trainer={"num_gpus": 1.0, "ema_decay": 0.9}
    ).model_copy(update={"cluster": ClusterConfig(card="80GB")})
    fit.check_cards(gpus, train.plan(gpus).roles, train.objective(gpus))
    told = capsys.readouterr().out
    for word in (
        "trainer rank",
        "parameters",
        "gradients",
        "optimizer",
        "frozen sides",
        "average",
        "to spare",
        " h for 4 steps",
    ):
        assert word in told
    with pytest.raises(
        NotEnoughResources, match=r"a trainer rank needs 0\.0 GiB at its peak, a card of 1\.0 GiB has -0\.5"
    ):
        small = gpus.model_copy(update={"cluster": ClusterConfig(card="1GB")})
        fit.check_cards(small, train.plan(small).roles, train.objective(small))


def test_a_judge_whose_memory_cannot_be_known_is_named(kontext, tmp_path, capsys):
    model = {"family": "flux_kontext", "height": 48, "width": 32}
    recipe = offline_config(tmp_path, kontext, tmp_path, model=model)
    judge = Role(kind="judge", name="judge mine", count=1, num_cpus=0.1, num_gpus=0.1, nbytes=0, judge="mine")
    judges = recipe.judges.model_copy(update={"python": {"mine": PythonJudgeConfig(function="os:getcwd")}})
    fit.check_cards(recipe.model_copy(update={"judges": judges}), [judge], train.objective(recipe))
    assert "not counted, as their memory cannot be known beforehand: judge mine" in capsys.readouterr().out


def test_nothing_is_traced_where_no_role_has_a_gpu(kontext, tmp_path, capsys):
    plain = offline_config(tmp_path, kontext, tmp_path, model={"family": "flux_kontext", "height": 48, "width": 32})
    fit.check_cards(plain, train.plan(plain).roles, train.objective(plain))
    assert capsys.readouterr().out == ""
