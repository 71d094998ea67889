"""The peaks of a recipe's roles that have a GPU, traced on tensors without data: see `actors.cards`."""

from collections.abc import Sequence

from actors import cards
from actors.cards import Share
from actors.placement import Role
from jobs.cli import say
from jobs.recipes import OnlineDPORecipe, TrainRecipe
from rlhf.data.sizes import sizes_of
from rlhf.diffusion.objectives import Objective
from rlhf.models import load_family
from rlhf.models.memory import encoder_peak, forward_flops, sampler_peak
from rlhf.models.trainable import load_trainable
from rlhf.rewards.memory import judge_peak
from rlhf.training.memory import trainer_peak
from rlhf.types import Geometry, Prompt, Source


def check_cards(recipe: OnlineDPORecipe | TrainRecipe, roles: Sequence[Role], objective: Objective) -> None:
    """Tell what every role with a GPU takes at its peak, and how long the run will take. Raises NotEnoughResources.

    Of the model's folder, which was checked, only JSON files are read.
    """
    if not any(role.num_gpus for role in roles):
        return
    family = load_family(recipe.model)
    say("working out the peak memory of each role: a minute or two for a model of 12 billion weights")
    geometry, most = _largest(recipe), max(family.source_counts)
    source = Source(path="", content="", height=geometry.height, width=geometry.width)
    prompt = Prompt(key="", instruction="", sources=(source,) * most, geometry=geometry)
    if most > 1:
        say(f"for prompts of {most} sources, which is the most that this model takes")
    card = cards.card_bytes(recipe.cluster)
    found = {role.name: _share(recipe, role, objective, prompt, card) for role in roles if role.num_gpus}
    shares = [share for share in found.values() if share]
    say(cards.table(shares, card))
    if unknown := [name for name, share in found.items() if share is None]:
        say(f"not counted, as their memory cannot be known beforehand: {', '.join(unknown)}")
    say(_hours(recipe, objective, prompt))
    cards.check(shares, card)


def _share(
    recipe: OnlineDPORecipe | TrainRecipe, role: Role, objective: Objective, prompt: Prompt, card: float | None
) -> Share | None:
    """None: the memory of this role cannot be known beforehand."""
    family = load_family(recipe.model)
    trainable = load_trainable(recipe.trainable, family)
    if role.kind == "trainer":
        peak = trainer_peak(family, recipe.trainer, trainable, objective, prompt)
        return Share(role=role, peak=peak, remedies=[*cards.trainer_remedies(recipe.trainer, peak)])
    if role.kind == "sampler":
        assert isinstance(recipe, OnlineDPORecipe)
        peak, size = sampler_peak(family, trainable, recipe.sampling, prompt), recipe.sampling.batch_size
        return Share(role=role, peak=peak, remedies=[*cards.batch_remedies("sampling.batch_size", size, peak)])
    if role.kind == "encoder":
        size = recipe.preprocess.batch_size
        peak = encoder_peak(family, size, prompt)
        return Share(role=role, peak=peak, remedies=[*cards.batch_remedies("preprocess.batch_size", size, peak)])
    assert role.judge, role.name
    judged = judge_peak(role.judge, recipe.judges[role.judge], card)
    return Share(role=role, peak=judged) if judged else None


def _largest(recipe: OnlineDPORecipe | TrainRecipe) -> Geometry:
    """Of what is trained on."""
    if isinstance(recipe, TrainRecipe):
        sizes = [size for some in sizes_of(recipe.model, recipe.data.buckets) for size in some.sizes]
        return max(sizes, key=lambda size: size.height * size.width)
    model = recipe.model
    return Geometry(height=model.height, width=model.width, frames=model.frames)


def _hours(recipe: OnlineDPORecipe | TrainRecipe, objective: Objective, prompt: Prompt) -> str:
    """How long the run takes, worked out from the operations of one prediction."""
    family, trainer = load_family(recipe.model), recipe.trainer
    forward = forward_flops(family, prompt)
    # A backward pass is two forward passes; what it recomputes and every frozen side is one more.
    passes = 3 + (trainer.gradient_checkpointing != "none") + len(objective.sides)
    examples = trainer.pairs_per_step * len(objective.roles)
    seconds = {"training": cards.seconds(forward * passes * examples, trainer.ranks)}
    if isinstance(recipe, OnlineDPORecipe):
        sampling, media = recipe.sampling, trainer.pairs_per_step * recipe.rollout.num_valid_samples
        branches = 2 if family.needs_unguided(sampling.guidance_scale) else 1
        seconds["sampling"] = cards.seconds(forward * branches * sampling.steps * media, recipe.samplers.count)
    return cards.hours(trainer.max_train_steps, seconds)
