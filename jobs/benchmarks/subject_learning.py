"""Do the new layers of Wan learn to show the subject of a picture? On clips of moving shapes, without Ray.

    python -m jobs.benchmarks.subject_learning --steps 1000 --seeds 3 --out subject_learning

A small base learns to make such clips, of any colour and shape, from one caption. Frozen, it gets untrained new layers, which
learn from clips with pictures of their subjects. The measure is how often videos of held-out pictures show the colour and the
shape of their own picture, less how often those of the others; it is 0 for a model that does not look. Beside it stand runs whose
clips have the pictures of others.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, WanTransformer3DModel

from jobs import opens2v
from jobs.cli import run_main, say
from jobs.one_process import FULL, NothingHanded, OneRank, one_rank, refuse_small, train_in
from jobs.world.clips import COLOURS, Moving, draw, write_part
from jobs.world.data import PACKAGE
from jobs.world.edits import BATCH, InMemory
from rlhf.data.batches import EncodedExample, batches_of
from rlhf.data.clips import Asked, write_mp4
from rlhf.data.encoding import encode_all
from rlhf.data.examples import blocks_of, check_block, write_index
from rlhf.data.records import BadInput
from rlhf.data.sizes import Sizes
from rlhf.data.stream import Visit
from rlhf.data.work import IndexedExamples
from rlhf.diffusion.objectives import SFT
from rlhf.diffusion.process import with_times
from rlhf.models import load_family
from rlhf.models.family import Family, sample_batch
from rlhf.models.lora import load_modules
from rlhf.models.tiny import TEXT_TOKENS
from rlhf.models.tiny_wan import CLIP_WIDTH, write_clip, write_wan
from rlhf.models.trainable import Trainable, load_trainable
from rlhf.models.wan_network import with_references
from rlhf.runs.folder import RunFolder, made
from rlhf.runs.sheets import contact_sheet, strip
from rlhf.tables import ModelTable, SamplingTable
from rlhf.training_tables import TrainableTable, TrainerConfig
from rlhf.types import Geometry, noise_from

CLIPS, HELD_OUT = 240, 48
SIZE = Geometry(height=48, width=64, frames=5)
BASE_STEPS, BASE_RATE, RATE = 3000, 1e-3, 3e-3
SAMPLING = SamplingTable(steps=8, guidance_scale=1.0, batch_size=HELD_OUT)
NEW_LAYERS = TrainableTable(kind="modules", patterns=("clip_proj", "vae_proj", "*.k_vae", "*.v_vae", "*.norm_k_vae"))
FILLED = {"square": 1.0, "disc": np.pi / 4, "diamond": 0.5}
"""The share of its bounding box that a shape fills."""
COLOURED, LEAST = 60, 12
"""Between the largest and the least channel of a pixel that is no ground; pixels of a thing that can be told."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What `agreement` measured on held-out pictures."""

    base: float
    runs: Mapping[str, Sequence[float]]
    """By whose pictures were trained on, "own" or "shuffled", over the seeds."""

    @property
    def gain(self) -> float:
        """The least of the runs on their own pictures."""
        return min(self.runs["own"])

    @property
    def null(self) -> float:
        """The largest size of a run on the pictures of others."""
        return max(map(abs, self.runs["shuffled"]))


class AtTimes(InMemory):
    """At the times of sft_wan_subject.toml. What a video shows is decided where noise is high, and most of them are there."""

    def open(self, family: Family) -> None:
        super().open(family)
        self._process = with_times(family.process, "uniform", 5.0)


def write_vae(folder: Path) -> AutoencoderKLWan:
    """The miniature Qwen world's VAE as one of Wan's that takes frame by frame: what it weighs of earlier frames is 0."""
    trained = AutoencoderKLQwenImage.from_pretrained(PACKAGE / "qwen" / "vae", torch_dtype=torch.float32)
    shared = {name: trained.config[name] for name in ("base_dim", "dim_mult", "num_res_blocks", "z_dim")}
    scale = {name: trained.config[name] for name in ("latents_mean", "latents_std")}
    vae = AutoencoderKLWan(**shared, **scale, temperal_downsample=[False] * 3)
    weights = trained.state_dict()
    for name, mine in vae.state_dict().items():
        value = weights[name].clone()
        if value.ndim == 5 and value.shape[2] > 1:
            value[:, :, :-1] = 0
        mine.copy_(value)
    vae.save_pretrained(folder)
    return vae


def write_base(folder: Path) -> ModelTable:
    """A folder whose base is untrained."""
    write_clip(write_wan(folder, channels=16))
    shutil.rmtree(folder / "vae")
    write_vae(folder / "vae")
    network = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=256,
        num_layers=4,
    )
    add_layers(network, folder)
    return ModelTable(family="wan_subject", path=str(folder), dtype="float32", guidance_scale=1.0)


def add_layers(base: WanTransformer3DModel, folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    layers = with_references(base, clip_dim=CLIP_WIDTH, text_len=TEXT_TOKENS, fused=False)
    layers.save_pretrained(folder / "transformer")


def write_examples(folder: Path, clips: Sequence[Moving], shuffled: bool) -> Path:
    """A JSONL of the clips as `jobs.opens2v` makes it; shuffled: each with the picture of any."""
    frames, height, width = SIZE.frames, SIZE.height, SIZE.width
    part = write_part(folder / "part", clips, frames=frames, height=height, width=width)
    settings = opens2v.Settings(selection="first", most=1, least_score=0.0, frames_needed=frames, pairs=None)
    parts = [opens2v.Part(file=part, videos=folder / "part" / "videos", backgrounds=None)]
    opens2v.make(parts, folder / "set", settings, "stop")
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in (folder / "set" / opens2v.ROWS).read_text().splitlines()]
    sources = [row["source"] for row in rows]
    others = [sources[i] for i in np.random.default_rng(0).permutation(len(rows))] if shuffled else sources
    lines = [json.dumps(row | {"source": source}) for row, source in zip(rows, others, strict=True)]
    file.write_text("\n".join(lines))
    return file


def encode(family: Family, rows: Path) -> list[EncodedExample]:
    """Every clip, checked and encoded as `jobs.train` would. Raises: BadInput."""
    index, asked = rows.with_suffix(".arrow"), Asked(frames=SIZE.frames)
    counts = family.source_counts
    parts = [check_block(b, source_counts=counts, items=None, needs_loser=False, asked=asked) for b in blocks_of(rows)]
    if problems := [problem for part in parts for problem in part.problems]:
        raise BadInput(problems)
    write_index(index, parts)
    indexed = IndexedExamples(family, index, (Sizes(sizes=(SIZE,)),), ("target",))
    visits = [Visit(row=row) for row in range(len(indexed.index.table))]
    wanted = [encoding for visit in visits for encoding in indexed.encodings(visit)]
    found = encode_all(family.load_codec("cpu"), wanted, 16)
    return [indexed.encoded(visit, found.__getitem__) for visit in visits]


def learn(
    model: ModelTable,
    trainable: Trainable,
    examples: Sequence[EncodedExample],
    out: Path,
    steps: int,
    rate: float,
    seed: int,
) -> Path:
    """Train, and return the export."""
    config = TrainerConfig(
        train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=rate,
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        weight_decay=0.0,
        max_train_steps=steps,
        gradient_checkpointing="none",
    )
    run = RunFolder.claim(out, "run", "", resume="never")
    with one_rank() as mesh:
        trainer = OneRank(model, config, SFT(), AtTimes(examples, seed=seed), mesh, seed, trainable)
        train_in(run, NothingHanded(), trainer)
    return run.path / "final" / trainable.folder(load_family(model))


def videos(model: ModelTable, examples: Sequence[EncodedExample], modules: Path | None) -> np.ndarray:
    """uint8 (B, F, H, W, 3) of the examples' pictures and captions, each from noise of its own, always the same."""
    family = load_family(model)
    denoiser = family.load_denoiser("cpu")
    if modules is not None:
        load_modules(denoiser, modules)
    (batch,) = batches_of(family, examples, len(examples), seed=0, step=0, first_index=0)
    noise = torch.stack([noise_from(i, family.latent_shape(SIZE)) for i in range(len(examples))])
    with torch.no_grad():
        x0 = sample_batch(family, denoiser, batch.condition, None, noise, SAMPLING)
    return family.load_codec("cpu").decode(x0).numpy()


def seen(video: np.ndarray) -> tuple[str, str]:
    """The colour and the shape of what moves in uint8 (F, H, W, 3); empty where nothing can be told."""
    colours, filled = [], []
    for frame in video.astype(float):
        mask = frame.max(-1) - frame.min(-1) > COLOURED
        if mask.sum() >= LEAST:
            colours.append(frame[mask].mean(0))
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            filled.append(mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
    if not colours:
        return "", ""
    colour, share = np.mean(colours, axis=0), float(np.median(filled))
    return (
        min(COLOURS, key=lambda name: float(np.abs(colour - COLOURS[name]).sum())),
        min(FILLED, key=lambda name: abs(share - FILLED[name])),
    )


def agreement(made: np.ndarray, clips: Sequence[Moving]) -> float:
    """How often videos show the colour and the shape of their own clip, each half, less how often those of any clip."""
    found = [seen(video) for video in made]

    def match(told: tuple[str, str], clip: Moving) -> float:
        return ((told[0] == clip.colour) + (told[1] == clip.shape)) / 2

    own = np.mean([match(told, clip) for told, clip in zip(found, clips, strict=True)])
    return float(own - np.mean([[match(told, clip) for clip in clips] for told in found]))


def all_runs(out: Path, *, steps: int = 1000, seeds: int = 3, base_steps: int = BASE_STEPS) -> Shown:
    """Train the base, and then runs of both kinds, all in new folders below `out`."""
    model, size = write_base(out / "model"), {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}
    family = load_family(model)
    clips, held_out = [*draw(CLIPS, **size, seed=0)], [*draw(HELD_OUT, **size, seed=1)]
    examples = {
        name: encode(family, write_examples(out / name, clips, shuffled=name == "shuffled"))
        for name in ("own", "shuffled")
    }
    shown = encode(family, write_examples(out / "held_out", held_out, shuffled=False))
    trained = learn(model, FULL, examples["shuffled"], out / "base", base_steps, BASE_RATE, seed=0)
    whole = family.load_denoiser("cpu", trained)
    base = WanTransformer3DModel.from_config(whole.config)
    base.load_state_dict(whole.state_dict(), strict=False)
    add_layers(base, out / "model")
    made = videos(model, shown, None)
    keep(out / "base.png", made, held_out)
    before, runs = agreement(made, held_out), dict[str, list[float]]()
    say(f"base: {before:.3f}")
    for name, seed in ((name, seed) for name in examples for seed in range(seeds)):
        exported = learn(
            model, load_trainable(NEW_LAYERS, family), examples[name], out / f"{name}_{seed}", steps, RATE, seed
        )
        made = videos(model, shown, exported)
        keep(out / f"{name}_{seed}.png", made, held_out)
        runs.setdefault(name, []).append(agreement(made, held_out))
        say(f"{name}, seed {seed}: {runs[name][-1]:.3f}")
    return Shown(base=before, runs=runs)


def keep(file: Path, made: np.ndarray, clips: Sequence[Moving]) -> None:
    """Some frames of the first 12 videos over what their pictures showed, and the first as MP4."""
    cells = [
        (strip(video), f"{clip.colour} {clip.shape}: {' '.join(seen(video))}")
        for video, clip in zip(made, clips, strict=True)
    ]
    contact_sheet([cells[row : row + 4] for row in range(0, 12, 4)]).save(file)
    write_mp4(file.with_suffix(".mp4"), made[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base_steps", type=int, default=BASE_STEPS)
    parser.add_argument("--out", type=Path, default=Path("subject_learning"), help="new folder")
    given = parser.parse_args()
    for name in ("steps", "seeds", "base_steps"):
        refuse_small(f"--{name}", getattr(given, name), 1)
    shown = all_runs(made(given.out, "--out"), steps=given.steps, seeds=given.seeds, base_steps=given.base_steps)
    (given.out / "subject_learning.json").write_text(json.dumps({"base": shown.base, **shown.runs}, indent=1))
    say(f"base {shown.base:.3f}; least of own {shown.gain:.3f}; largest size of shuffled {shown.null:.3f}")


if __name__ == "__main__":
    run_main(main)
