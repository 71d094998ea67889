"""Train a CTR model from a click log: python -m jobs.train_ctr --config jobs/configs/train_ctr.toml

Reads the seed's CSV (every bad row is reported before anything loads), trains in one Ray task on `train.num_cpus` and
`train.num_gpus`, and writes to `output` the checkpoint folder that judges.ctr.path takes, with metrics.json beside the
weights. Uses the cluster it finds (a running one, RAY_ADDRESS, cluster.address) or starts and ends one of its own.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import ray

from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster
from rlhf.data.schema import BadInput, Problem
from rlhf.rewards import ctr, ctr_training
from rlhf.rewards.ctr_config import TrainCTRConfig
from rlhf.rewards.ctr_data import Click, read_clicks, split


class OutputExists(ValueError):
    """`output` already holds something; a checkpoint is never overwritten."""


def train_ctr(config: TrainCTRConfig) -> Path:
    """Train and write `config.output`; returns it. Works inside a running Ray session or starts one of its own.

    Raises: BadInput (all bad rows), OutputExists, ray.exceptions.GetTimeoutError after `train.timeout_s`.
    """
    rows, held_out = load_rows(config)
    with cluster(config.cluster, "train_ctr"):
        remote: Any = ray.remote(_train)
        task = remote.options(
            num_cpus=config.train.num_cpus, num_gpus=config.train.num_gpus, max_retries=0, name="train_ctr"
        )
        running = task.remote(config, rows, held_out)
        try:
            metrics = ray.get(running, timeout=config.train.timeout_s)
        except BaseException:
            ray.cancel(running, force=True)
            raise
    print(f"ctr {config.output} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
    return Path(config.output)


def load_rows(config: TrainCTRConfig) -> tuple[list[Click], list[Click]]:
    """(training rows, held-out rows), after every check that needs no model."""
    if Path(config.output).exists():
        raise OutputExists(f"output = {config.output} exists and is never overwritten; choose another or remove it")
    problems: list[Problem] = []
    groups: list[list[Click]] = []
    for path in filter(None, (config.data.path, config.data.eval_path)):
        try:
            rows, left_out = read_clicks(Path(path), config.data.on_bad_row)
        except BadInput as error:
            problems += error.problems
            continue
        groups.append(rows)
        if left_out:
            print("\n".join([f"left out {len(left_out)} problems of {path}:", *map(str, left_out)]), flush=True)
    if problems:
        raise BadInput(problems)
    return (groups[0], groups[1]) if len(groups) == 2 else split(groups[0], config.data.eval_fraction, config.seed)


def _train(config: TrainCTRConfig, rows: list[Click], held_out: list[Click]) -> dict[str, float]:
    device = "cuda" if config.train.num_gpus else "cpu"
    model, tokenizer, metrics = ctr_training.train(
        rows, held_out, config.model, config.train, seed=config.seed, device=device, progress=print
    )
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".ctr-") as temporary:
        folder = ctr.save(Path(temporary) / "ctr", model, tokenizer)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
        (folder / "train_ctr.toml").write_text(resolved_toml(config))
        folder.rename(output)
    return metrics


def main() -> None:
    arguments = parse(TrainCTRConfig, description=__doc__ or "")
    if not arguments.dry_run:
        train_ctr(arguments.config)
        return
    rows, held_out = load_rows(arguments.config)
    print(resolved_toml(arguments.config))
    print(f"{len(rows)} training rows, {len(held_out)} held-out rows")
    print(f"one task: {arguments.config.train.num_cpus:g} CPU, {arguments.config.train.num_gpus:g} GPU")


if __name__ == "__main__":
    run_main(main, BadInput, OutputExists, RuntimeError)
