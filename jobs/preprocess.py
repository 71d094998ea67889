"""Encode an online recipe's prompts into its cache: `python -m jobs.preprocess --config jobs/configs/X.toml [--dry-run]`.

Reads and checks all input first, then encodes what the cache lacks; a second run starts no encoder. `jobs.online_dpo`
calls `read_data` and `preprocess` itself, so running this job is only worth it to prepare a cache beforehand, for
example on another machine.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from actors.encoders import encode
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster
from jobs.launch import say
from jobs.recipes.online_dpo import OnlineDPORecipe
from rlhf.data.batches import CachePlace
from rlhf.data.cache import Manifest, read_manifest
from rlhf.data.fingerprint import fingerprints
from rlhf.data.prompts import Rows, prompts_of, read_rows
from rlhf.data.records import BadInput, Problem
from rlhf.data.sampler import encodings_for_sampling
from rlhf.models import load_family
from rlhf.tables import DataConfig, EvalConfig, ModelTable, PreprocessConfig, SamplingTable, TrainedEditModelTable
from rlhf.types import Encoding, Geometry, Prompt

UNKNOWN_SHARE = 0.1
"""Share of unknown tokens from which an instruction is warned about."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The verified prompts of a recipe."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    rows: tuple[Rows, ...]
    """What they were read from."""

    @property
    def all(self) -> tuple[Prompt, ...]:
        return self.training + self.held_out

    def left_out(self) -> str:
        """The bad rows that `data.on_bad_row = "skip"` went on without, a line per problem; empty if there are none."""
        return "\n".join(rows.report() for rows in self.rows if rows.left_out)


def read_data(data: DataConfig, evaluation: EvalConfig, model: TrainedEditModelTable) -> Data:
    """Read `data.path` and `eval.path`. Raises: BadInput with the problems of both, Refused for what is no model folder."""
    family = load_family(model)
    family.check()

    def geometry(height: int, width: int) -> Geometry:
        """Of the edit of a source of (H, W) pixels."""
        height, width = family.nearest_size(height, width) if model.size == "auto" else (model.height, model.width)
        return Geometry(height=height, width=width, frames=model.frames)

    found: list[Rows] = []
    problems: dict[Problem, None] = {}
    for path in filter(None, (data.path, evaluation.path)):
        try:
            found.append(
                read_rows(
                    path,
                    item_metadata=data.item_metadata,
                    prompt_column=data.prompt_column,
                    on_bad_row=data.on_bad_row,
                )
            )
        except BadInput as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise BadInput(tuple(problems))
    training, *held_out = (tuple(prompts_of(rows.rows, data.fit, geometry)) for rows in found)
    return Data(training=training, held_out=held_out[0] if held_out else (), rows=tuple(found))


def missing(cache: CachePlace, encodings: Iterable[Encoding], manifest: Manifest) -> dict[str, Encoding]:
    """What the cache lacks, by key, each once."""
    opened = cache.open()
    wanted = {opened.key(encoding): encoding for encoding in encodings}
    return {key: encoding for key, encoding in wanted.items() if key not in manifest.places}


def cache_place(model: ModelTable, folder: str) -> CachePlace:
    """The cache of a recipe's model. Reads the encoders' files once to fingerprint them. Raises: IncompleteModel."""
    return CachePlace(folder=folder, fingerprints=fingerprints(load_family(model)))


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
    log: Callable[[str], None],
) -> CachePlace:
    """All that is encoded of `prompts` is in the cache when this returns. Ray must be initialised if anything is missing.

    Raises: PreprocessFailed, StreamBroken, CacheError, IncompleteModel.
    """
    cache, wanted = cache_place(model, folder), wanted_encodings(model, sampling, prompts)
    manifest = read_manifest(folder)
    if todo := missing(cache, wanted, manifest):
        encode(model, table, folder, todo, log)
        manifest = read_manifest(folder)
    else:
        log(f"preprocess: all {len(prompts)} prompts are in {folder}")
    warning = unknown_report([prompt.instruction for prompt in prompts], _unknown(model, prompts, cache, manifest))
    if warning:
        log(warning)
    return cache


def _unknown(model: ModelTable, prompts: Sequence[Prompt], cache: CachePlace, manifest: Manifest) -> dict[str, float]:
    """Of every instruction, the largest share of unknown tokens in what is encoded of it: families add words of their own."""
    family, opened, shares = load_family(model), cache.open(), dict[str, float]()
    for prompt in prompts:
        found = (manifest.places[opened.key(encoding)].unknown or 0.0 for encoding in family.encodings(prompt))
        shares[prompt.instruction] = max([shares.get(prompt.instruction, 0.0), *found])
    return shares


def unknown_report(instructions: Sequence[str], shares: Mapping[str, float]) -> str:
    """Share of unknown tokens per instruction, worst first; empty if the text encoder knows them all well enough."""
    bad = sorted(((share, text) for text, share in shares.items() if share >= UNKNOWN_SHARE), reverse=True)
    if not bad:
        return ""
    count = sum(shares[instruction] >= UNKNOWN_SHARE for instruction in instructions)
    head = (
        f"WARNING: the text encoder does not know {UNKNOWN_SHARE:.0%} or more of the tokens of {len(bad)} instructions "
        f"({count} of {len(instructions)} prompts) and edits will ignore them; T5 has no Chinese: translate the instructions"
    )
    return "\n".join([head, *(f"  {share:4.0%} unknown: {text}" for share, text in bad)])


def main() -> None:
    """Check, then encode what is missing."""
    arguments = parse(OnlineDPORecipe, description=__doc__ or "")
    recipe = arguments.config
    data = read_data(recipe.data, recipe.eval, recipe.model)
    if data.left_out():
        say(data.left_out())
    cache = cache_place(recipe.model, recipe.data.cache)
    wanted = wanted_encodings(recipe.model, recipe.sampling, data.all)
    todo = missing(cache, wanted, read_manifest(recipe.data.cache))
    if arguments.dry_run:
        say(resolved_toml(recipe))
        texts = sum(not encoding.sources for encoding in todo.values())
        say(f"{len(data.all)} prompts; to encode: {texts} texts, {len(todo) - texts} pictures")
        return
    tables = (recipe.model, recipe.sampling, recipe.preprocess, recipe.data.cache)
    if todo:
        with cluster(recipe.cluster, namespace="preprocess"):
            preprocess(*tables, data.all, say)
    else:
        preprocess(*tables, data.all, say)


if __name__ == "__main__":
    run_main(main)
