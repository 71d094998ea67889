"""A recipe from the YAML of qwen-image-finetune (qflux): python -m jobs.convert_config qflux.yaml > recipe.toml

Several files are read one after the other, later ones over earlier ones, so that a fragment can be put over a whole file. What is
not in them is a default of `jobs.train`. Above the recipe stand, as comments, the keys that have no counterpart here and what is
to be done by hand. A value that a recipe cannot have is refused with status 2.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
import yaml
from pydantic import ValidationError

from jobs.cli import run_main, say
from jobs.recipes import TrainRecipe
from rlhf.errors import Refused

SIDE = 1024
"""Pixels of a recipe whose file gives no size."""
PLAIN = {"flux_kontext": "black-forest-labs/FLUX.1-Kontext-dev", "qwen_image_edit": "Qwen/Qwen-Image-Edit"}
OPTIMIZERS = {
    "AdamW": "adamw",
    "Adam": "adamw",
    "AdamW8bit": "adamw_8bit",
    "Adam8bit": "adamw_8bit",
    "Prodigy": "prodigy",
    "SGD": "sgd",
    "Adafactor": "adafactor",
}
"""The last word of a class → `trainer.optimizer`."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
SAME = {
    "model.lora.r": "trainable.rank",
    "model.lora.lora_alpha": "trainable.alpha",
    "model.lora.target_modules": "trainable.targets",
    "model.lora.pretrained_weight": "trainable.start",
    "data.init_args.dataset_path": "data.path",
    "data.init_args.caption_dropout_rate": "data.caption_dropout",
    "data.batch_size": "trainer.train_batch_size",
    "data.init_args.batch_size": "trainer.train_batch_size",
    "train.num_epochs": "trainer.epochs",
    "train.gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "train.max_grad_norm": "trainer.max_grad_norm",
    "train.max_train_steps": "trainer.max_train_steps",
    "train.checkpointing_steps": "run.save_every",
    "train.checkpoints_total_limit": "run.keep_checkpoints",
    "optimizer.init_args.lr": "trainer.learning_rate",
    "optimizer.init_args.weight_decay": "trainer.weight_decay",
    "optimizer.init_args.eps": "trainer.adam_epsilon",
    "optimizer.init_args.momentum": "trainer.sgd_momentum",
    "lr_scheduler.scheduler_type": "trainer.lr_scheduler",
    "lr_scheduler.warmup_steps": "trainer.lr_warmup_steps",
    "lr_scheduler.num_cycles": "trainer.lr_num_cycles",
    "lr_scheduler.power": "trainer.lr_power",
    "cache.cache_dir": "data.cache",
    "logging.output_dir": "run.dir",
    "logging.tracker_project_name": "run.name",
}
"""Keys that mean the same."""
DEVICES = "Ray places encoders and trainer ranks: preprocess.num_gpus, trainer.num_gpus"
LOADING = "pictures are encoded before training, or by preprocess.encoders beside it"
NONE = {
    r"model\.rank": "model.lora.r is read",
    r"model\.lora\.adapter_name": "there is one adapter, and its file names none",
    r"data\.class_path": "layouts are recognised: see README, Fine-tuning",
    r"data(\.init_args)?\.(num_workers|prefetch_factor|persistent_workers|pin_memory|shuffle)": LOADING,
    r"data\.init_args\.(cache_dir|use_cache)": "cache.* is read",
    r"data\.init_args\.prompt_image_dropout_rate": "control pictures are never left out",
    r"(train|cache)\.(vae_encoder|text_encoder|text_encoder_2)_device|(cache|predict)\.devices.*": DEVICES,
    r"train\.low_memory": 'encoders are gone before training, unless data.latents = "on_the_fly"',
    r"(train\.resume_from_checkpoint|resume)": "a stopped run goes on by itself; run.resume goes on from a checkpoint of ours",
    r"optimizer\.init_args\.(use_bias_correction|safeguard_warmup)": "Prodigy does it always",
    r"logging\.(logging_dir|report_to)": "TensorBoard files and metrics.jsonl lie in the run's folder",
    r"validation\..*": "set validation.path to prompts, eval.path to examples that are held out",
    r"predict\..*": "jobs.edit and jobs.evaluate have flags of their own",
}
"""Patterns of keys without a counterpart, and why."""
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="qflux.yaml")
    say(converted([read(file) for file in parser.parse_args().files]))


def read(file: Path) -> dict[str, Any]:
    """The leaves of a YAML file by dotted keys, references among them followed. Raises Refused."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise Refused(f"{file} holds no keys: give a configuration of qflux")
    return {key: _number(value) for key, value in _leaves(tree)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for a text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def converted(files: list[dict[str, Any]]) -> str:
    """The recipe, with comments. Raises Refused."""
    given = {key: value for file in files for key, value in file.items()}
    recipe: Found = {"objective": "sft", "trainable.kind": "lora"}
    notes = list[str]()
    for key, value in given.items():
        if key in SPECIAL:
            SPECIAL[key](value, given, recipe, notes)
        elif key in SAME:
            recipe[SAME[key]] = value
        else:
            why = next((why for pattern, why in NONE.items() if re.fullmatch(pattern, key)), "is unknown")
            notes.append(f"{key} = {value!r} has no counterpart: {why}")
    _complete(recipe, notes)
    tree: dict[str, Any] = {}
    for key, value in recipe.items():
        *path, last = key.split(".")
        table = tree
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    try:
        TrainRecipe.model_validate(tree)
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
        )
        raise Refused("\n".join(["the files make no recipe:", *(f"  {fault}" for fault in faults)])) from error
    return "".join(f"# {note}\n" for note in notes) + ("\n" if notes else "") + tomli_w.dumps(tree)


def _complete(recipe: Found, notes: list[str]) -> None:
    """What a recipe must have and qflux's file may lack."""
    for key, value, why in (
        ("run.name", "converted", "a name for the run"),
        ("model.path", "data/model", "the folder of the model"),
        ("data.path", "data/edits", "the data set"),
        ("model.height", SIDE, "pixels"),
        ("model.width", SIDE, "pixels"),
    ):
        if key not in recipe:
            recipe[key] = value
            notes.append(f"{key} is in none of the files: put {why} in place of {value!r}")


# --- keys that mean something else -------------------------------------------------------------------------------------


def _model(value: str, given: Found, recipe: Found, notes: list[str]) -> None:
    """A model of the hub has to be downloaded; one that is quantised already is not read."""
    trainer = str(given.get("train.trainer", given.get("trainer", "")))
    is_flux = "flux" in (trainer or str(value)).lower()
    family = recipe["model.family"] = "flux_kontext" if is_flux else "qwen_image_edit"
    if quantised := re.search(r"fp8|nf4|fp4|4bit", str(value).lower()):
        recipe["model.base"] = {"4bit": "nf4"}.get(quantised[0], quantised[0])
        notes.append(
            f"{value} is quantised, and such files are not read: plain weights are, and kept as model.base says"
        )
        value = PLAIN[family]
    elif re.search(r"Qwen2.*VL", str(value)):
        notes.append(f"{value} is the encoder of Qwen-Image-Edit and not the model that is trained")
        value = PLAIN[family]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(value)) and not Path(str(value)).exists():
        folder = f"data/{str(value).split('/')[1].lower()}"
        notes.append(f"download it first: hf download {value} --local-dir {folder}")
        value = folder
    recipe["model.path"] = str(value)


def _init(value: bool | str, given: Found, recipe: Found, notes: list[str]) -> None:
    if value not in (True, "gaussian"):
        raise Refused(f"model.lora.init_lora_weights = {value!r}: give true or gaussian")
    if "model.lora.pretrained_weight" not in given:
        recipe["trainable.init"] = "kaiming" if value is True else value


def _quantize(value: bool, given: Found, recipe: Found, notes: list[str]) -> None:
    if value:
        recipe["model.base"] = "fp8"


def _size(value: list[int], given: Found, recipe: Found, notes: list[str]) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise Refused(f"image_size = {value!r}: give [height, width]")
    recipe["model.height"], recipe["model.width"] = value


def _checkpointing(value: bool, given: Found, recipe: Found, notes: list[str]) -> None:
    recipe["trainer.gradient_checkpointing"] = "all" if value else "none"


def _precision(value: str, given: Found, recipe: Found, notes: list[str]) -> None:
    if value not in DTYPES:
        raise Refused(f"train.mixed_precision = {value!r}: give {', '.join(DTYPES)}")
    recipe["model.dtype"] = DTYPES[value]


def _trainer(value: str, given: Found, recipe: Found, notes: list[str]) -> None:
    recipe["model.family"] = "flux_kontext" if "flux" in str(value).lower() else "qwen_image_edit"


def _optimizer(value: str, given: Found, recipe: Found, notes: list[str]) -> None:
    name = str(value).rsplit(".", 1)[-1]
    if name not in OPTIMIZERS:
        raise Refused(f"optimizer.class_path = {value!r} is none of {', '.join(OPTIMIZERS)}")
    recipe["trainer.optimizer"] = OPTIMIZERS[name]


def _betas(value: list[float], given: Found, recipe: Found, notes: list[str]) -> None:
    recipe["trainer.adam_beta1"], recipe["trainer.adam_beta2"] = map(_number, value)


def _use_cache(value: bool, given: Found, recipe: Found, notes: list[str]) -> None:
    recipe["data.latents"] = "cached" if value else "on_the_fly"


SPECIAL: Mapping[str, Callable[[Any, Found, Found, list[str]], None]] = {
    "model.pretrained_model_name_or_path": _model,
    "model.lora.init_lora_weights": _init,
    "model.quantize": _quantize,
    "data.init_args.image_size": _size,
    "data.init_args.target_size": _size,
    "train.gradient_checkpointing": _checkpointing,
    "train.mixed_precision": _precision,
    "train.trainer": _trainer,
    "trainer": _trainer,
    "optimizer.class_path": _optimizer,
    "optimizer.init_args.betas": _betas,
    "cache.use_cache": _use_cache,
}

if __name__ == "__main__":
    run_main(main)
