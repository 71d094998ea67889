"""The whole system on two CPU cores in a few minutes, on a miniature world of product photos: `make demo`.

    python -m jobs.demo [--dir demo]

Lays out photos that it draws and the models of the miniature world, which come with the package and were trained by
`jobs.build_world` (a world that this built into DIR/world is taken as it is); deploys the three judges on Ray Serve; and runs
online DPO with two samplers and two FSDP ranks. Nothing is downloaded. The world's true click rate, which nothing is trained on,
says whether the edits got better: `report.html`.
"""

import argparse
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import tomli_w

from jobs.build_world import MANIFEST, SETTINGS
from jobs.cli import GOES_ON, parse, resolved_toml, run_main, say
from jobs.launch import cluster, dashboard
from jobs.online_dpo import run
from jobs.preprocess import read_data
from jobs.recipes import OnlineDPORecipe
from jobs.world.data import PACKAGE, write_photos
from jobs.world.edits import EDIT_MODELS
from rlhf.errors import Refused
from rlhf.runs.folder import check_place
from rlhf.runs.report import write_report
from rlhf.section import local_paths

RECIPE = Path(__file__).parents[1] / "configs" / "demo.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder of the world, the cache and the runs")
    parser.add_argument("--dry-run", action="store_true", help="print the recipe and what would be laid out")
    arguments = parser.parse_args()
    home = arguments.dir.absolute()
    check_place(home, "--dir")
    world, config = home / "world", _recipe(home)
    if arguments.dry_run:
        print(resolved_toml(config))
        models = ", ".join(sorted(path.name for path in PACKAGE.iterdir() if path.is_dir()))
        print(f"to lay out in {world}, where they are not there yet: photos, {models}")
        return
    say("demo: laying out the miniature world")
    lay_out(world)
    with cluster(config.cluster, config.run.name):
        folder = run(config, read_data(config.data, config.eval, config.model))
        print(summary(config, world, folder))


def _recipe(home: Path) -> OnlineDPORecipe:
    """demo.toml with its `demo/…` paths moved below `home`."""
    shipped = OnlineDPORecipe.model_validate(tomllib.loads(RECIPE.read_text()))
    moved = [f"--{key}={home / Path(path).relative_to('demo')}" for key, path in local_paths(shipped)]
    return parse(OnlineDPORecipe, ["--config", str(RECIPE), *moved]).config


def lay_out(world: Path) -> None:
    """Draw the photos and copy the package's models, unless all are there byte for byte. A world that was built here stays.

    Raises: Refused for one that was not built to its end, and for a folder of something else.
    """
    if (world / SETTINGS).is_file():
        if not (world / MANIFEST).is_file():
            raise Refused(f"{world} is not built to its end: run `python -m jobs.build_world --dir {world}` again")
        return
    write_photos(world)
    manifests = [json.loads((PACKAGE / kind.manifest).read_text()) for kind in EDIT_MODELS.values()]
    files = {world / file: digest for manifest in manifests for file, digest in manifest["sha256"].items()}
    if all(file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == files[file] for file in files):
        return
    for path in PACKAGE.iterdir():
        if path.is_dir():
            shutil.rmtree(world / path.name, ignore_errors=True)
            shutil.copytree(path, world / path.name)
        else:
            shutil.copy(path, world / path.name)


def told(rows: Sequence[Mapping[str, float]], null: float) -> tuple[str, dict[str, float]]:
    """What the world's truth says of a run's held-out edits: a sentence, and its numbers.

    null: the largest relative change of the true rate in runs on shuffled rewards.
    """

    def ends(name: str) -> tuple[float | None, float | None]:
        before = [row[f"eval/base_{name}"] for row in rows if f"eval/base_{name}" in row]
        after = [row[f"eval/policy_{name}"] for row in rows if f"eval/policy_{name}" in row]
        return next(iter(before), None), next(reversed(after), None)

    (base, tuned), (kept_base, kept_tuned) = ends("true_rate"), ends("kept")
    if base is None or tuned is None or kept_base is None or kept_tuned is None:
        return "No held-out edit passed the filter before or after training: there is nothing to compare.", {}
    better = "rose" if tuned > base * (1 + null) else "fell" if tuned < base * (1 - null) else "hardly moved"
    headline = (
        f"The true click rate of held-out edits, which nothing is trained on, {better}: {base:.3f} → {tuned:.3f} "
        f"({tuned / base - 1:+.0%}). Shuffling the rewards changed it by {null:.1%} at most, in three runs without the filter. "
        f"The edits keep {kept_tuned:.2f} of the subject, {kept_base:.2f} before training."
    )
    if kept_tuned < 0.9 * kept_base:
        headline += " They kept less of the subject, which may be part of the gain."
    facts = {"true_rate_base": base, "true_rate_tuned": tuned, "true_rate_gain": tuned / base - 1, "null_gain": null}
    return headline, facts | {"kept_base": kept_base, "kept_tuned": kept_tuned}


def summary(config: OnlineDPORecipe, world: Path, folder: Path) -> str:
    """Where everything lies, and what the run did. Also writes a recipe for `jobs.edit` with the weights of this run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/lr" in row]
    first, last, rates = steps[0], steps[-1], [row["filter/pass_rate"] for row in steps]
    null = max(map(abs, json.loads((world / MANIFEST).read_text())["null"]["gains"]))
    headline, facts = told(rows, null)
    address = f"http://{config.serve.host}:{config.serve.port}"
    lines = {
        "steps": f"{len(steps)}, loss {first['train/loss']:.4f} → {last['train/loss']:.4f}",
        "held out": headline,
        "reward (hps, ctr)": f"{last['reward/hps']:.4f}, {last['reward/ctr']:.4f}",
        "filter": f"pass rate {min(rates):.2f} … {max(rates):.2f}",
        "run folder": str(folder),
        "what it did": str(write_report(folder, headline, facts, {"true_rate": null})),
        "contact sheets": str(folder / "samples"),
        "metrics": f"{folder / 'metrics.jsonl'}; tensorboard --logdir {folder / 'tensorboard'}",
        "pairs trained on": str(folder / "pairs"),
        "trained weights": str(folder / "final"),
        "Serve (while it ran)": f"{address}/hpsv2, {address}/ctr, {address}/filter",
        "Ray dashboard (while it ran)": str(dashboard()),
        "edit a photo": f"python -m jobs.edit --config {folder / 'edit.toml'} --edit.image PHOTO",
    }
    recipe = {
        "model": {"path": config.model.path, "height": config.model.height, "width": config.model.width},
        "sampling": {"steps": config.sampling.steps},
        "tuned": {"denoiser": str(folder / "final" / "transformer")},
        "edit": {"prompt": "Make the light warmer."},
    }
    (folder / "edit.toml").write_text(tomli_w.dumps(recipe))
    width = max(map(len, lines))
    return "\n".join(["", "demo finished", *(f"  {name:<{width}}  {value}" for name, value in lines.items())])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_main(main, GOES_ON)
