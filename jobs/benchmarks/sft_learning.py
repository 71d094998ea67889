"""Does fine-tuning learn what its captions say, and not only run? On the miniature worlds of both families, without Ray.

    python -m jobs.benchmarks.sft_learning --steps 100 --seeds 3 --out sft_learning

LoRA and full training learn two edits that no base knows, each with an instruction of its own. The measure is by how much edits
of held-out photos, as the exported weights make them, differ in the way that the two instructions say; it is 0 for a model that
takes both alike. It stands beside that of runs whose captions are shuffled: half of each edit's examples have the other's.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from PIL import Image

from jobs.cli import run_main, say
from jobs.one_process import NothingHanded, OneRank, one_rank, refuse_small, train_in, trainer_table
from jobs.world import edits, measure
from jobs.world.data import PACKAGE, Shots, random_of, shoot
from jobs.world.looks import EXPOSURE, SATURATION, draw_source, render, to_uint8
from jobs.world.truth import attributes
from rlhf.diffusion.objectives import SFT
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.models.trainable import load_trainable
from rlhf.runs.folder import RunFolder, made
from rlhf.tables import EditModelTable
from rlhf.training_tables import TrainableTable

EXAMPLES, HELD_OUT = 64, 48
COLOURS, LIGHT = "Take the colours away.", "Take the light away."
"""In words that the models' encoders know."""
Captions = Literal["true", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """Of training."""

    table: TrainableTable
    learning_rate: float


WAYS = {
    "full": Way(table=TrainableTable(), learning_rate=2e-4),
    "lora": Way(table=TrainableTable(kind="lora", rank=8, alpha=8.0), learning_rate=3e-3),
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What `follows` measured on held-out photos."""

    base: float
    runs: Mapping[tuple[str, Captions], Sequence[float]]
    """By way and captions, over the seeds."""

    def null(self, way: str) -> float:
        """The largest change of a run with shuffled captions."""
        return max(abs(value - self.base) for value in self.runs[way, "shuffled"])

    def gain(self, way: str) -> float:
        """The least of a run with true captions."""
        return min(self.runs[way, "true"]) - self.base


def write_examples(folder: Path, shots: Shots, captions: Captions, seed: int) -> Path:
    """A JSONL of photos and of what an edit makes of them: without colours, without light, in turn."""
    folder.mkdir(parents=True)
    source = draw_source(len(shots), random_of(seed, "sft learning"))
    target = source.clone()
    target[0::2, SATURATION] = 0
    target[1::2, EXPOSURE] -= 0.6
    sides = {"source": to_uint8(render(shots.photos, source)), "target": to_uint8(render(shots.photos, target))}
    lines = []
    for index in range(len(shots)):
        told = index if captions == "true" else index // 2
        line = {"prompt": (COLOURS, LIGHT)[told % 2]}
        for role, pictures in sides.items():
            line[role] = f"{index:03d}_{role}.png"
            Image.fromarray(pictures[index].numpy()).save(folder / line[role])
        lines.append(json.dumps(line) + "\n")
    (folder / "edits.jsonl").write_text("".join(lines))
    return folder / "edits.jsonl"


def follows(model: EditModelTable, shots: Shots, *, denoiser: Path | None = None, lora: Path | None = None) -> float:
    """How much more vivid and darker photos become without light than without colours: a mean over them, of two parts of 1.

    denoiser, lora: see `measure.edited`.
    """
    given = measure.sources(shots, seed=0)
    grey, dark = (
        attributes(measure.edited(model, given, [text] * len(given), denoiser=denoiser, lora=lora))
        for text in (COLOURS, LIGHT)
    )
    return (dark.vividness - grey.vividness + grey.brightness - dark.brightness).mean().item()


def learn(model: EditModelTable, way: Way, shots: Shots, captions: Captions, seed: int, steps: int, out: Path) -> float:
    """What `follows` measures after a run, which it keeps in `out`."""
    family = load_family(model)
    examples = edits.encode(family, write_examples(out / "data", shoot(EXAMPLES, "sft learning", seed), captions, seed))
    run = RunFolder.claim(out, "run", "", resume="never")
    with one_rank() as mesh:
        trainer = OneRank(
            model,
            trainer_table(batch=edits.BATCH, learning_rate=way.learning_rate, steps=steps),
            SFT(),
            edits.InMemory(examples, seed=seed),
            mesh,
            seed,
            load_trainable(way.table, family),
        )
        train_in(run, NothingHanded(), trainer)
    exported = run.path / "final" / trainer.trainer.trainable.folder(family)
    return follows(model, shots, lora=exported) if exported.name == "lora" else follows(model, shots, denoiser=exported)


def all_runs(family: str, out: Path, *, steps: int = 100, seeds: int = 3) -> Shown:
    """Runs of every way and both kinds of captions from a family's base, all in new folders below `out`."""
    model = edits.model_of(PACKAGE / edits.EDIT_MODELS[family].folder, family)
    held_out = shoot(HELD_OUT, "sft learning", "held out")
    runs: dict[tuple[str, Captions], list[float]] = {}
    both: tuple[Captions, ...] = ("true", "shuffled")
    for name, captions, seed in product(WAYS, both, range(seeds)):
        folder = out / f"{family}_{name}_{captions}_{seed}"
        value = learn(model, WAYS[name], held_out, captions, seed, steps, folder)
        runs.setdefault((name, captions), []).append(value)
        say(f"{family}, {name}, captions {captions}, seed {seed}: {value:.3f}")
    return Shown(base=follows(model, held_out), runs=runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("sft_learning"), help="folder for data and runs")
    arguments = parser.parse_args()
    refuse_small("--seeds", arguments.seeds, 1)
    refuse_small("--steps", arguments.steps, 1)
    out = made(arguments.out.resolve(), "--out")
    if any(out.iterdir()):
        raise Refused(f"--out {out} is not empty: give another folder")
    for family in edits.EDIT_MODELS:
        shown = all_runs(family, out, steps=arguments.steps, seeds=arguments.seeds)
        for way in WAYS:
            gain, null = shown.gain(way), shown.null(way)
            print(
                f"{family}, {way}: base {shown.base:.3f}, least gain {gain:.3f}, largest change if shuffled {null:.3f}"
            )


if __name__ == "__main__":
    run_main(main)
