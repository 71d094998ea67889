"""The trainer actor group: N ranks of one `rlhf.training.trainer.Trainer`, driven together by a `RankGroup`.

What a rank trains on is its `Work`'s business (`rlhf.data.work`); what it is handed for a step comes from the driver's half of
the source (`sources.py`). Left out: building a new group after `TrainerLost`, which is the caller's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from time import monotonic
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup

from actors.publication import Publication, Published, put
from actors.ranks import FETCH_TIMEOUT_S, Rank, RankGroup, RankLost
from rlhf.data.batches import latents_to_array
from rlhf.data.cache import EncodingCache
from rlhf.data.sampler import sample_prompts
from rlhf.data.work import Work
from rlhf.diffusion.objectives import Objective
from rlhf.models import load_family, lora_files
from rlhf.models.trainable import Trainable
from rlhf.runs.folder import Fence
from rlhf.shards import distributed
from rlhf.tables import ModelTable, RunConfig, SamplingTable
from rlhf.training.trainer import EMA, Trainer
from rlhf.training_tables import TrainerConfig
from rlhf.types import POLICY, Prompt


class TrainerLost(RankLost):
    """A rank died or hung; the group is gone and training goes on from the last committed checkpoint."""


Handed = tuple[Any, Sequence[ray.ObjectRef]]
"""What the driver hands one rank for a step: work, and references whose values the rank fetches for `Work.batches`."""


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    model: ModelTable
    trainer: TrainerConfig
    trainable: Trainable
    objective: Objective
    work: Work
    run: RunConfig
    fence: Fence


class TrainerWorker(Rank):
    def __init__(self, rank: int, setup: RankSetup):
        self.rank, self._setup = rank, setup

    def join(self, host: str, port: int) -> None:
        """Join the process group, load this rank's shard and open its work."""
        setup, table = self._setup, self._setup.trainer
        store, device = self.rendezvous(host, port), "cuda" if table.num_gpus else "cpu"
        mesh = distributed.start(
            rank=self.rank, world=table.ranks, store=store, device=device, timeout_s=table.timeout_s
        )
        family, trainable, objective = load_family(setup.model), setup.trainable, setup.objective
        self.trainer = Trainer(
            family=family, config=table, trainable=trainable, objective=objective, mesh=mesh, seed=setup.run.seed
        )
        setup.work.open(family)

    def step(self, step: int, handed: Handed = (None, ())) -> dict[str, float]:
        work, references = handed
        values = ray.get(list(references), timeout=FETCH_TIMEOUT_S)
        return self.trainer.step(self._setup.work.batches(step, self.rank, work, values))

    def evaluate(self) -> dict[str, float]:
        return self.trainer.evaluate(self._setup.work.held_out(self.rank))

    def sample(
        self, cache: EncodingCache, sampling: SamplingTable, share: Sequence[tuple[Prompt, int]]
    ) -> list[ray.ObjectRef]:
        """References to the latents of prompts and noise seeds, as `latents_to_array` keeps them; of as many on every rank."""
        trainer = self.trainer
        sample = partial(sample_prompts, trainer.family, trainer.policy, cache.row, sampling, trainer.device, slots=[0])
        found = [sample(prompts=[prompt], noise_seeds=[seed])[0] for prompt, seed in share]
        return [ray.put(latents_to_array(latents)) for latents in found]

    def publish(self, side: str) -> list[Published]:
        self._setup.fence.check()
        return put(self.trainer.shards(side))

    def refresh(self, side: str, decay: float) -> None:
        self.trainer.refresh(side, decay)

    def save(self, folder: Path) -> None:
        self.trainer.save(folder)

    def restore(self, folder: Path) -> None:
        self.trainer.restore(folder)

    def export(self, folder: Path) -> None:
        """`transformer/` and `ema_transformer/` (of a LoRA `lora/` and `ema_lora/`, and so on) inside `folder`."""
        trainer, run = self.trainer, self._setup.run
        dtype, kind = getattr(torch, run.export_dtype), trainer.trainable.folder(trainer.family)
        written = {kind: POLICY} | ({f"ema_{kind}": EMA} if trainer.ema else {})
        for name, which in written.items():
            trainer.export(folder / name, which=which, dtype=dtype)
        if trainer.rank == 0:
            for name, layout in product(written, run.lora_layouts):
                tensors = lora_files.converted(trainer.family, folder / name, layout)
                lora_files.write(tensors, folder / f"{name}_{layout}.safetensors", dtype)


class TrainerGroup:
    """The ranks, as the driver sees them. Every method runs on all ranks and returns when all have answered."""

    def __init__(self, setup: RankSetup, placement: PlacementGroup, meanwhile: Callable[[], None] = lambda: None):
        """`meanwhile` is called again and again while ranks work, so that rollouts go on."""
        self._published: dict[str, float] = {}
        self._group = RankGroup(
            TrainerWorker, setup.trainer, placement, setup, meanwhile=meanwhile, name="trainer rank", lost=TrainerLost
        )
        self.kill = self._group.kill

    def step(self, step: int, handed: Sequence[Handed] | None) -> dict[str, float]:
        """One optimizer update: `train/…` scalars over all ranks, the seconds of this step and of the last publish."""
        started = monotonic()
        scalars = self._group.all("step", step, each=handed or ())[0]
        seconds = {"time/train": monotonic() - started} | self._published
        return {f"train/{name}": value for name, value in scalars.items()} | seconds

    def evaluate(self) -> dict[str, float]:
        """`eval/…` scalars of the objective on what is held out."""
        return {f"eval/{name}": value for name, value in self._group.all("evaluate")[0].items()}

    def sample(
        self, cache: EncodingCache, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingTable
    ) -> list[ray.ObjectRef]:
        """References to latents that the policy makes of prompts, with conditions from the cache, from noise of these seeds."""
        ranks, wanted = len(self._group.workers), [*zip(prompts, seeds, strict=True)]
        count = -(-len(wanted) // ranks)
        wanted += [wanted[-1]] * (count * ranks - len(wanted))
        shares = [wanted[rank * count : (rank + 1) * count] for rank in range(ranks)]
        found = self._group.all("sample", cache, sampling, each=shares)
        return [*chain(*found)][: len(prompts)]

    def publish(self, version: int, side: str = "policy") -> Publication:
        """`policy` or `ema` weights of all ranks in the object store."""
        started = monotonic()
        buffers = self._group.all("publish", side)
        self._published = {"time/publish": monotonic() - started}
        return Publication(version=version, buffers=tuple(chain(*buffers)))

    def refresh(self, side: str, decay: float = 0.0) -> None:
        """side ← decay · side + (1 − decay) · policy."""
        self._group.all("refresh", side, decay)

    def save(self, folder: Path) -> None:
        self._group.all("save", folder)

    def restore(self, folder: Path) -> None:
        self._group.all("restore", folder)

    def export(self, folder: Path) -> None:
        self._group.all("export", folder)
