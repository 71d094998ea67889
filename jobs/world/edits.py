"""The edit models of the miniature worlds: each family's classes, small, taught the edits by this project's SFT objective.

Their encoders are frozen random ones that know the instructions' words: six kinds of edits need no more. The blocks of their
transformers begin as the identity (adaLN-Zero, Peebles & Xie, arXiv 2212.09748). What is kept is the average of the weights.
Trained by `rlhf.training` in this process, without Ray.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, ModelMixin, QwenImageTransformer2DModel
from PIL import Image
from torch import nn

from jobs.one_process import NothingHanded, OneRank, one_rank, train_in
from jobs.world.autoencoders import Autoencoder, FluxVAE, QwenVAE
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
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from rlhf.runs.folder import RunFolder
from rlhf.tables import EditModelTable
from rlhf.training_tables import TrainerConfig
from rlhf.types import Batch, Geometry

GEOMETRY = Geometry(height=SIZE, width=SIZE)
BATCH, LEARNING_RATE, WARMUP, AVERAGE = 16, 1.5e-3, 100, 0.99
ENCODED_AT_ONCE = 64


def texts() -> list[str]:
    """Every instruction, rephrased ones too: their words are tokens."""
    return [text for words in INSTRUCTIONS.values() for text in (*words.trained, *words.rephrased)]


def _write_kontext(folder: Path, vae: ModelMixin) -> None:
    shape = {"layers": 2, "single_layers": 3, "heads": 3, "head_dim": 32, "channels": 16}
    write_flux_kontext(folder, vae=vae, texts=texts(), tokens=12, **shape)


def _write_qwen(folder: Path, vae: ModelMixin) -> None:
    shape: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    write_qwen_image_edit(folder, vae=vae, texts=texts(), channels=16, num_layers=4, **shape)


@dataclass(frozen=True, kw_only=True)
class EditModel:
    """How the edit model of a family is made."""

    folder: str
    """Its name below a world's folder."""
    manifest: str
    """The name of the file beside it with figures and hashes."""
    vae: Callable[..., Autoencoder]
    transformer: type[ModelMixin]
    write: Callable[[Path, ModelMixin], None]
    """A folder of random weights around a VAE."""
    modulation: str
    """Pattern of the parameters by which a block is told the time, which begin at 0."""
    stored: torch.dtype
    """Of the weights in the package, whose files stay below 5 MB."""
    guidance_scale: float | None = None
    """At which it edits; None: the family's own. Guidance by two branches, at 4 as for the real model, overdoes what this small
    one does without: its edits keep 0.77 of the subject in place of 0.96."""


EDIT_MODELS = {
    "flux_kontext": EditModel(
        folder="kontext",
        manifest="manifest.json",
        vae=FluxVAE,
        transformer=FluxTransformer2DModel,
        write=_write_kontext,
        modulation=r"\.norm.*\.linear\.",
        stored=torch.float32,
    ),
    "qwen_image_edit": EditModel(
        folder="qwen",
        manifest="qwen_manifest.json",
        vae=QwenVAE,
        transformer=QwenImageTransformer2DModel,
        write=_write_qwen,
        modulation=r"\.(img|txt)_mod\.",
        stored=torch.bfloat16,
        guidance_scale=1.0,
    ),
}
"""By the family of `rlhf.models.FAMILIES`."""


def model_of(folder: Path, family: str = "flux_kontext") -> EditModelTable:
    scale = EDIT_MODELS[family].guidance_scale
    return EditModelTable(family=family, path=str(folder), height=SIZE, width=SIZE, guidance_scale=scale)


def vae_of(model: EditModelTable) -> Autoencoder:
    """The trained VAE of a folder."""
    return EDIT_MODELS[model.family].vae(Path(model.path) / "vae")


def write_untrained(model: EditModelTable, vae: Autoencoder) -> None:
    """The model's folder around `vae`, with a transformer that predicts 0."""
    kind, folder = EDIT_MODELS[model.family], Path(model.path)
    kind.write(folder, nn.Module.to(vae.model, kind.stored))
    transformer = kind.transformer.from_pretrained(folder / "transformer")
    zero = re.compile(rf"^proj_out\.|^norm_out\.linear\.|{kind.modulation}")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if zero.search(name):
                parameter.zero_()
    transformer.save_pretrained(folder / "transformer")


def write_triples(folder: Path, shots: Shots, count: int, seed: int) -> Path:
    """A JSONL of edits of the photos: source, target, instruction. The folder is made anew.

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
        self._family, self._process = family, family.process

    def batches(self, step: int, rank: int, handed: None, values: Sequence[Any]) -> list[Batch]:
        rows = np.random.default_rng((self._seed, step)).choice(len(self._examples), BATCH, replace=False)
        examples, process = [self._examples[row] for row in rows], self._process
        return batches_of(self._family, examples, BATCH, seed=self._seed, step=step, first_index=0, process=process)

    def held_out(self, rank: int) -> list[Batch]:
        return []


def train_edits(
    model: EditModelTable, examples: Sequence[EncodedExample], work: Path, *, steps: int, seed: int
) -> None:
    """Train the transformer of the model's folder and put the average of its weights in its place. work: for the run."""
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
        trainer = OneRank(model, config, SFT(), InMemory(examples, seed=seed), mesh, seed)
        train_in(run, NothingHanded(), trainer)
    kind = EDIT_MODELS[model.family]
    trained = kind.transformer.from_pretrained(run.path / "final" / "ema_transformer", torch_dtype=kind.stored)
    trained.save_pretrained(Path(model.path) / "transformer")
