"""Does online DPO learn, and not only run? On the miniature world, against the null of shuffled rewards, without Ray.

    python -m jobs.benchmarks.learning --steps 40 --seeds 3 --out learning

The measure is the true click rate of held-out edits at fixed noise, which no reward is given; see `jobs.world.learning`. Full
training and LoRA with true rewards, and full training with rewards shuffled within each prompt and with β's sign flipped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jobs.cli import run_main
from jobs.one_process import one_rank, plot, refuse_small
from jobs.world.data import PACKAGE, write_photos
from jobs.world.learning import Bench, Measured, Mode, Recipe
from rlhf.training_tables import TrainableTable

HELD_OUT = 96
RUNS: dict[str, tuple[Mode, Recipe]] = {
    "true": ("true", Recipe(trainable=TrainableTable())),
    "true, LoRA": ("true", Recipe(trainable=TrainableTable(kind="lora", rank=8, alpha=8.0), learning_rate=8e-4)),
    "shuffled": ("shuffled", Recipe(trainable=TrainableTable())),
    "β flipped": ("flipped", Recipe(trainable=TrainableTable())),
}
Runs = dict[str, list[list[tuple[int, Measured]]]]


def all_runs(folder: Path, steps: int, seeds: Mapping[str, int]) -> Runs:
    """What runs measured at the start and every 20 steps. seeds: name → how many runs of it."""
    data = write_photos(folder / "data")
    with one_rank() as mesh:
        bench = Bench(PACKAGE, data, folder, mesh, HELD_OUT)
        runs: Runs = {}
        for name, count in seeds.items():
            mode, recipe = RUNS[name]
            runs[name] = [bench.learn(mode, seed, replace(recipe, steps=steps)) for seed in range(count)]
        return runs


def gain(run: Sequence[tuple[int, Measured]]) -> tuple[float, float, float]:
    """Relative change of the mean true rate, first to last measurement, and its 95 % bootstrap interval over prompts."""
    before, after = run[0][1].true_rate, run[-1][1].true_rate
    rows = np.random.default_rng(0).integers(len(before), size=(2000, len(before)))
    drawn = after[rows].mean(1) / before[rows].mean(1) - 1
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(after.mean() / before.mean() - 1), float(low), float(high)


def table(runs: Runs) -> list[str]:
    """A line per run: the true rate and its gain, both rewards, and what was kept of the subject, before and after."""
    lines = []
    for name, group in runs.items():
        for seed, run in enumerate(group):
            (_, first), (_, last) = run[0], run[-1]
            value, low, high = gain(run)
            measured = {
                "true rate": (first.true_rate, last.true_rate),
                "hps": (first.reward[:, 0], last.reward[:, 0]),
                "ctr": (first.reward[:, 1], last.reward[:, 1]),
                "kept": (first.kept, last.kept),
            }
            shown = [f"{what} {before.mean():.4f} → {after.mean():.4f}" for what, (before, after) in measured.items()]
            lines.append(f"{name:>10} {seed}: {value:+.1%} ({low:+.1%} … {high:+.1%})  {'  '.join(shown)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("learning"), help="folder for data, runs and the plot")
    arguments = parser.parse_args()
    refuse_small("--seeds", arguments.seeds, 1)
    refuse_small("--steps", arguments.steps, 20)
    runs = all_runs(arguments.out.resolve(), arguments.steps, dict.fromkeys(RUNS, arguments.seeds))
    print("\n".join(table(runs)))
    null = max(abs(gain(run)[0]) for run in runs["shuffled"])
    curves = {
        name: [[(step, float(measured.true_rate.mean())) for step, measured in run] for run in group]
        for name, group in runs.items()
    }
    file = arguments.out / "learning.png"
    plot(
        curves, file, legend="rewards", measure="true click rate of held-out edits", title="Online DPO, miniature world"
    )
    (arguments.out / "gains.json").write_text(
        json.dumps({name: [gain(run)[0] for run in g] for name, g in runs.items()})
    )
    print(f"null (largest change of a shuffled run): {null:.1%}; curves: {file}")


if __name__ == "__main__":
    run_main(main)
