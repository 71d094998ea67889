"""What the parts of the miniature world can do, on photos that none of them was trained on.

B pictures, H, W size; pictures are uint8 (B, H, W, 3).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.world import hps, vae
from jobs.world.data import LOOKS, Shots, item_of, random_of
from jobs.world.edits import ENCODED_AT_ONCE, GEOMETRY, vae_of
from jobs.world.filter import pass_probabilities, spoiled
from jobs.world.looks import INSTRUCTIONS, KINDS, Kind, draw_source, edit, render, to_uint8
from jobs.world.truth import as_pixels, attributes, kept, true_rate
from rlhf.data.encoding import encode_media
from rlhf.data.sampler import encodings_for_sampling, sample_prompts
from rlhf.models import load_family
from rlhf.rewards.config import CTRJudgeConfig
from rlhf.rewards.ctr.model import CTRReward
from rlhf.rewards.hpsv2 import load_model
from rlhf.tables import EditModelTable, SamplingTable
from rlhf.types import Item, Prompt, Source, seed_from

STEPS = 4
"""Of sampling, as in the demo."""
ASKED: dict[Kind, tuple[str, int]] = {
    "brighter": ("brightness", 1),
    "warmer": ("warmth", 1),
    "vivid": ("vividness", 1),
    "sharper": ("sharpness", 1),
    "background": ("clutter", -1),
}
"""Which attribute an edit is asked to move, and which way."""


def edited(
    model: EditModelTable,
    pictures: Tensor,
    instructions: Sequence[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    denoiser: Path | None = None,
    lora: Path | None = None,
) -> Tensor:
    """The pictures edited by the model, from noise that depends on the seed and each one's number.

    denoiser: a trained folder in place of the model's own. lora: a file or its folder.
    """
    family = load_family(model)
    codec, network = family.load_codec("cpu"), family.load_denoiser("cpu", denoiser, lora)
    source = Source(path="", content="", height=GEOMETRY.height, width=GEOMETRY.width)
    prompts = [
        Prompt(key=str(i), instruction=text, sources=(replace(source, path=str(i), content=str(i)),), geometry=GEOMETRY)
        for i, text in enumerate(instructions)
    ]
    sampling = SamplingTable(steps=steps, batch_size=ENCODED_AT_ONCE)
    wanted = [encoding for prompt in prompts for encoding in encodings_for_sampling(family, prompt, sampling)]
    media = {encoding: [pictures[int(source.path)][None] for source in encoding.sources] for encoding in wanted}
    rows = {encoding: row.tensors for encoding, row in encode_media(codec, media, ENCODED_AT_ONCE).items()}
    made = list[Tensor]()
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        some = prompts[start : start + ENCODED_AT_ONCE]
        seeds = [seed_from(seed, "edited", start + index) for index in range(len(some))]
        latents = sample_prompts(
            family, network, rows.__getitem__, sampling, "cpu", prompts=some, noise_seeds=seeds, slots=range(len(some))
        )
        made.append(codec.decode(latents)[: len(some), 0])
    return torch.cat(made)


def sources(shots: Shots, seed: int) -> Tensor:
    return to_uint8(render(shots.photos, draw_source(len(shots), random_of(seed, "sources"))))


def of_vae(model: EditModelTable, shots: Shots, seed: int) -> dict[str, float]:
    given = vae.pictures(shots, len(shots), random_of(seed, "vae test")) / 2 + 0.5
    return {"vae_db": vae.decibels(vae.reconstructed(vae_of(model), given), given)}


def of_edits(model: EditModelTable, shots: Shots, seed: int) -> dict[str, float]:
    """Shares of edits that changed what was asked in the direction asked, sharper ones against the VAE's own reconstruction."""
    given = sources(shots, seed)
    through = to_uint8(vae.reconstructed(vae_of(model), as_pixels(given)))
    figures = dict[str, float]()
    made = list[Tensor]()
    for kind, words in INSTRUCTIONS.items():
        for wording, texts in (("trained", words.trained), ("rephrased", words.rephrased)):
            if not texts:
                continue
            answers = edited(model, given, [texts[index % len(texts)] for index in range(len(given))], seed=seed)
            if wording == "trained":
                made.append(answers)
            if kind in ASKED:
                name, sign = ASKED[kind]
                before = attributes(through if kind == "sharper" else given)
                moved = sign * (getattr(attributes(answers), name) - getattr(before, name))
                figures[f"follows_{kind}_{wording}"] = (moved > 0).float().mean().item()
    both = torch.cat(made)
    figures["subject_kept"] = kept(given.repeat(len(KINDS), 1, 1, 1), both).mean().item()
    figures["subject_kept_unrelated"] = kept(given, given.roll(1, 0)).mean().item()
    figures["true_rate_source"] = true_rate(given, shots.products).mean().item()
    figures["true_rate_base"] = true_rate(both, shots.products * len(KINDS)).mean().item()
    return figures


def of_hps(file: Path, shots: Shots, seed: int) -> dict[str, float]:
    return {"hps_pair_accuracy": hps.accuracy(load_model(file), shots, 4000, seed)}


def of_filter(folder: Path, edits: EditModelTable, shots: Shots, seed: int) -> dict[str, float]:
    """Balanced accuracy, and shares by fault. A third each of the sound pictures are photos, reconstructions and base edits."""
    given = sources(shots, seed)
    texts = [text for words in INSTRUCTIONS.values() for text in words.trained]
    sound = {
        "photo": given,
        "reconstruction": to_uint8(vae.reconstructed(vae_of(edits), as_pixels(given))),
        "base_edit": edited(edits, given, [texts[index % len(texts)] for index in range(len(given))], seed=seed),
    }
    figures = {f"filter_passes_{name}": _passed(folder, pictures) for name, pictures in sound.items()}
    broken, faults = spoiled(torch.cat(list(sound.values())), np.random.default_rng(seed))
    failed = pass_probabilities(folder, broken) < 0.5
    for fault in sorted(set(faults)):
        which = torch.tensor([other == fault for other in faults])
        figures[f"filter_fails: {fault}"] = failed[which].float().mean().item()
    passed = sum(figures[f"filter_passes_{name}"] for name in sound) / len(sound)
    return figures | {"filter_balanced_accuracy": (passed + failed.float().mean().item()) / 2}


def _passed(folder: Path, pictures: Tensor) -> float:
    return (pass_probabilities(folder, pictures) >= 0.5).float().mean().item()


def of_ctr(folder: Path, shots: Shots, seed: int) -> dict[str, float]:
    """Of each photo under LOOKS looks, half of them edits: how often model and true rate agree which of two is clicked more."""
    random = random_of(seed, "ctr test")
    judge = CTRReward("ctr", CTRJudgeConfig(path=str(folder)), "cpu")
    items: list[Item] = [item_of(product, index) for index, product in enumerate(shots.products)]
    said, true = list[Tensor](), list[Tensor]()
    for number in range(LOOKS):
        look = draw_source(len(shots), random)
        kinds = torch.randint(len(KINDS), (len(shots),), generator=random)
        pictures = to_uint8(render(shots.photos, edit(look, kinds, random) if number % 2 else look))
        media = [picture[None].numpy() for picture in pictures]
        said.append(torch.tensor(judge.score(media, [""] * len(media), [()] * len(media), items)))
        true.append(true_rate(pictures, shots.products))
    pairs = combinations(range(LOOKS), 2)
    agree = torch.stack([(said[a] > said[b]) == (true[a] > true[b]) for a, b in pairs])
    both = torch.stack([torch.cat(said), torch.cat(true)]).logit()
    return {"ctr_pair_accuracy": agree.float().mean().item(), "ctr_correlation": both.corrcoef()[0, 1].item()}
