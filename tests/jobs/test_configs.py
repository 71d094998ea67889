"""Every shipped recipe parses, and says what its name promises."""

from pathlib import Path

import pytest

import jobs
from jobs.cli import parse, resolved_toml
from rlhf.config import OnlineDPOConfig, ServeJobConfig
from rlhf.evaluation_config import EvaluateConfig
from rlhf.rewards.ctr_config import TrainCTRConfig

FOLDER = Path(jobs.__file__).parent / "configs"
RECIPES = sorted(path.name for path in FOLDER.glob("*.toml"))
SCHEMAS = {"train_ctr.toml": TrainCTRConfig, "serve.toml": ServeJobConfig, "evaluate.toml": EvaluateConfig}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_parses_and_survives_a_round_trip(name, tmp_path):
    schema = SCHEMAS.get(name, OnlineDPOConfig)
    config = parse(schema, ["--config", str(FOLDER / name)]).config
    (tmp_path / "again.toml").write_text(resolved_toml(config))
    assert parse(schema, ["--config", str(tmp_path / "again.toml")]).config == config


@pytest.mark.parametrize(("name", "rewards"), [("hps", ("hps",)), ("ctr", ("ctr",)), ("hps_ctr", ("hps", "ctr"))])
def test_the_three_recipes_of_the_seed(name, rewards):
    config = parse(OnlineDPOConfig, ["--config", str(FOLDER / f"online_dpo_{name}.toml")]).config
    assert config.reward.names == rewards
    assert (config.model.height, config.model.width, config.rollout.steps) == (1312, 784, 16)
    assert (config.dpo.beta, config.dpo.reference_refresh_every, config.trainer.learning_rate) == (5000.0, 50, 1e-5)
    assert config.judges.filter.enabled


def test_one_gpu_shares_one_gpu():
    config = parse(OnlineDPOConfig, ["--config", str(FOLDER / "online_dpo_one_gpu.toml")]).config
    judges = (config.judges.hps, config.judges.ctr)
    total = config.trainer.num_gpus + config.samplers.num_gpus + sum(judge.num_gpus for judge in judges)
    assert config.trainer.lora is not None
    assert total <= 1.0
