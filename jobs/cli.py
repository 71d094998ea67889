"""The command line of every job: a TOML recipe, dotted overrides, `--dry-run`, `--help`.

    python -m jobs.NAME --config jobs/configs/X.toml --trainer.learning_rate 1e-6 --data.fit=pad --dry-run

All that is wrong with a configuration is said in one message, a line per problem, and the process ends with status 2.
Relative paths become absolute (from the current directory), except in a job submitted to a Ray cluster: its current
directory is a temporary copy that is deleted with the results in it, so there they are errors.

Left out: environment-variable overrides, includes between recipes, sub-commands.
"""

import argparse
import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from jobs import schema_keys
from rlhf.errors import Refused
from rlhf.section import Section, local_paths

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job supervisor sets this variable in the driver of a submitted job, and nowhere else."""

COMMAND_LINE = "command line"
NOT_UTF_8 = re.compile("[\udc80-\udcff]")
"""How Python keeps the bytes of an argument that are not UTF-8."""

OLD_FLAGS = {
    "pretrained_model_name_or_path": "model.path",
    "data_json_path": "data.path",
    "jsonl_path": "data.path",
    "ctr_metadata_csv": "data.item_metadata",
    "h": "model.height",
    "w": "model.width",
    "sampling_steps": "sampling.steps",
    "ref_update_step": "dpo.reference_refresh_every",
    "reward_type": "reward.type",
    "mixed_precision": "model.dtype",
    "qwen_filter_url": "judges.filter.url",
    "checkpointing_steps": "run.save_every",
    "output_dir": "run.dir",
    "use_ema": "trainer.ema_decay",
    "beta_dpo": "dpo.beta",
    "resolution": "model.height",
    "dataset_name": "data.path",
    "proportion_empty_prompts": "data.caption_dropout",
    "random_crop": "data.crop",
    "no_hflip": "data.hflip",
    "sft": "objective",
    "use_adafactor": "trainer.optimizer",
    "use_8bit_adam": "trainer.optimizer",
    "sdxl": "model.path",
    "unet_init": "model.denoiser",
    "train_data_dir": "data.path",
    "cache_dir": "data.cache",
    "dataloader_num_workers": "preprocess.encoders",
    "train_data_meta_dir": "data.path",
    "train_data_weights": "data.task_weights",
    "train_src_img_num_weights": "data.source_count_weights",
    "embeddings_save_dir": "data.cache",
    "disable_inverse": "extract.texts",
    "uniform_sampling": "trainer.timesteps",
    "trainable_modules": "trainable.patterns",
}
"""Flags of the scripts that this system replaces, for the "did you mean" of an unknown key."""

RENAMED = {
    "reward.hps.empty_prompt": "reward.empty_prompt",
    "rollout.steps": "sampling.steps",
    "rollout.guidance_scale": "model.guidance_scale",
    "rollout.batch_size": "sampling.batch_size",
    "rollout.timeout_s": "samplers.timeout_s",
    "trainer.mixed_precision": "model.dtype",
    "model.mixed_precision": "model.dtype",
    "painters.count": "samplers.count",
    "painters.num_cpus": "samplers.num_cpus",
    "painters.num_gpus": "samplers.num_gpus",
    "painters.timeout_s": "samplers.timeout_s",
    "trainer.lora": "trainable",
    "trainer.lora.rank": "trainable.rank",
    "trainer.lora.alpha": "trainable.alpha",
    "trainer.lora.targets": "trainable.targets",
    "edit.transformer": "tuned.denoiser",
    "edit.lora": "tuned.lora",
}
"""Keys that recipes once had, and what they are called now."""

GOES_ON = "the same command goes on from the last checkpoint"


RELATIVE = (
    "is relative, but the working directory of a submitted job is a temporary copy; "
    "give an absolute path that every node sees, e.g. --{name} /shared/{file}"
)
C = TypeVar("C", bound=Section)
Say = Callable[[str], None]


class ConfigError(Refused):
    """Everything that is wrong with a recipe and its overrides, a line per problem."""


class Arguments(NamedTuple, Generic[C]):
    """A parsed command line."""

    config: C
    dry_run: bool


def parse(schema: type[C], argv: list[str] | None = None, description: str = "") -> Arguments[C]:
    """Read `--config FILE`, dotted overrides (the last of a key counts) and `--dry-run` from `argv` (default: the process's own)
    into `schema`.

    Override values are TOML (`8`, `1e-5`, `true`, `[1, 2]`); text needs no quotes; `none` unsets an optional key; a key
    that is true or false may stand alone. `--help` prints every key and exits.

    Raises: ConfigError with one line `file: [section] key = value: what is wrong; remedy` per problem.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"configuration keys (--section.key VALUE):\n{schema_keys.describe(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", action="append", help="TOML recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    known, rest = parser.parse_known_args(argv)
    if odd := [word for word in rest if NOT_UTF_8.search(word)]:
        raise ConfigError(
            f"{COMMAND_LINE}: {odd[0]!r} is not UTF-8; write it in a recipe's file, or set the terminal to UTF-8"
        )
    keys = schema_keys.keys(schema)
    file, *others = known.config or [None]
    if others:
        raise ConfigError(
            f"{COMMAND_LINE}: --config is given {1 + len(others)} times; give one recipe, and keys beside it"
        )
    tree = _read_toml(file) if file else {}
    source = str(file) if file else COMMAND_LINE
    problems = [
        _problem(source, name, value, f"unknown key; {_nearest(name, keys)}")
        for name, value in schema_keys.take_unknown(schema, tree)
    ]
    overridden = set()
    for name, text in _overrides(rest, keys, problems):
        if key := schema_keys.find(keys, name):
            schema_keys.assign(tree, name, schema_keys.value_of(text, key))
            overridden.add(name)
        else:
            problems.append(_problem(COMMAND_LINE, name, text, f"unknown key; {_nearest(name, keys)}"))
    try:
        config = schema.model_validate(tree)
    except ValidationError as error:
        problems += _validation_problems(error, keys, source, overridden)
        raise _config_error(problems) from error
    if SUBMITTED_JOB in os.environ:
        for name, path in local_paths(config):
            if not os.path.isabs(path):
                given = source if schema_keys.has(tree, name) else "default"
                given = COMMAND_LINE if name in overridden else given
                problems.append(_problem(given, name, path, RELATIVE.format(name=name, file=Path(path).name)))
    if problems:
        raise _config_error(problems)
    for name, path in local_paths(config):
        schema_keys.assign(tree, name, os.path.abspath(os.path.expanduser(path)))
    return Arguments(schema.model_validate(tree), known.dry_run)


def resolved_toml(config: Section) -> str:
    """The whole configuration, defaults included, as TOML that `--config` reads back equal; unset keys are absent."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def run_main(job: Callable[[], None], stopped: str = "") -> NoReturn:
    """Run a job's main. A `Refused` is printed without a traceback, and the status is then 2.

    stopped: what a line says after a stop by signal, with status 130. All else goes through.
    """
    try:
        job()
    except Refused as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # a worker's holds its traceback too
        sys.exit(2)
    except KeyboardInterrupt:  # SIGTERM too: see jobs.launch
        if not stopped:
            raise
        print(f"stopped; {stopped}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def say(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.5)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a TOML recipe"
        raise ConfigError(f"{path}: no such file; {hint}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}; see https://toml.io for the syntax") from error


def _overrides(rest: Sequence[str], keys: dict[str, FieldInfo], problems: list[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of each `--key VALUE` or `--key=VALUE`; what is neither goes to `problems`."""
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"{COMMAND_LINE}: {word}: is no option; write --section.key VALUE")
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif (key := schema_keys.find(keys, name)) and schema_keys.takes(key, bool):
                text = "true"
            elif key:
                remedy = f"write --{name} VALUE ({schema_keys.type_text(key.annotation)})"
                problems.append(f"{COMMAND_LINE}: --{name}: has no value; {remedy}")
                continue
        yield name, text


def _nearest(name: str, keys: dict[str, FieldInfo]) -> str:
    moved = {old: new for old, new in RENAMED.items() if f"{old}.".startswith(f"{name}.") and new in keys}
    if moved:
        return "; ".join(f"{'it' if old == name else old} is now {new}" for old, new in moved.items())
    if OLD_FLAGS.get(name) in keys:
        return f"did you mean {OLD_FLAGS[name]}?"
    leaves = schema_keys.leaves(keys)
    section, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in leaves if section and key.rpartition(".")[0] == section}
    near = [siblings[tail] for tail in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    near = near or [key for key in leaves if key.rpartition(".")[2] == last]
    near = near or ([] if siblings else difflib.get_close_matches(name, keys, n=1, cutoff=0.7))
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"[{section}] has {', '.join(siblings)}" if siblings else "see --help for the valid keys"


def _validation_problems(
    error: ValidationError, keys: dict[str, FieldInfo], source: str, overridden: Collection[str]
) -> Iterator[str]:
    found = dict[str, list[Any]]()
    for detail in error.errors(include_url=False):
        *above, last = [str(part) for part in detail["loc"] if part != "[key]"] or [""]
        of_a_union = ".".join(above) in schema_keys.leaves(keys) and isinstance(detail["loc"][-1], str)
        found.setdefault(".".join(above if of_a_union else [*above, last]), []).append(detail)
    for location, (detail, *others) in found.items():
        if detail["type"] == "missing":
            inside = [name for name in schema_keys.leaves(keys) if name.startswith(f"{location}.")]
            for name in [name for name in inside if keys[name].is_required()] or [location]:
                yield _problem(source, name, None, f"is required; add it to the recipe or pass --{name} VALUE")
            continue
        said = (each["msg"].removeprefix("Value error, ") for each in (detail, *others))
        what = " or ".join(each.replace("Input should", "should", 1) for each in said)
        if detail["type"] == "literal_error":
            choices = [choice.strip("'") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            given = detail["input"] if isinstance(detail["input"], str) else ""
            near = difflib.get_close_matches(given, choices, n=1, cutoff=0.6)
            what += f"; did you mean {near[0]!r}?" if near else ""
        where = COMMAND_LINE if any(f"{location}.".startswith(f"{name}.") for name in overridden) else source
        if where != COMMAND_LINE and any(f"{name}.".startswith(f"{location}.") for name in overridden):
            where += " with the command line"  # keys that do not fit together
        if detail["type"] == "tuple_type":
            what = f"is a list: write '{json.dumps(str(detail['input']).split(','))}'"
        if detail["type"] == "dict_type":
            what = "is a table: write it as TOML, like '{first = 0.5, second = 1.2}', with quotes around a key in other letters"
        if detail["type"] == "model_type":
            what = f"is a table: give its keys, like --{location}.KEY VALUE or [{location}] in a recipe"
        if isinstance(detail["input"], dict | Section) or not location:
            yield f"{where}: [{location}]: {what}" if location else f"{source}: {what}"
        else:
            yield _problem(where, location, detail["input"], what)


def _problem(source: str, name: str, value: Any, what: str) -> str:
    section, _, key = name.rpartition(".")
    value = str(value).lower() if isinstance(value, bool) else repr(value) if value is not None else ""
    table, shown = f"[{section}] " if section else "", f" = {value}" if value else ""
    return f"{source}: {table}{key}{shown}: {what}"


def _config_error(problems: Sequence[str]) -> ConfigError:
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return ConfigError("\n".join([f"the configuration has {count}:", *(f"  {problem}" for problem in problems)]))
