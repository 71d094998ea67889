"""Encode a recipe's data into its cache, ahead of time:

    python -m jobs.preprocess --config jobs/configs/online_dpo_hps.toml [--section.key VALUE …] [--dry-run]
    python -m jobs.preprocess train --config jobs/configs/sft_kontext.toml …

The second is for recipes of `jobs.train`. Reads and checks all input first, then encodes what the cache lacks; a second run
starts no encoder. The jobs that train do it themselves, so this one is only worth it to prepare a cache beforehand, for example
on another machine.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actors import checks, placement
from actors.placement import Role
from jobs import train
from jobs.cli import ConfigError, Say, parse, resolved_toml, run_main, say
from jobs.encoding import encode_missing, missing, warn_of_unread
from jobs.example_sets import read_example_sets
from jobs.launch import cluster, free_resources
from jobs.recipes import OnlineDPORecipe, TrainRecipe
from rlhf.data.cache import EncodingCache, read_manifest
from rlhf.data.fingerprint import fingerprints
from rlhf.data.prompts import Prompts, read_prompts, sized
from rlhf.data.records import BadInput, Problem
from rlhf.data.sampler import encodings_for_sampling
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.checks import check_model
from rlhf.runs.folder import check_place
from rlhf.section import ClusterConfig
from rlhf.tables import DataConfig, EditModelTable, EvalConfig, ModelTable, PreprocessConfig, SamplingTable
from rlhf.types import Encoding, Prompt


@dataclass(frozen=True, kw_only=True)
class Data:
    """The verified prompts of a recipe."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    left_out: str
    """The bad rows that `data.on_bad_row = "skip"` went on without, a line per problem; empty if there are none."""

    @property
    def all(self) -> tuple[Prompt, ...]:
        return self.training + self.held_out


def read_data(data: DataConfig, evaluation: EvalConfig, model: EditModelTable) -> Data:
    """Read `data.path` and `eval.path`. Raises: BadInput with the problems of both, Refused for what is no model folder."""
    family = check_model(model)
    check_place(Path(data.cache), "data.cache")

    read = partial(
        read_prompts,
        fit=data.fit,
        geometry=sized(model, family, model.frames),
        item_metadata=data.item_metadata,
        prompt_column=data.prompt_column,
        on_bad_row=data.on_bad_row,
        source_counts=family.source_counts if max(family.source_counts) else None,
    )
    found: list[Prompts] = []
    problems: dict[Problem, None] = {}
    for key, path in (("data.path", data.path), ("eval.path", evaluation.path)):
        try:
            if path is not None:
                found.append(read(path, key=key))
        except BadInput as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise BadInput(tuple(problems))
    training, *held_out = (prompts.prompts for prompts in found)
    if held_out:
        _refuse_overlap(data, evaluation, training, held_out[0])
    for size in {prompt.geometry for prompts in found for prompt in prompts.prompts}:
        family.latent_shape(size)  # refuses one that the network cannot take
    left_out = "\n".join(prompts.report() for prompts in found if prompts.left_out)
    return Data(training=training, held_out=held_out[0] if held_out else (), left_out=left_out)


def _refuse_overlap(
    data: DataConfig, evaluation: EvalConfig, training: Sequence[Prompt], held_out: Sequence[Prompt]
) -> None:
    """Raise Refused where prompts that are held out are also trained on."""

    def asked(prompt: Prompt) -> tuple[str, ...]:
        return prompt.instruction, *(source.content for source in prompt.sources)

    trained = set(map(asked, training))
    if shared := sum(asked(prompt) in trained for prompt in held_out):
        raise Refused(
            f"{shared} of {len(held_out)} prompts of eval.path = {evaluation.path!r} are in data.path = {data.path!r} too, by "
            "instruction and pictures: hold out others"
        )


def cache_place(model: ModelTable, folder: str) -> EncodingCache:
    """The cache of a recipe's model. Reads the encoders' files once to fingerprint them. Raises: IncompleteModel."""
    return EncodingCache(folder, fingerprints(load_family(model)))


def wanted_encodings(model: ModelTable, sampling: SamplingTable, prompts: Sequence[Prompt]) -> list[Encoding]:
    """What training and sampling need of prompts."""
    family = load_family(model)
    return [encoding for prompt in prompts for encoding in encodings_for_sampling(family, prompt, sampling)]


def preprocess(
    model: ModelTable,
    sampling: SamplingTable,
    table: PreprocessConfig,
    folder: str,
    prompts: Sequence[Prompt],
    log: Say,
) -> EncodingCache:
    """All that is encoded of `prompts` is in the cache when this returns. Ray must be initialised if anything is missing.

    Also warns of what the text encoder does not read of instructions. Raises: what `encode_missing` does, IncompleteModel.
    """
    cache, wanted = cache_place(model, folder), wanted_encodings(model, sampling, prompts)
    manifest = encode_missing(model, table, cache, wanted, f"{len(prompts)} prompts", log)
    warn_of_unread(load_family(model), cache, manifest, prompts, log)
    return cache


def check_room(cluster_table: ClusterConfig, roles: Sequence[Role]) -> None:
    """Print what encoding needs, if it needs anything; raise NotEnoughResources, with the table, where it does not fit."""
    if roles:
        free = free_resources(cluster_table)
        say(placement.table(roles, free))
        placement.check(roles, free)


def encoder_roles(model: ModelTable, table: PreprocessConfig, todo: Mapping[str, Encoding]) -> list[Role]:
    """The encoders, if anything is to be encoded."""
    return [placement.encoder_role(placement.ModelSizes(load_family(model)), table, before=True)] if todo else []


def say_todo(what: str, todo: Mapping[str, Encoding]) -> None:
    texts = sum(encoding.text is not None for encoding in todo.values())
    say(f"{what}; to encode: {texts} texts, {len(todo) - texts} pictures")


def online(recipe: OnlineDPORecipe, is_dry: bool) -> None:
    data = read_data(recipe.data, recipe.eval, recipe.model)
    if data.left_out:
        say(data.left_out)
    wanted = wanted_encodings(recipe.model, recipe.sampling, data.all)
    todo = missing(cache_place(recipe.model, recipe.data.cache), wanted, read_manifest(recipe.data.cache))
    roles = encoder_roles(recipe.model, recipe.preprocess, todo)
    if is_dry:
        say(resolved_toml(recipe))
        say_todo(f"{len(data.all)} prompts", todo)
        check_room(recipe.cluster, roles)
        return
    with cluster(recipe.cluster, namespace="preprocess") if todo else nullcontext():
        check_room(recipe.cluster, roles)
        preprocess(recipe.model, recipe.sampling, recipe.preprocess, recipe.data.cache, data.all, say)


def of_train(recipe: TrainRecipe, is_dry: bool) -> None:
    """A judge that relabels is not asked: both pictures of a pair are encoded, at the size of the one that is preferred now."""
    check_model(recipe.model)
    if is_dry:
        say(resolved_toml(recipe))
        to_encode(recipe)
    else:
        fill(recipe)


def to_encode(recipe: TrainRecipe) -> None:
    """Check all input, and say what the cache lacks and whether there is room to encode it."""
    roles, shown = train.objective(recipe).roles, train.validation_prompts(recipe)
    examples = read_example_sets(recipe, roles, partial(checks.in_threads, say))
    todo = missing(examples.cache, train.encodings(recipe, examples, shown), read_manifest(examples.cache.folder))
    say_todo(examples.report(), todo)
    check_room(recipe.cluster, encoder_roles(recipe.model, recipe.preprocess, todo))


def fill(recipe: TrainRecipe) -> None:
    """Check all input, and encode what the cache lacks."""
    roles, shown = train.objective(recipe).roles, train.validation_prompts(recipe)
    with cluster(recipe.cluster, namespace="preprocess"):
        examples = read_example_sets(recipe, roles, partial(checks.on_cluster, recipe.preprocess, say))
        say(examples.report())
        train.fill_cache(recipe, examples, shown)


def main() -> None:
    arguments = sys.argv[1:]
    kind = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if kind not in ("", "train"):
        raise Refused(f"{kind!r}: give train for a recipe of jobs.train, and nothing for one of jobs.online_dpo")
    try:
        if kind:
            of_train(*parse(TrainRecipe, arguments, description=__doc__ or ""))
        else:
            online(*parse(OnlineDPORecipe, arguments, description=__doc__ or ""))
    except ConfigError as error:
        raise ConfigError(f"{error}{_other_kind(kind, arguments)}") from error


def _other_kind(kind: str, arguments: list[str]) -> str:
    """What to say of a recipe that is of the other kind; empty if it is of neither."""
    other, command = (OnlineDPORecipe, "") if kind else (TrainRecipe, " train")
    try:
        parse(other, arguments)
    except ConfigError:
        return ""
    job = "online_dpo" if kind else "train"
    return f"\nIt is a recipe of jobs.{job}: python -m jobs.preprocess{command} --config …"


if __name__ == "__main__":
    run_main(main, "what is encoded stays; the same command encodes the rest")
