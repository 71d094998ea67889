"""The peaks of a recipe's roles that have a GPU, traced on tensors without data: see `actors.cards`."""

from collections.abc import Sequence

from actors import cards
from actors.cards import Share
from actors.placement import Role
from jobs.cli import say
from jobs.recipes import OnlineDPORecipe, TrainRecipe
from rlhf.diffusion.objectives import Objective
from rlhf.models import load_family
from rlhf.models.memory import Peak, encoder_peak, sampler_peak
from rlhf.models.trainable import load_trainable
from rlhf.training.memory import trainer_peak
from rlhf.types import Prompt


def check_cards(
    recipe: OnlineDPORecipe | TrainRecipe, roles: Sequence[Role], objective: Objective, prompts: Sequence[Prompt]
) -> None:
    """Tell what every role with a GPU takes at its peak, and how long the run will take. Raises NotEnoughResources.

    prompts: some of the run's; the largest is traced.
    """
    if not any(role.num_gpus for role in roles):
        return
    say("working out the peak memory of each role")
    largest = max(prompts, key=lambda prompt: (prompt.geometry.height * prompt.geometry.width, len(prompt.sources)))
    shares = [share for role in roles if role.num_gpus and (share := _share(recipe, role, objective, largest))]
    card = cards.card_bytes(recipe.cluster)
    say(cards.table(shares, card))
    if told := _hours(recipe, shares):
        say(told)
    cards.check(shares, card)


def _share(recipe: OnlineDPORecipe | TrainRecipe, role: Role, objective: Objective, prompt: Prompt) -> Share | None:
    family = load_family(recipe.model)
    trainable = load_trainable(recipe.trainable, family)
    if role.name == "trainer rank":
        peak = trainer_peak(family, recipe.trainer, trainable, objective, prompt)
        return Share(role=role, peak=peak, remedies=[*cards.trainer_remedies(recipe.trainer, peak)])
    if role.name == "sampler":
        assert isinstance(recipe, OnlineDPORecipe)
        peak, size = sampler_peak(family, trainable, recipe.sampling, prompt), recipe.sampling.batch_size
        return Share(role=role, peak=peak, remedies=[*cards.batch_remedies("sampling.batch_size", size, peak)])
    if role.name.startswith("encoder"):
        size = recipe.preprocess.batch_size
        peak = encoder_peak(family, size, prompt)
        return Share(role=role, peak=peak, remedies=[*cards.batch_remedies("preprocess.batch_size", size, peak)])
    return Share(role=role, peak=Peak(kinds={"parameters": round(role.nbytes)}))  # a judge


def _hours(recipe: OnlineDPORecipe | TrainRecipe, shares: Sequence[Share]) -> str:
    """Of the steps that a run of this recipe has."""
    flops = {share.role.name: share.peak.flops for share in shares}
    trainer, steps = recipe.trainer, recipe.trainer.max_train_steps
    if "trainer rank" not in flops:
        return ""
    of_a_step = {"trainer rank": float(flops["trainer rank"] * trainer.gradient_accumulation_steps * trainer.ranks)}
    processes = {"trainer rank": trainer.ranks}
    if isinstance(recipe, OnlineDPORecipe) and "sampler" in flops:
        media = trainer.pairs_per_step * recipe.rollout.num_valid_samples
        of_a_step["sampler"] = flops["sampler"] / recipe.sampling.batch_size * recipe.sampling.steps * media
        processes["sampler"] = recipe.samplers.count
    return cards.hours(steps, of_a_step, processes)
