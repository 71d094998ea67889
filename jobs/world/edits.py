"""The edit model of the miniature world: FLUX.1 Kontext's classes, small, taught the edits by this project's SFT objective.

Its text encoders are frozen random ones that know the instructions' words: six kinds of edits need no more. Its transformer has
two double and three single blocks, which begin as the identity (adaLN-Zero, Peebles & Xie, arXiv 2212.09748). What is kept is the
average of the weights. Trained by `rlhf.training` in this process, without Ray.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from jobs.one_process import NothingHanded, OneRank, one_rank, train_in
from jobs.world.data import SIZE, Shots, random_of
from jobs.world.looks import INSTRUCTIONS, KINDS, draw_source, edit, render, to_uint8
from rlhf.data.batches import EncodedExample, batches_of
from rlhf.data.encoding import encode_all
from rlhf.data.examples import blocks_of, check_block, write_index
from rlhf.data.records import BadInput
from rlhf.data.sizes import Sizes
from rlhf.data.stream import Visit
from rlhf.data.work import IndexedExamples
from rlhf.diffusion.objectives import SFT
from rlhf.models.family import Family
from rlhf.models.tiny import write_flux_kontext
from rlhf.runs.folder import RunFolder
from rlhf.tables import EditModelTable
from rlhf.training_tables import TrainerConfig
from rlhf.types import Batch, Geometry

GEOMETRY = Geometry(height=SIZE, width=SIZE)
SHAPE = {"layers": 2, "single_layers": 3, "heads": 3, "head_dim": 32, "channels": 16}
TOKENS = 12
BATCH, LEARNING_RATE, WARMUP, AVERAGE = 16, 1.5e-3, 100, 0.99
ENCODED_AT_ONCE = 64


def texts() -> list[str]:
    """Every instruction, rephrased ones too: their words are tokens."""
    return [text for words in INSTRUCTIONS.values() for text in (*words.trained, *words.rephrased)]


def model_of(folder: Path) -> EditModelTable:
    return EditModelTable(path=str(folder), height=SIZE, width=SIZE)


def write_untrained(folder: Path, vae: AutoencoderKL) -> Path:
    """A Kontext folder around `vae` whose transformer predicts 0."""
    write_flux_kontext(folder, vae=vae, texts=texts(), tokens=TOKENS, **SHAPE)
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.startswith(("proj_out.", "norm_out.linear.")) or (".norm" in name and ".linear." in name):
                parameter.zero_()
    transformer.save_pretrained(folder / "transformer")
    return folder


def write_triples(folder: Path, shots: Shots, count: int, seed: int) -> Path:
    """A JSONL of edits of the photos: source, target, instruction. Folders are made anew.

    count: how many, rounded up to a multiple of ENCODED_AT_ONCE.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random, choose, lines = random_of(seed, "triples"), np.random.default_rng(seed), list[str]()
    for start in range(0, count, ENCODED_AT_ONCE):
        rows = torch.randint(len(shots), (ENCODED_AT_ONCE,), generator=random)
        look = draw_source(len(rows), random)
        kinds = torch.randint(len(KINDS), (len(rows),), generator=random)
        sides = [to_uint8(render(shots.photos[rows], side)) for side in (look, edit(look, kinds, random))]
        for index, kind in enumerate(kinds.tolist(), start=start):
            words = [text for text in INSTRUCTIONS[KINDS[kind]].trained if text]
            line = {"prompt": words[choose.integers(len(words))]}
            for role, pictures in zip(("source", "target"), sides, strict=True):
                line[role] = f"{index:05d}_{role}.png"
                Image.fromarray(pictures[index - start].numpy()).save(folder / line[role])
            lines.append(json.dumps(line) + "\n")
    (folder / "edits.jsonl").write_text("".join(lines))
    return folder / "edits.jsonl"


def encode(family: Family, edits: Path) -> list[EncodedExample]:
    """Every edit, checked and encoded as `jobs.train` would; half of the `improve` edits get an empty instruction.

    Raises: BadInput.
    """
    index, counts = edits.with_suffix(".arrow"), family.source_counts
    parts = [check_block(b, source_counts=counts, items=None, needs_loser=False) for b in blocks_of(edits)]
    if problems := [problem for part in parts for problem in part.problems]:
        raise BadInput(problems)
    write_index(index, parts)
    indexed = IndexedExamples(family, index, (Sizes(sizes=(GEOMETRY,)),), ("target",))
    captions = indexed.index.table["caption"].to_pylist()
    free = INSTRUCTIONS["improve"].trained
    visits = [Visit(row=row, blank=caption in free and row % 2 == 0) for row, caption in enumerate(captions)]
    wanted = [encoding for visit in visits for encoding in indexed.encodings(visit)]
    rows = encode_all(family.load_codec("cpu"), wanted, ENCODED_AT_ONCE)
    return [indexed.encoded(visit, rows.__getitem__) for visit in visits]


class InMemory:
    """`rlhf.data.work.Work` of encoded examples, BATCH at random for every update."""

    def __init__(self, examples: Sequence[EncodedExample], *, seed: int):
        self._examples, self._seed = examples, seed

    def open(self, family: Family) -> None:
        self._family = family

    def batches(self, step: int, rank: int, handed: None, values: Sequence[Any]) -> list[Batch]:
        rows = np.random.default_rng((self._seed, step)).choice(len(self._examples), BATCH, replace=False)
        examples = [self._examples[row] for row in rows]
        return batches_of(self._family, examples, BATCH, seed=self._seed, step=step, first_index=0)

    def held_out(self, rank: int) -> list[Batch]:
        return []


def train_edits(folder: Path, examples: Sequence[EncodedExample], work: Path, *, steps: int, seed: int) -> None:
    """Train the transformer of the Kontext folder and put the average of its weights in its place. work: for the run."""
    config = TrainerConfig(
        train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler="cosine",
        lr_warmup_steps=WARMUP,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_train_steps=steps,
        gradient_checkpointing="none",
        ema_decay=AVERAGE,
    )
    run = RunFolder.claim(work / "runs", "edits", "", resume="never")
    with one_rank() as mesh:
        trainer = OneRank(model_of(folder), config, SFT(), InMemory(examples, seed=seed), mesh, seed)
        train_in(run, NothingHanded(), trainer)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(run.path / "final" / "ema_transformer", folder / "transformer")
