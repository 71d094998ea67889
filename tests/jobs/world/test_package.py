"""The shipped models are those of the manifest, small enough, and as good as is said."""

import asyncio
import hashlib
import json

import numpy as np
import pytest
import torch

from jobs.world import filter, measure
from jobs.world.data import PACKAGE, shoot
from jobs.world.edits import EDIT_MODELS, model_of
from rlhf.rewards.config import FilterJudgeConfig

MANIFESTS = {family: json.loads((PACKAGE / kind.manifest).read_text()) for family, kind in EDIT_MODELS.items()}
JUDGED = MANIFESTS["flux_kontext"]
DECIBELS = {"flux_kontext": 38.7, "qwen_image_edit": 38.2}
"""Of the VAEs, as README says."""


def test_every_file_is_the_one_that_was_measured():
    found = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*") if file.is_file()}
    hashes = {file: digest for manifest in MANIFESTS.values() for file, digest in manifest["sha256"].items()}
    assert found == set(hashes) | {kind.manifest for kind in EDIT_MODELS.values()}
    for file, digest in hashes.items():
        assert hashlib.sha256((PACKAGE / file).read_bytes()).hexdigest() == digest, file
    sizes = {file: file.stat().st_size for file in PACKAGE.rglob("*") if file.is_file()}
    assert max(sizes.values()) < 5_000_000 and sum(sizes.values()) < 25_000_000
    for kind in EDIT_MODELS.values():
        assert sum(size for file, size in sizes.items() if PACKAGE / kind.folder in file.parents) < 9_000_000


@pytest.mark.parametrize("family", EDIT_MODELS)
def test_its_figures_are_those_of_the_readme(family):
    figures = MANIFESTS[family]["figures"]
    assert round(figures["vae_db"], 1) == DECIBELS[family]
    for kind in measure.ASKED:
        assert figures[f"follows_{kind}_trained"] >= 0.98
    assert figures["subject_kept"] > 0.9 > 0.2 > figures["subject_kept_unrelated"]


def test_the_judges_figures_are_those_of_the_readme():
    figures = JUDGED["figures"]
    assert min(figures[name] for name in ("hps_pair_accuracy", "ctr_pair_accuracy")) >= 0.9
    assert figures["filter_balanced_accuracy"] >= 0.95
    assert len(JUDGED["null"]["gains"]) == 3


@pytest.mark.parametrize("family", EDIT_MODELS)
def test_edits_follow_their_instructions_here_too(family):
    """On other photos than were measured, few of them: at 44 photos a share of 0.98 falls below 0.86 once in a thousand times."""
    shots = shoot(44, "package test")
    figures = measure.of_edits(model_of(PACKAGE / EDIT_MODELS[family].folder, family), shots, seed=3)
    assert min(figures[f"follows_{kind}_trained"] for kind in measure.ASKED) >= 0.86, figures
    assert figures["true_rate_base"] > figures["true_rate_source"] and figures["subject_kept"] > 0.9


@pytest.mark.slow
def test_vllm_gives_the_filters_verdicts_with_a_reason_that_it_learnt():
    """Balanced accuracy of 120 pictures: 0.977 as measured, with a deviation of 0.014."""
    from serve_apps.vllm_engine import VLLMFilter

    sound = measure.sources(shoot(60, "vllm test"), seed=4)
    broken, _ = filter.spoiled(sound, np.random.default_rng(4))
    table = FilterJudgeConfig(
        path=str(PACKAGE / "filter"), dtype="float32", max_model_len=1024, max_reason_tokens=16, num_gpus=0
    )

    async def ask() -> list:
        engine = VLLMFilter(table)
        asked = [
            engine.judge(picture.numpy(), (), "Make the photo brighter.") for picture in torch.cat([sound, broken])
        ]
        verdicts = await asyncio.gather(*asked)
        await engine.close()
        return verdicts

    verdicts = asyncio.run(ask())
    passed, failed = [v.valid for v in verdicts[:60]], [not v.valid for v in verdicts[60:]]
    assert (np.mean(passed) + np.mean(failed)) / 2 >= 0.93
    # The reasons are of the five that it learnt. Which one it is, is not tested: it is often another fault's.
    reasons = [v.reason for v in verdicts if not v.valid]
    assert np.mean([reason in filter.FAULTS for reason in reasons]) > 0.9, reasons
