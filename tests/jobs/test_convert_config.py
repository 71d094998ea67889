"""Configurations of qflux become recipes that parse, and what has no counterpart is named."""

import sys
import tomllib

import pytest

from jobs import convert_config
from jobs.recipes import TrainRecipe
from rlhf.errors import Refused

WHOLE = """
model:
  pretrained_model_name_or_path: Qwen/Qwen-Image-Edit-2509
  quantize: false
  lora: {r: 16, lora_alpha: 32, init_lora_weights: true, target_modules: [to_q, to_k, to_v, to_out.0]}
data:
  class_path: src.data.dataset.ImageDataset
  init_args: {dataset_path: data/faces, image_size: [832, 576], caption_dropout_rate: 0.1, cache_dir: "${cache.cache_dir}"}
  batch_size: 2
train:
  num_epochs: 10
  gradient_accumulation_steps: 4
  gradient_checkpointing: true
  mixed_precision: bf16
  max_grad_norm: 1.0
  max_train_steps: 1000
  checkpointing_steps: 500
  checkpoints_total_limit: 3
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 1e-4, betas: [0.9, 0.999], weight_decay: 0.01, eps: 1e-8}
lr_scheduler: {scheduler_type: cosine, warmup_steps: 100}
cache: {use_cache: true, cache_dir: cache/faces, vae_encoder_device: "cuda:1"}
logging: {output_dir: output, tracker_project_name: faces, report_to: tensorboard}
"""


def convert(tmp_path, *texts):
    """(recipe, comments, values of the TOML)."""
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(text)
    text = convert_config.converted([convert_config.read(file) for file in files])
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    return TrainRecipe.model_validate(tomllib.loads(text)), comments


def test_every_key_of_a_whole_file_has_its_place_or_its_reason(tmp_path):
    recipe, comments = convert(tmp_path, WHOLE)
    model, trainer, trainable = recipe.model, recipe.trainer, recipe.trainable
    assert (model.family, model.path, model.dtype) == ("qwen_image_edit", "data/qwen-image-edit-2509", "bfloat16")
    assert (model.height, model.width, model.base) == (832, 576, "bf16")
    assert (trainable.rank, trainable.alpha, trainable.targets) == (16, 32, ("to_q", "to_k", "to_v", "to_out.0"))
    assert (recipe.data.path, recipe.data.cache, recipe.data.latents) == ("data/faces", "cache/faces", "cached")
    assert recipe.data.caption_dropout == 0.1 and trainable.init == "kaiming"
    assert (trainer.train_batch_size, trainer.gradient_accumulation_steps, trainer.epochs) == (2, 4, 10)
    assert (trainer.max_train_steps, trainer.gradient_checkpointing, trainer.max_grad_norm) == (1000, "all", 1.0)
    assert (trainer.optimizer, trainer.learning_rate, trainer.adam_epsilon) == ("adamw", 1e-4, 1e-8)
    assert (trainer.lr_scheduler, trainer.lr_warmup_steps) == ("cosine", 100)
    assert (recipe.run.name, recipe.run.dir, recipe.run.save_every, recipe.run.keep_checkpoints) == (
        "faces",
        "output",
        500,
        3,
    )
    assert recipe.objective == "sft"
    named = [line.split(" ")[1] for line in comments if "has no counterpart" in line]
    assert named == [
        "data.class_path",
        "data.init_args.cache_dir",
        "cache.vae_encoder_device",
    ]
    assert (
        "# download it first: hf download Qwen/Qwen-Image-Edit-2509 --local-dir data/qwen-image-edit-2509" in comments
    )
    assert not any("unknown" in line for line in comments)


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("model: {lora: {init_lora_weights: gaussian}}", {"trainable": {"init": "gaussian"}}),
        ("model: {quantize: true}", {"model": {"base": "fp8"}}),
        ("model: {lora: {pretrained_weight: a.safetensors}}", {"trainable": {"start": "a.safetensors"}}),
        ("optimizer: {class_path: bitsandbytes.optim.Adam8bit}", {"trainer": {"optimizer": "adamw_8bit"}}),
        (
            "optimizer: {class_path: prodigyopt.Prodigy, init_args: {lr: 1.0, use_bias_correction: true}}",
            {"trainer": {"optimizer": "prodigy", "learning_rate": 1.0}},
        ),
        (
            "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.8}}",
            {"trainer": {"optimizer": "sgd", "sgd_momentum": 0.8}},
        ),
        ("train: {trainer: FluxKontext, low_memory: true}", {"model": {"family": "flux_kontext"}}),
        ("train: {mixed_precision: fp16, gradient_checkpointing: false}", {"model": {"dtype": "float16"}}),
        ("logging: {report_to: wandb}", {"tracking": {"report_to": ("wandb",)}}),
        ("cache: {use_cache: false}", {"data": {"latents": "on_the_fly"}}),
        ("data: {init_args: {batch_size: 1, num_workers: 4}}", {"trainer": {"train_batch_size": 1}}),
    ],
)
def test_fragments_are_put_over_a_whole_file(tmp_path, fragment, expected):
    recipe, comments = convert(tmp_path, WHOLE, fragment)
    for table, values in expected.items():
        for key, value in values.items():
            assert getattr(getattr(recipe, table), key) == value
    assert not any("unknown" in line for line in comments)


@pytest.mark.parametrize(
    ("name", "base"), [("camenduru/x_fp8_e4m3fn_diffusers", "fp8"), ("eramth/x-4bit-fp4", "fp4"), ("a/x-4bit", "nf4")]
)
def test_a_model_that_is_quantised_already_is_the_plain_one_on_such_a_base(tmp_path, name, base):
    text = f"model: {{pretrained_model_name_or_path: {name}}}\ntrain: {{trainer: FluxKontext}}"
    recipe, comments = convert(tmp_path, WHOLE, text)
    assert (recipe.model.family, recipe.model.path) == ("flux_kontext", "data/flux.1-kontext-dev")
    assert recipe.model.base == base and any("is quantised, and such files are not read" in line for line in comments)


def test_a_quantised_2509_is_a_2509(tmp_path):
    recipe, _ = convert(
        tmp_path, "model: {pretrained_model_name_or_path: someone/Qwen-Image-Edit-2509-4bit, quantize: true}"
    )
    assert (recipe.model.path, recipe.model.base) == ("data/qwen-image-edit-2509", "nf4")


def test_qfluxs_own_defaults_hold_where_its_file_says_nothing(tmp_path):
    recipe, _ = convert(tmp_path, "optimizer: {class_path: bitsandbytes.optim.Adam8bit}")
    data, trainer = recipe.data, recipe.trainer
    assert (data.hflip, data.caption_dropout, data.mask_weight) == (False, 0.0, 1.0)
    assert (trainer.train_batch_size, trainer.gradient_accumulation_steps, trainer.weight_decay) == (1, 1, 0.0)
    plain, _ = convert(tmp_path, "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1}}")
    assert (plain.trainer.sgd_momentum, plain.trainer.weight_decay) == (0.0, 0.0)


def test_what_its_shipped_files_hold_too(tmp_path):
    """null, a size inside the processor, half a cosine, no precision, a data set of the hub."""
    text = """
model: {lora: {pretrained_weight: null, init_lora_weights: gaussian}}
data:
  init_args:
    dataset_path: [{repo_id: someone/faces, split: train}]
    image_size: null
    processor: {class_path: x.y, init_args: {target_size: [832, 576], controls_size: [[512, 512]], process_type: resize}}
train: {mixed_precision: no}
lr_scheduler: {scheduler_type: cosine, warmup_steps: 50, num_cycles: 0.5, power: 1.0}
loss: {mask_loss: true, class_path: a.b}
"""
    recipe, comments = convert(tmp_path, text)
    assert recipe.trainable.init == "gaussian" and recipe.trainable.start is None
    assert (recipe.model.height, recipe.model.width, recipe.model.dtype) == (832, 576, "float32")
    assert recipe.data.path == "data/faces" and recipe.data.mask_weight == 2.0
    assert "# download it first: hf download someone/faces --repo-type dataset --local-dir data/faces" in comments
    assert any("num_cycles = 0.5 has no counterpart" in line for line in comments)
    assert not any("unknown" in line for line in comments)
    constant, _ = convert(tmp_path, "lr_scheduler: {scheduler_type: constant, warmup_steps: 50}")
    assert constant.trainer.lr_warmup_steps == 0


def test_what_is_not_in_a_fragment_is_asked_for_and_what_is_unknown_is_named(tmp_path):
    recipe, comments = convert(tmp_path, "train: {max_train_steps: 7, warp: 9}")
    assert recipe.trainer.max_train_steps == 7
    assert "# train.warp = 9 has no counterpart: is unknown" in comments
    for key in ("run.name", "model.path", "data.path", "model.height"):
        assert any(line.startswith(f"# {key} is in none of the files") for line in comments)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "cannot be read as YAML"),
        ("7", "holds no keys: give a configuration of qflux"),
        ("optimizer: {class_path: torch.optim.Lion}", r"optimizer\.class_path = 'torch\.optim\.Lion' is none of AdamW"),
        ("train: {mixed_precision: int7}", r"train\.mixed_precision = 'int7': give bf16"),
        ("train: {max_train_steps: many}", r"the files make no recipe:\n  trainer\.max_train_steps: .*valid integer"),
        ("data: {init_args: {image_size: 7}}", r"target_size = 7: give \[height, width\]"),
    ],
)
def test_what_makes_no_recipe_is_refused(tmp_path, text, says):
    with pytest.raises(Refused, match=says):
        convert(tmp_path, text)


def test_as_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text(WHOLE)
    monkeypatch.setattr(sys, "argv", ["convert_config", str(tmp_path / "a.yaml")])
    convert_config.main()
    (tmp_path / "recipe.toml").write_text(capsys.readouterr().out)
    TrainRecipe.model_validate(tomllib.loads((tmp_path / "recipe.toml").read_text()))
