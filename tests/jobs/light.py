"""A light but real world for runs of the whole system: tiny Kontext, random photos, HTTP judges that read pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.recipes import OnlineDPORecipe


def write_photos(folder: Path, train: int = 12, held_out: int = 2) -> None:
    """train.jsonl and eval.jsonl with noise pictures."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for name, ids in (("train", range(train)), ("eval", range(100, 100 + held_out))):
        lines = []
        for i in ids:
            picture = random.integers(0, 256, (96, 64, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"images/{i}.png")
            lines.append(
                json.dumps({"image_id": str(i), "prompt": f"make it warm {i % 3}", "image": f"images/{i}.png"})
            )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def greenness(images, prompts, items):
    """A reward of the user's own, for [judges.python]."""
    return [float(image[..., 1].mean()) / 255 for image in images]


def light_config(folder: Path, kontext: Path, url: str, **tables: dict[str, Any]) -> OnlineDPORecipe:
    """A run in `folder` with the judges at `url`; `tables` are merged into the sections."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "light", "dir": str(folder / "runs"), "save_every": 2, "sample_every": 4},
        "model": {"path": str(kontext), "height": 48, "width": 32},
        "data": {"path": str(folder / "train.jsonl"), "cache": str(folder / "cache")},
        "sampling": {"steps": 2, "batch_size": 4},
        "rollout": {"max_sample_attempts": 8},
        "reward": {"weights": {"hps": 1.0}},
        "dpo": {"beta": 500.0, "reference_refresh_every": 3},
        "trainer": {
            "ranks": 2,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 6,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "num_cpus": 0.2,
            "num_gpus": 0.0,
            "timeout_s": 120.0,
        },
        "samplers": {"count": 2, "num_cpus": 0.2, "num_gpus": 0.0, "timeout_s": 120.0},
        "judges": {"hps": {"url": f"{url}/hpsv2"}, "filter": {"url": f"{url}/filter"}, "timeout_s": 30.0},
        "preprocess": {"num_cpus": 0.2},
        "cluster": {"num_cpus": 2.0, "object_store_memory": 200_000_000},
    }
    for name, values in tables.items():
        base[name] = base.get(name, {}) | values
    return OnlineDPORecipe.model_validate(base)


def run_online(recipe: OnlineDPORecipe) -> Path:
    """The job `jobs.online_dpo`; returns the run's folder."""
    from jobs import online_dpo  # here, so that a replica that imports a reward from this module stays small
    from jobs.preprocess import read_data

    return online_dpo.run(recipe, read_data(recipe.data, recipe.eval, recipe.model))


def metric_rows(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocked = ("time/", "idle/")
    return [{name: value for name, value in row.items() if not name.startswith(clocked)} for row in rows]
