"""Preference pairs of real photos with a click log, and a small offline run on them."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.recipes import TrainRecipe

GROCERY = Path(__file__).resolve().parents[3] / "shared" / "data" / "grocery"
needs_grocery = pytest.mark.skipif(not GROCERY.exists(), reason="the grocery photos are not beside this checkout")


def grocery_rows() -> list[dict[str, Any]]:
    """Of each product the variant that was clicked most against the one that was clicked least, in Pick-a-Pic's columns."""
    variants: dict[str, list[tuple[float, str, str]]] = {}
    for name in ("ctr_train.csv", "ctr_test.csv"):
        with (GROCERY / name).open(encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                product = Path(row["image_url"]).stem.split("_")[0]
                variants.setdefault(product, []).append((float(row["pv_ctr"]), row["image_url"], row["food_name"]))
    rows = []
    for number, product in enumerate(sorted(variants)):
        seen = sorted(variants[product])
        worst, best = (GROCERY / url for _, url, _ in (seen[0], seen[-1]))
        first, second = (best, worst) if number % 2 == 0 else (worst, best)
        label = 1.0 if number % 2 == 0 else 0.0
        caption = f"a photo of {seen[0][2]}"
        rows.append({"jpg_0": first.read_bytes(), "jpg_1": second.read_bytes(), "label_0": label, "caption": caption})
    return rows


def write_split(folder: Path, rows: list[dict[str, Any]], split: str, row_group_size: int = 32) -> None:
    """A file of a hub's data set: data/SPLIT-00000-of-00001.parquet."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("caption", pa.string())]
    )
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=row_group_size)


def write_grocery(folder: Path, train: int = 200, held_out: int = 32) -> Path:
    rows = grocery_rows()
    write_split(folder, rows[:train], "train")
    write_split(folder, rows[train : train + held_out], "validation_unique")
    return folder


def offline_tables(folder: Path, model_path: Path, pairs: Path, **tables: Any) -> dict[str, Any]:
    """A recipe for a run in `folder`; `tables` are merged into the sections, and None unsets a key."""
    base: dict[str, Any] = {
        "run": {"name": "offline", "dir": str(folder / "runs"), "save_every": 2},
        "model": {"family": "stable_diffusion", "path": str(model_path), "height": 64, "width": 64},
        "data": {"path": str(pairs), "cache": str(folder / "cache")},
        "eval": {"path": str(pairs), "every": 2, "max_pairs": 8, "draws": 1},
        "dpo": {"beta": 1000.0},
        "trainer": {
            "ranks": 2,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "num_cpus": 0.2,
            "num_gpus": 0.0,
            "timeout_s": 120.0,
        },
        "preprocess": {"num_cpus": 0.2, "timeout_s": 300.0},
        "cluster": {"num_cpus": 2.0, "object_store_memory": 200_000_000},
    }
    for name, values in tables.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return {name: _set(values) if isinstance(values, dict) else values for name, values in base.items()}


def _set(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def offline_config(folder: Path, model_path: Path, pairs: Path, **tables: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(offline_tables(folder, model_path, pairs, **tables))
