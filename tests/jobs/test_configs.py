"""Every shipped recipe parses, and says what its name promises."""

from pathlib import Path

import pytest

import jobs
from jobs.cli import ConfigError, parse, resolved_toml
from jobs.recipes import EvaluateRecipe, OnlineDPORecipe, ServeRecipe, TrainRecipe
from rlhf.rewards.ctr.config import TrainCTRConfig

FOLDER = Path(jobs.__file__).parent / "configs"
RECIPES = sorted(path.name for path in FOLDER.glob("*.toml"))
SCHEMAS = {
    "train_ctr.toml": TrainCTRConfig,
    "serve.toml": ServeRecipe,
    "evaluate.toml": EvaluateRecipe,
    "evaluate_sd.toml": EvaluateRecipe,
} | {name: TrainRecipe for name in RECIPES if name.startswith(("offline_dpo", "sft"))}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_parses_and_survives_a_round_trip(name, tmp_path):
    schema = SCHEMAS.get(name, OnlineDPORecipe)
    config = parse(schema, ["--config", str(FOLDER / name)]).config
    (tmp_path / "again.toml").write_text(resolved_toml(config))
    assert parse(schema, ["--config", str(tmp_path / "again.toml")]).config == config


@pytest.mark.parametrize(("name", "rewards"), [("hps", ("hps",)), ("ctr", ("ctr",)), ("hps_ctr", ("hps", "ctr"))])
def test_the_three_recipes_of_the_seed(name, rewards):
    config = parse(OnlineDPORecipe, ["--config", str(FOLDER / f"online_dpo_{name}.toml")]).config
    assert config.reward.names == rewards
    assert (config.model.height, config.model.width, config.sampling.steps) == (1312, 784, 16)
    assert (config.dpo.beta, config.dpo.reference_refresh_every, config.trainer.learning_rate) == (5000.0, 50, 1e-5)
    assert config.judges.filter.enabled


def test_one_gpu_shares_one_gpu():
    config = parse(OnlineDPORecipe, ["--config", str(FOLDER / "online_dpo_one_gpu.toml")]).config
    judges = (config.judges.hps, config.judges.ctr)
    total = config.trainer.num_gpus + config.samplers.num_gpus + sum(judge.num_gpus for judge in judges)
    assert config.trainable.kind == "lora"
    assert total <= 1.0


@pytest.mark.parametrize(
    ("name", "accumulated", "warmup", "optimizer"), [("sd15", 32, 500, "adamw"), ("sdxl", 128, 200, "adafactor")]
)
def test_the_two_runs_of_diffusion_dpo(name, accumulated, warmup, optimizer):
    """Diffusion-DPO, arXiv 2311.12908, and its launchers: 2048 pairs a step, β 5000, 1e-8 × 2048, 2000 steps."""
    config = parse(TrainRecipe, ["--config", str(FOLDER / f"offline_dpo_{name}.toml")]).config
    trainer = config.trainer
    assert (trainer.pairs_per_step, trainer.gradient_accumulation_steps, config.dpo.beta) == (2048, accumulated, 5000)
    assert trainer.scaled_learning_rate == pytest.approx(2.048e-5)
    assert (trainer.max_train_steps, trainer.lr_warmup_steps, trainer.optimizer) == (2000, warmup, optimizer)
    assert config.data.caption_dropout == 0.2 and config.data.hflip and config.dpo.reference_refresh_every == 0


def test_epochs_are_no_measure_of_an_online_run():
    recipe = ["--config", str(FOLDER / "online_dpo_hps.toml"), "--trainer.epochs", "3"]
    with pytest.raises(
        ConfigError, match=r"trainer\.epochs = 3 belongs to jobs\.train; .*set trainer\.max_train_steps"
    ):
        parse(OnlineDPORecipe, recipe)


def test_the_effective_batch_gives_the_accumulation_or_says_what_would():
    recipe = ["--config", str(FOLDER / "offline_dpo_sd15.toml"), "--trainer.ranks"]
    assert parse(TrainRecipe, [*recipe, "8"]).config.trainer.gradient_accumulation_steps == 64
    with pytest.raises(ConfigError, match=r"effective_batch_size = 2048 is no multiple of .* = 12; 2040 and 2052 are"):
        parse(TrainRecipe, [*recipe, "3"])
    with pytest.raises(ConfigError, match=r"is 64 accumulated micro-batches, but gradient_accumulation_steps = 7"):
        parse(TrainRecipe, [*recipe, "8", "--trainer.gradient_accumulation_steps", "7"])
    with pytest.raises(ConfigError, match=r"effective_batch_size = 2000: write it as a whole number"):
        parse(TrainRecipe, [*recipe, "8", "--trainer.effective_batch_size", "2e3"])
    with pytest.raises(ConfigError, match=r"ranks = 0: should be greater than or equal to 1"):
        parse(TrainRecipe, [*recipe, "0"])
