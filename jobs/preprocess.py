"""Encode an online recipe's prompts into its cache: `python -m jobs.preprocess --config jobs/configs/X.toml [--dry-run]`.

Reads and checks all input first, then encodes what the cache lacks; a second run starts no encoder. `jobs.online_dpo`
calls `read_data` and `preprocess` itself, so running this job is only worth it to prepare a cache beforehand, for
example on another machine.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actors import placement
from actors.encoders import encode
from actors.placement import Role
from jobs.cli import Say, parse, resolved_toml, run_main, say
from jobs.launch import cluster, free_resources
from jobs.recipes import OnlineDPORecipe
from rlhf.data.cache import EncodingCache, Manifest, read_manifest
from rlhf.data.fingerprint import fingerprints
from rlhf.data.instructions import Unread, unread, unread_report
from rlhf.data.prompts import Prompts, read_prompts, sized
from rlhf.data.records import BadInput, Problem
from rlhf.data.sampler import encodings_for_sampling
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.checks import check_model
from rlhf.models.family import Family
from rlhf.runs.folder import check_place
from rlhf.tables import DataConfig, EvalConfig, ModelTable, PreprocessConfig, SamplingTable, TrainedEditModelTable
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


def read_data(data: DataConfig, evaluation: EvalConfig, model: TrainedEditModelTable) -> Data:
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


def missing(cache: EncodingCache, encodings: Iterable[Encoding], manifest: Manifest) -> dict[str, Encoding]:
    """What the cache lacks, by key, each once."""
    wanted = {cache.key(encoding): encoding for encoding in encodings}
    return {key: encoding for key, encoding in wanted.items() if key not in manifest.places}


def encode_missing(
    model: ModelTable, table: PreprocessConfig, cache: EncodingCache, wanted: Iterable[Encoding], what: str, log: Say
) -> Manifest:
    """Encode what the cache lacks, and say so where that is nothing; returns what is in it.

    what: the name of all that is wanted. Raises: PreprocessFailed, StreamBroken, CacheError.
    """
    manifest = read_manifest(cache.folder)
    if todo := missing(cache, wanted, manifest):
        encode(model, table, str(cache.folder), todo, log)
        return read_manifest(cache.folder)
    log(f"preprocess: all {what} are in {cache.folder}")
    return manifest


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


def warn_of_unread(
    family: Family, cache: EncodingCache, manifest: Manifest, prompts: Iterable[Prompt], log: Say
) -> None:
    """Say what the encoders do not read of instructions whose encodings are in the cache."""
    found, total = Unread(), 0
    for prompt in prompts:
        places = [manifest.places.get(cache.key(encoding)) for encoding in family.encodings(prompt)]
        found |= unread(prompt, filter(None, places))
        total += 1
    for warning in unread_report(found, total):
        log(warning)


def check_room(recipe: OnlineDPORecipe, roles: Sequence[Role]) -> None:
    """Print what encoding needs, if it needs anything; raise NotEnoughResources, with the table, where it does not fit."""
    if roles:
        free = free_resources(recipe.cluster)
        say(placement.table(roles, free))
        placement.check(roles, free)


def main() -> None:
    recipe, is_dry = parse(OnlineDPORecipe, description=__doc__ or "")
    data = read_data(recipe.data, recipe.eval, recipe.model)
    if data.left_out:
        say(data.left_out)
    wanted = wanted_encodings(recipe.model, recipe.sampling, data.all)
    todo = missing(cache_place(recipe.model, recipe.data.cache), wanted, read_manifest(recipe.data.cache))
    sizes = placement.ModelSizes(load_family(recipe.model))
    roles = [placement.encoder_role(sizes, recipe.preprocess, before=True)] if todo else []
    if is_dry:
        say(resolved_toml(recipe))
        texts = sum(not encoding.sources for encoding in todo.values())
        say(f"{len(data.all)} prompts; to encode: {texts} texts, {len(todo) - texts} pictures")
        check_room(recipe, roles)
        return
    with cluster(recipe.cluster, namespace="preprocess") if todo else nullcontext():
        check_room(recipe, roles)
        preprocess(recipe.model, recipe.sampling, recipe.preprocess, recipe.data.cache, data.all, say)


if __name__ == "__main__":
    run_main(main, "what is encoded stays; the same command encodes the rest")
