"""A recipe from the YAML of qwen-image-finetune (qflux): python -m jobs.convert_config qflux.yaml > recipe.toml

Several files are read one after the other, later ones over earlier ones, so that a fragment can be put over a whole file. What is
not in them is a default of `jobs.train`. Above the recipe stand, as comments, the keys that have no counterpart here and what is
to be done by hand. A value that a recipe cannot have is refused with status 2.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
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
PLAIN = {
    "flux": "black-forest-labs/FLUX.1-Kontext-dev",
    "2509": "Qwen/Qwen-Image-Edit-2509",
    "2511": "Qwen/Qwen-Image-Edit-2511",
}
BASES = {"fp8": "fp8", "nf4": "nf4", "fp4": "fp4", "4bit": "nf4"}
"""In the name of a model that is quantised already → `model.base`."""
OPTIMIZERS: Mapping[str, tuple[str, float]] = {
    "AdamW": ("adamw", 0.01),
    "Adam": ("adamw", 0.0),
    "AdamW8bit": ("adamw_8bit", 0.01),
    "Adam8bit": ("adamw_8bit", 0.0),
    "Prodigy": ("prodigy", 0.0),
    "SGD": ("sgd", 0.0),
    "Adafactor": ("adafactor", 0.0),
}
"""The last word of a class → `trainer.optimizer`, and its own default of weight_decay."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32", False: "float32"}
"""YAML 1.1 takes no for false."""
THEIRS = {
    "objective": "sft",
    "trainable.kind": "lora",
    "data.hflip": False,
    "data.caption_dropout": 0.0,
    "data.mask_weight": 1.0,
    "trainer.train_batch_size": 1,
    "trainer.gradient_accumulation_steps": 1,
}
"""What qflux does where its file says nothing, and ours would do otherwise."""
SAME = {
    "model.lora.r": "trainable.rank",
    "model.lora.lora_alpha": "trainable.alpha",
    "model.lora.target_modules": "trainable.targets",
    "model.lora.pretrained_weight": "trainable.start",
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
    "optimizer.init_args.eps": "trainer.adam_epsilon",
    "lr_scheduler.scheduler_type": "trainer.lr_scheduler",
    "lr_scheduler.power": "trainer.lr_power",
    "cache.cache_dir": "data.cache",
    "logging.output_dir": "run.dir",
    "logging.tracker_project_name": "run.name",
}
"""Keys that mean the same."""
READ = re.compile(
    r"model\.(pretrained_model_name_or_path|quantize|lora\.init_lora_weights)|trainer|train\.(trainer|gradient_checkpointing"
    r"|mixed_precision)|data\.init_args\.(dataset_path|image_size|target_size|processor\.init_args\.target_size)|cache\.use_cache"
    r"|optimizer\.(class_path|init_args\.(betas|momentum|weight_decay))|lr_scheduler\.(warmup_steps|num_cycles)|loss\.mask_loss|logging\.report_to"
)
"""Keys that the functions below read."""
DEVICES = "Ray places encoders and trainer ranks: preprocess.num_gpus, trainer.num_gpus"
LOADING = "pictures are encoded before training, or by preprocess.encoders beside it"
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": []}
NONE = {
    r"model\.rank": "model.lora.r is read",
    r"model\.lora\.adapter_name": "there is one adapter, and its file names none",
    r"data\.class_path|data\.init_args\.processor\.class_path": "layouts are recognised: see README, Fine-tuning",
    r"data(\.init_args)?\.(num_workers|prefetch_factor|persistent_workers|pin_memory|shuffle)": LOADING,
    r"data\.init_args\.(cache_dir|use_cache)": "cache.* is read",
    r"data\.init_args\.prompt_image_dropout_rate": "Qwen-Image-Edit has data.source_dropout, by micro-batches",
    r"data\.init_args\.processor\.init_args\.(controls_size|process_type|resize_mode)": "control pictures follow the target",
    r"data\.init_args\.(processor\.init_args\.)?multi_resolutions": "set data.buckets, and its areas in pixels",
    r"(train|cache)\.(vae_encoder|text_encoder|text_encoder_2)_device|(cache|predict)\.devices.*": DEVICES,
    r"train\.low_memory": 'encoders are gone before training, unless data.latents = "on_the_fly"',
    r"(train\.resume_from_checkpoint|resume)": "a stopped run goes on by itself; run.resume goes on from a checkpoint of ours",
    r"optimizer\.init_args\.(use_bias_correction|safeguard_warmup)": "Prodigy does it always",
    r"loss\..*": "the loss is the mean squared error; of masks set data.mask_weight",
    r"logging\.(logging_dir|tags|notes)": "TensorBoard files and metrics.jsonl lie in the run's folder",
    r"validation\..*": "set validation.path to prompts, eval.path to examples that are held out",
    r"predict\..*": "jobs.edit and jobs.evaluate have flags of their own",
}
"""Patterns of keys without a counterpart, and why."""
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="qflux.yaml")
    say(converted([read(file) for file in parser.parse_args().files]))


def read(file: Path) -> Found:
    """The leaves of a YAML file by dotted keys, without those that are null. Raises Refused."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise Refused(f"{file} holds no keys: give a configuration of qflux")
    return {key: _number(value) for key, value in _leaves(tree) if value is not None}


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


def converted(files: Sequence[Found]) -> str:
    """The recipe, with comments. Raises Refused."""
    given = {key: value for file in files for key, value in file.items()}
    notes = list[str]()
    recipe = THEIRS | {SAME[key]: value for key, value in given.items() if key in SAME}
    for part in (_model, _trainable, _data, _trainer, _tracking):
        recipe |= part(given, notes)
    for key, value in given.items():
        if key not in SAME and not READ.fullmatch(key):
            why = next((why for pattern, why in NONE.items() if re.fullmatch(pattern, key)), "is unknown")
            notes.append(f"{key} = {value!r} has no counterpart: {why}")
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
    tree = _tree(recipe)
    try:
        TrainRecipe.model_validate(tree)
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
        )
        raise Refused("\n".join(["the files make no recipe:", *(f"  {fault}" for fault in faults)])) from error
    return "".join(f"# {note}\n" for note in notes) + ("\n" if notes else "") + tomli_w.dumps(tree)


def _tree(flat: Found) -> Found:
    tree: Found = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        table = tree
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return tree


# --- keys that mean something else, by table of the recipe -------------------------------------------------------------


def _model(given: Found, notes: list[str]) -> Found:
    """A model of the hub has to be downloaded; one that is quantised already is not read."""
    name, found = str(given.get("model.pretrained_model_name_or_path", "")), Found()
    trainer = str(given.get("train.trainer", given.get("trainer", "")))
    is_flux = "flux" in (trainer or name).lower()
    found["model.family"] = "flux_kontext" if is_flux else "qwen_image_edit"
    plain = next(
        (plain for word, plain in PLAIN.items() if word in name or (word == "flux" and is_flux)), "Qwen/Qwen-Image-Edit"
    )
    if given.get("model.quantize"):
        found["model.base"] = "fp8"
    if kept := next((base for word, base in BASES.items() if word in name.lower()), None):
        found["model.base"] = kept
        notes.append(
            f"{name} is quantised, and such files are not read: plain weights are, and kept as model.base says"
        )
        name = plain
    elif re.search(r"Qwen2.*VL", name):
        notes.append(f"{name} is the encoder of Qwen-Image-Edit and not the model that is trained")
        name = plain
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists():
        folder = f"data/{name.split('/')[1].lower()}"
        notes.append(f"download it first: hf download {name} --local-dir {folder}")
        name = folder
    precision = given.get("train.mixed_precision", "bf16")
    if precision not in DTYPES:
        raise Refused(f"train.mixed_precision = {precision!r}: give bf16, fp16 or no")
    keys = ("data.init_args.processor.init_args.target_size", "data.init_args.target_size", "data.init_args.image_size")
    if size := next((given[key] for key in keys if key in given), None):
        if not isinstance(size, list) or len(size) != 2:
            raise Refused(f"target_size = {size!r}: give [height, width]")
        found |= {"model.height": size[0], "model.width": size[1]}
    return found | {"model.dtype": DTYPES[precision]} | ({"model.path": name} if name else {})


def _trainable(given: Found, notes: list[str]) -> Found:
    begins = given.get("model.lora.init_lora_weights")
    if begins is None or "model.lora.pretrained_weight" in given:
        return {}
    if begins not in (True, "gaussian"):
        raise Refused(f"model.lora.init_lora_weights = {begins!r}: give true or gaussian")
    return {"trainable.init": "kaiming" if begins is True else begins}


def _data(given: Found, notes: list[str]) -> Found:
    found, path = Found(), given.get("data.init_args.dataset_path")
    if isinstance(path, list):
        notes.append(f"dataset_path names {len(path)}: a run trains on one, the first")
        path = path[0] if path else None
    if isinstance(path, dict):
        name = str(path.get("repo_id", path))
        notes.append(
            f"download it first: hf download {name} --repo-type dataset --local-dir data/{name.split('/')[-1]}"
        )
        path = f"data/{name.split('/')[-1]}"
    if path is not None:
        found["data.path"] = path
    if "cache.use_cache" in given:
        found["data.latents"] = "cached" if given["cache.use_cache"] else "on_the_fly"
    if given.get("loss.mask_loss"):
        found["data.mask_weight"] = 2.0
    return found


def _tracking(given: Found, notes: list[str]) -> Found:
    name = given.get("logging.report_to")
    if name is not None and name not in TRACKERS:
        raise Refused(f"logging.report_to = {name!r}: give {', '.join(TRACKERS)}")
    return {"tracking.report_to": TRACKERS[name]} if name else {}


def _trainer(given: Found, notes: list[str]) -> Found:
    """An optimizer's own defaults hold where the file says nothing."""
    found, schedule = Found(), given.get("lr_scheduler.scheduler_type", "constant")
    if "train.gradient_checkpointing" in given:
        found["trainer.gradient_checkpointing"] = "all" if given["train.gradient_checkpointing"] else "none"
    name = str(given.get("optimizer.class_path", "AdamW")).rsplit(".", 1)[-1]
    if name not in OPTIMIZERS:
        raise Refused(f"optimizer.class_path = {given['optimizer.class_path']!r} is none of {', '.join(OPTIMIZERS)}")
    found["trainer.optimizer"], decay = OPTIMIZERS[name]
    found["trainer.weight_decay"] = given.get("optimizer.init_args.weight_decay", decay)
    if name == "SGD":
        found["trainer.sgd_momentum"] = given.get("optimizer.init_args.momentum", 0.0)
    if betas := given.get("optimizer.init_args.betas"):
        found["trainer.adam_beta1"], found["trainer.adam_beta2"] = map(_number, betas)
    if warmup := given.get("lr_scheduler.warmup_steps"):
        if schedule == "constant":
            notes.append(f"lr_scheduler.warmup_steps = {warmup!r} has no counterpart: a constant rate has none")
        else:
            found["trainer.lr_warmup_steps"] = warmup
    if (cycles := given.get("lr_scheduler.num_cycles")) is not None:
        if schedule == "cosine_with_restarts":
            found["trainer.lr_num_cycles"] = cycles
        else:
            notes.append(f"lr_scheduler.num_cycles = {cycles!r} has no counterpart: it is of cosine_with_restarts")
    return found


if __name__ == "__main__":
    run_main(main)
