"""The whole system on two CPU cores in a few minutes, on models and photos that it makes itself: `make demo`.

    python -m jobs.demo [--dir demo]

Builds, once, tiny random models in the real formats and a set of generated product photos; then trains the CTR model,
deploys the three judges on Ray Serve, and runs online DPO with two samplers and two FSDP ranks. Nothing is downloaded.
The edits stay abstract, since the models are random: the demo shows that every part works, and what each one writes.

The tiny filter model would pass nearly everything, so its threshold is set to a quantile of its own probabilities on base
edits of the photos. The summary repeats it.
"""

import argparse
import asyncio
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tomli_w

from actors.sampler import Sampler, SampleRequest
from jobs.cli import GOES_ON, parse, resolved_toml, run_main, say
from jobs.demo.world import build
from jobs.launch import cluster, dashboard
from jobs.online_dpo import run
from jobs.preprocess import read_data
from jobs.recipes import OnlineDPORecipe
from jobs.train_ctr import train_ctr
from rlhf.errors import Refused
from rlhf.models.tiny import write_flux_kontext
from rlhf.rewards.ctr.config import CTRDataConfig, CTRTrainConfig, TrainCTRConfig
from rlhf.rewards.tiny import write_hpsv2, write_qwen3_vl
from rlhf.runs.report import write_report
from rlhf.section import local_paths
from rlhf.tables import WeightsTable
from rlhf.types import seed_from

RECIPE = Path(__file__).parents[1] / "configs" / "demo.toml"
REJECTED = 0.35
"""Share of base edits that the calibrated filter rejects."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder of the world, the cache and the runs")
    parser.add_argument("--dry-run", action="store_true", help="print the recipe and what would be built")
    arguments = parser.parse_args()
    home = arguments.dir.absolute()
    if home.exists() and not home.is_dir():
        raise Refused(f"--dir {home} is a file; give a folder")
    world = home / "world"
    if arguments.dry_run:
        print(resolved_toml(_recipe(home)))
        parts = ["world.json", "kontext", "hpsv2", "qwen3-vl", "ctr", "filter_threshold.json"]
        print(f"to build in {world}: {', '.join(p for p in parts if not (world / p).exists()) or 'nothing'}")
        return
    build_models(build(world))
    recipe = _recipe(home)
    with cluster(recipe.cluster, recipe.run.name):
        threshold = prepare(recipe, world)
        config = _recipe(home, "--judges.filter.min_pass_probability", repr(threshold))
        folder = run(config, read_data(config.data, config.eval, config.model))
        print(summary(config, folder, threshold))


def _recipe(home: Path, *overrides: str) -> OnlineDPORecipe:
    """demo.toml with its `demo/…` paths moved below `home`."""
    shipped = OnlineDPORecipe.model_validate(tomllib.loads(RECIPE.read_text()))
    moved = [f"--{key}={home / Path(path).relative_to('demo')}" for key, path in local_paths(shipped)]
    return parse(OnlineDPORecipe, ["--config", str(RECIPE), *moved, *overrides]).config


def build_models(world: Path) -> None:
    """Write the tiny checkpoints that are missing; each folder appears whole or not at all."""
    builders = {
        "kontext": write_flux_kontext,
        "qwen3-vl": write_qwen3_vl,
        "hpsv2": lambda folder: write_hpsv2(folder / "HPS_tiny.pt"),
    }
    for name, write in builders.items():
        if not (world / name).exists():
            say(f"demo: building {name}")
            partial = world / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            write(partial)
            partial.rename(world / name)


def ask_filter(config: OnlineDPORecipe) -> list[float]:
    """P(PASS) of base edits of 16 photos, from the filter's own engine. A Ray task, so that its memory is given back."""
    from serve_apps.vllm_engine import VLLMFilter

    prompts = read_data(config.data, config.eval, config.model).training[:16]
    sampler = Sampler(config.model, config.sampling, "cpu")
    sampler.use(WeightsTable())
    size, edits = config.sampling.batch_size, list[Any]()
    for start in range(0, len(prompts), size):
        batch = enumerate(prompts[start : start + size])
        requests = [SampleRequest(prompt=p, noise_seed=seed_from("demo", p.key), slot=i) for i, p in batch]
        results: list[Any] = sampler.sample(requests)
        edits += [medium[0] for medium in results[1::2]]

    async def ask() -> list[float]:
        engine = VLLMFilter(config.judges.filter)
        asked = zip(edits, prompts, strict=True)
        verdicts = [await engine.judge(edit, (), prompt.instruction) for edit, prompt in asked]
        await engine.close()
        return [verdict.pass_probability for verdict in verdicts if verdict.pass_probability is not None]

    return asyncio.run(ask())


def prepare(config: OnlineDPORecipe, world: Path) -> float:
    """Train the CTR model and, beside it, work out the filter threshold that rejects about REJECTED of base edits."""
    kept = world / "filter_threshold.json"
    asking = None
    if not kept.exists():
        say("demo: asking the tiny filter about base edits, to set its threshold")
        task: Any = ray.remote(ask_filter)
        asking = task.options(num_cpus=0.5, max_retries=0).remote(config)
    if not (world / "ctr").exists():
        say("demo: training the CTR model on the generated click log")
        clicks = CTRDataConfig(path=str(world / "ctr_train.csv"), eval_path=str(world / "ctr_test.csv"))
        table = CTRTrainConfig(epochs=6, timeout_s=600.0)
        train_ctr(TrainCTRConfig(data=clicks, train=table, output=str(world / "ctr")))
    if asking is not None:
        kept.write_text(json.dumps(float(np.quantile(ray.get(asking, timeout=600), REJECTED))))
    return float(json.loads(kept.read_text()))


def summary(config: OnlineDPORecipe, folder: Path, threshold: float) -> str:
    """Where everything lies, and what the run did. Also writes a recipe for `jobs.edit` with the weights of this run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    first, last, rates = steps[0], steps[-1], [row["filter/pass_rate"] for row in steps]
    held_out = {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}
    shown = [f"{name[5:]} {value:.4f}" for name, value in held_out.items() if "hps" in name or "ctr" in name]
    address = f"http://{config.serve.host}:{config.serve.port}"
    lines = {
        "steps": f"{len(steps)}, loss {first['train/loss']:.4f} → {last['train/loss']:.4f}",
        "reward (hps, ctr)": f"{last['reward/hps']:.4f}, {last['reward/ctr']:.4f}",
        "filter": f"pass rate {min(rates):.2f} … {max(rates):.2f}; threshold {threshold:.4f}, a quantile of its own answers",
        "held-out": ", ".join(shown),
        "run folder": str(folder),
        "what it did": str(write_report(folder)),
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
        "edit": {"prompt": "Give the picture a warm, sunny light."},
    }
    (folder / "edit.toml").write_text(tomli_w.dumps(recipe))
    width = max(map(len, lines))
    return "\n".join(["", "demo finished", *(f"  {name:<{width}}  {value}" for name, value in lines.items())])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_main(main, GOES_ON)
