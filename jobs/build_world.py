"""Build a miniature world of product photos and models: python -m jobs.build_world --dir world [--seed 0]

Draws thousands of photos, and trains from nothing a VAE, a small FLUX.1 Kontext that follows six kinds of instructions, an
aesthetic judge in HPSv2's format, a click model and a Qwen3-VL that finds broken pictures; then measures each on held-out
photos. Takes about an hour on one core. `--world.family qwen_image_edit` builds a small Qwen-Image-Edit in Kontext's place, and
no judges, in half an hour; both may be built into one folder, one after the other. Each part appears whole or not at all, so the
same command goes on with the next. No Ray, and nothing is downloaded. `jobs.demo` uses a world that was built into its folder
world/, in place of the one that comes with the package.

    DIR/  what jobs.world.data lists  build.json  kontext/  hps/  ctr/  filter/  manifest.json  qwen/  qwen_manifest.json
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from time import monotonic

import torch

from jobs.cli import run_main, say
from jobs.one_process import one_rank
from jobs.world import ctr, edits, filter, hps, measure, vae
from jobs.world.data import Shots, random_of, shoot, write_clicks, write_photos
from jobs.world.edits import EDIT_MODELS
from jobs.world.learning import Bench, Recipe
from jobs.world.looks import INSTRUCTIONS, KINDS, draw_source, edit, render, to_uint8
from jobs.world.truth import as_pixels
from rlhf.errors import Refused
from rlhf.models import load_family
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import made
from rlhf.training_tables import TrainableTable

JUDGES = ("hps", "ctr", "filter")
JUDGED = "flux_kontext"
"""The family that the judges are built with: the filter learns from its edits, too."""
MANIFEST = EDIT_MODELS[JUDGED].manifest
"""Of the world with judges."""
SETTINGS = "build.json"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is drawn and how long is trained."""

    photos: int = 3000
    held_out: int = 220
    vae_steps: int = 6000
    edits: int = 6144
    edit_steps: int = 4000
    hps_steps: int = 4000
    ctr_epochs: int = 16
    filter_steps: int = 5000
    sound: int = 1200
    """Sound pictures of each of three kinds that the filter learns from."""
    null_steps: int = 40
    """Updates of a run on shuffled rewards, as many as of the demo."""
    null_prompts: int = 96


class World:
    """The parts in `folder`, each built when it is first missing."""

    def __init__(self, folder: Path, seed: int, effort: Effort, family: str = JUDGED):
        self.folder, self.seed, self.effort, self.family = folder, seed, effort, family
        self._kind = EDIT_MODELS[family]
        self._manifest = folder / self._kind.manifest
        self._model = edits.model_of(folder / self._kind.folder, family)

    @cached_property
    def photos(self) -> Shots:
        say(f"world: drawing {self.effort.photos} photos")
        return shoot(self.effort.photos, self.seed, "train")

    @cached_property
    def held_out(self) -> Shots:
        return shoot(self.effort.held_out, self.seed, "held out")

    def parts(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """Name and maker of each part, in an order in which each finds what it needs."""
        yield self._kind.folder, self._edits
        if self.family != JUDGED:
            return
        yield "clicks", partial(write_clicks, seed=self.seed)
        yield "hps", self._hps
        yield "ctr", self._ctr
        yield "filter", self._filter

    def build(self) -> Path:
        """Every part, and the manifest with figures. Raises: Refused for a folder of something else, or of another world."""
        self._begin()
        if self._manifest.exists():
            return self._manifest
        write_photos(self.folder, self.seed)
        for name, make in self.parts():
            if (self.folder / name).exists():
                continue
            say(f"world: building {name}")
            started, unfinished = monotonic(), self.folder / f".{name}.partial"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(self.folder / name)
            say(f"world: {name} in {monotonic() - started:.0f} s")
        return self._write_manifest()

    def _begin(self) -> None:
        """Claim the folder for this seed and effort, unless they did before."""
        settings = made(self.folder, "--dir") / SETTINGS
        mine = {"seed": self.seed, "effort": asdict(self.effort)}
        if settings.is_file():
            if (there := json.loads(settings.read_text())) != mine:
                raise Refused(
                    f"{self.folder} was begun with {there}, not with {mine}: give the same seed, or another --dir"
                )
        elif any(self.folder.iterdir()):
            raise Refused(f"--dir {self.folder} is not empty and was not begun by this command: give another folder")
        write_durably(settings, json.dumps(mine))

    def _edits(self, folder: Path) -> None:
        model = edits.model_of(folder, self.family)
        trained = vae.train_vae(self._kind.vae, self.photos, steps=self.effort.vae_steps, seed=self.seed)
        edits.write_untrained(model, trained)
        work = self.folder / ".edits"
        shutil.rmtree(work, ignore_errors=True)
        triples = edits.write_triples(work / "triples", self.photos, self.effort.edits, self.seed)
        examples = edits.encode(load_family(model), triples)
        edits.train_edits(model, examples, work, steps=self.effort.edit_steps, seed=self.seed)
        shutil.rmtree(work)
        for config in folder.glob("*/config.json"):  # diffusers writes where a network was loaded from
            said = json.loads(config.read_text())
            said.pop("_name_or_path", None)
            config.write_text(json.dumps(said, indent=2) + "\n")

    def _hps(self, folder: Path) -> None:
        model = hps.train_hps(self.photos, steps=self.effort.hps_steps, seed=self.seed)
        hps.save(model, folder / "hps.safetensors")

    def _ctr(self, folder: Path) -> None:
        ctr.train_ctr(self.folder / "clicks", folder, epochs=self.effort.ctr_epochs, seed=self.seed, say=say)

    def _filter(self, folder: Path) -> None:
        """Sound are photos under any look, what the VAE makes of them, and what the edit model does."""
        random = random_of(self.seed, "sound")
        chosen = self.photos.take(torch.randint(len(self.photos), (3 * self.effort.sound,), generator=random))
        look = draw_source(len(chosen), random)
        for _ in range(2):  # up to two edits, for looks as far off as those that preference training leads to
            moved = edit(look, torch.randint(len(KINDS), (len(chosen),), generator=random), random)
            look = torch.where(torch.rand(len(chosen), 1, generator=random) < 0.5, moved, look)
        photos, seen, given = to_uint8(render(chosen.photos, look)).split(self.effort.sound)
        texts = [text for words in INSTRUCTIONS.values() for text in words.trained]
        asked = [texts[index % len(texts)] for index in range(self.effort.sound)]
        made = measure.edited(self._model, given, asked, seed=self.seed)
        sound = torch.cat([photos, to_uint8(vae.reconstructed(edits.vae_of(self._model), as_pixels(seen))), made])
        filter.train_filter(folder, sound, steps=self.effort.filter_steps, seed=self.seed)

    def _null(self) -> list[float]:
        """Relative changes of the true rate that online DPO makes where rewards are shuffled, over three seeds."""
        work = self.folder / ".null"
        shutil.rmtree(work, ignore_errors=True)
        recipe = Recipe(trainable=TrainableTable(), steps=self.effort.null_steps, every=self.effort.null_steps)
        with one_rank() as mesh:
            bench = Bench(self.folder, self.folder, work, mesh, self.effort.null_prompts)
            runs = [bench.learn("shuffled", seed, recipe) for seed in range(3)]
        shutil.rmtree(work)
        return [float(last.true_rate.mean() / first.true_rate.mean() - 1) for (_, first), *_, (_, last) in runs]

    def _write_manifest(self) -> Path:
        """Figures on held-out photos, and the hash of every file of the models."""
        say("world: measuring")
        shots, model, judged = self.held_out, self._model, self.family == JUDGED
        figures = measure.of_vae(model, shots, self.seed) | measure.of_edits(model, shots, self.seed)
        if judged:
            figures |= measure.of_hps(self.folder / "hps" / "hps.safetensors", shots, self.seed)
            figures |= measure.of_ctr(self.folder / "ctr", shots, self.seed)
            figures |= measure.of_filter(self.folder / "filter", model, shots, self.seed)
        folders = (self._kind.folder, *(JUDGES if judged else ()))
        files = sorted(p for name in folders for p in (self.folder / name).rglob("*") if p.is_file())
        hashes = {str(file.relative_to(self.folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        null = {"null": {"steps": self.effort.null_steps, "gains": self._null()}} if judged else {}
        content = {"seed": self.seed, "effort": asdict(self.effort), "figures": figures, **null, "sha256": hashes}
        write_durably(self._manifest, json.dumps(content, indent=2))
        for name, value in figures.items():
            say(f"  {name:40} {value:.3f}")
        return self._manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("world"), help="folder of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--world.family",
        dest="family",
        choices=EDIT_MODELS,
        default=JUDGED,
        help="of the edit model (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.seed < 0:
        raise Refused(f"--seed {arguments.seed} is below 0")
    torch.set_num_threads(1)  # these matrices are too small to share
    say(f"world: {World(arguments.dir, arguments.seed, Effort(), arguments.family).build()}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_main(main, "the same command goes on with the first part that is not complete")
