"""Encode an online recipe's prompts into its cache: `python -m jobs.preprocess --config jobs/configs/X.toml [--dry-run]`.

Reads and checks all input first, then encodes what the cache lacks; a second run starts no encoder. `jobs.online_dpo`
calls `read_data` and `preprocess` itself, so running this job is only worth it to prepare a cache beforehand, for
example on another machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.encoders import encode
from actors.loading import Picture, Text
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster
from rlhf.data.cache import Manifest, read_manifest, source_key, text_key
from rlhf.data.fingerprint import fingerprint
from rlhf.data.prompts import Row, Rows, read_rows
from rlhf.data.records import BadInput, Problem
from rlhf.models import load_family
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Prompt

UNKNOWN_SHARE = 0.1
"""Share of unknown tokens from which an instruction is warned about."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The verified rows of a recipe."""

    train: Rows
    evaluation: Rows | None = None

    @property
    def all(self) -> tuple[Row, ...]:
        return self.train.rows + (self.evaluation.rows if self.evaluation else ())

    def left_out(self) -> str:
        """The bad rows that `data.on_bad_row = "skip"` went on without, a line per problem; empty if there are none."""
        return "\n".join(rows.report() for rows in (self.train, self.evaluation) if rows and rows.left_out)


def read_data(config: OnlineDPOConfig) -> Data:
    """Read `data.path` and `eval.path`. Raises: BadInput with the problems of both."""
    found: list[Rows] = []
    problems: dict[Problem, None] = {}
    for path in filter(None, (config.data.path, config.eval.path)):
        try:
            found.append(
                read_rows(
                    path,
                    item_metadata=config.data.item_metadata,
                    prompt_column=config.data.prompt_column,
                    on_bad_row=config.data.on_bad_row,
                )
            )
        except BadInput as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise BadInput(tuple(problems))
    return Data(train=found[0], evaluation=found[1] if len(found) > 1 else None)


def prompts_of(config: OnlineDPOConfig, rows: Sequence[Row]) -> list[Prompt]:
    """Rows with their picture size and cache keys, in order. Reads the encoders' files once to fingerprint them."""
    family = load_family(config.model, config.trainer.mixed_precision)
    dtype = str(family.dtype)
    text_print = fingerprint(config.model.path, family.text_folders, config.model.family, dtype)
    source_print = fingerprint(config.model.path, family.source_folders, config.model.family, dtype)
    prompts = []
    for row in rows:
        height, width = config.model.height, config.model.width
        if config.model.size == "auto":
            height, width = family.nearest_size(row.height, row.width)
        prompts.append(
            Prompt(
                image_id=row.image_id,
                instruction=row.instruction,
                image=row.image,
                item=row.item,
                height=height,
                width=width,
                text_key=text_key(row.instruction, text_print),
                source_key=source_key(row.content, height, width, config.data.fit, source_print),
            )
        )
    return prompts


def missing(
    config: OnlineDPOConfig, rows: Sequence[Row], prompts: Sequence[Prompt], manifest: Manifest
) -> tuple[list[Text], list[Picture]]:
    """What the cache lacks, each key once."""
    texts = {prompt.text_key: Text(key=prompt.text_key, instruction=prompt.instruction) for prompt in prompts}
    sources = {
        prompt.source_key: Picture(
            key=prompt.source_key,
            role="source",
            place=prompt.image,
            content=row.content,
            height=prompt.height,
            width=prompt.width,
            fit=config.data.fit,
        )
        for row, prompt in zip(rows, prompts, strict=True)
    }
    return (
        [text for key, text in texts.items() if key not in manifest.places],
        [source for key, source in sources.items() if key not in manifest.places],
    )


def preprocess(config: OnlineDPOConfig, rows: Sequence[Row], log: Callable[[str], None] = print) -> list[Prompt]:
    """The prompts of `rows`, all of them in the cache when this returns. Ray must be initialised if any are missing.

    Raises: PreprocessFailed, CacheError, IncompleteModel.
    """
    prompts = prompts_of(config, rows)
    manifest = read_manifest(config.data.cache)
    texts, sources = missing(config, rows, prompts, manifest)
    if texts or sources:
        encode(config, texts, sources, log)
        manifest = read_manifest(config.data.cache)
    else:
        log(f"preprocess: all {len(prompts)} prompts are in {config.data.cache}")
    warning = unknown_report(prompts, manifest)
    if warning:
        log(warning)
    return prompts


def unknown_report(prompts: Sequence[Prompt], manifest: Manifest) -> str:
    """Share of unknown tokens per instruction, worst first; empty if the text encoder knows them all well enough."""
    shares = {prompt.instruction: manifest.places[prompt.text_key].unknown or 0.0 for prompt in prompts}
    bad = sorted(((share, text) for text, share in shares.items() if share >= UNKNOWN_SHARE), reverse=True)
    if not bad:
        return ""
    count = sum(shares[prompt.instruction] >= UNKNOWN_SHARE for prompt in prompts)
    head = (
        f"WARNING: the text encoder does not know {UNKNOWN_SHARE:.0%} or more of the tokens of {len(bad)} instructions "
        f"({count} of {len(prompts)} prompts) and edits will ignore them; T5 has no Chinese: translate the instructions"
    )
    return "\n".join([head, *(f"  {share:4.0%} unknown: {text}" for share, text in bad)])


def main() -> None:
    """Check, then encode what is missing."""
    arguments = parse(OnlineDPOConfig, description=__doc__ or "")
    config = arguments.config
    data = read_data(config)
    if data.left_out():
        print(data.left_out())
    prompts = prompts_of(config, data.all)
    if arguments.dry_run:
        print(resolved_toml(config))
        texts, sources = missing(config, data.all, prompts, read_manifest(config.data.cache))
        print(f"{len(prompts)} prompts; to encode: {len(texts)} instructions, {len(sources)} pictures")
        return
    if any(missing(config, data.all, prompts, read_manifest(config.data.cache))):
        with cluster(config.cluster, namespace="preprocess"):
            preprocess(config, data.all, log)
    else:
        preprocess(config, data.all, log)


def log(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
