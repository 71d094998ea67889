"""Where everything runs: what each role needs, what the cluster has, and a refusal with a table when it is not enough.

Every trainer rank, sampler, Serve replica and encoder of a run takes its CPUs and GPUs from the configuration; the judging
actor's share is the constant below, and contact sheets take none. Memory is arithmetic from the checkpoint's own shapes,
read without loading anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.models.trainable import Counts
from rlhf.rewards.config import JudgesConfig
from rlhf.section import local_paths
from rlhf.tables import PreprocessConfig, SamplersConfig, TrainerConfig
from rlhf.types import Geometry, Source

GIB = 2**30
OVERHEAD = 1.0 * GIB
"""Bytes of an actor process itself: interpreter, torch, diffusers (about 0.9 GB measured)."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One kind of process: how many, what each reserves in Ray, and an estimate of the bytes of model state in each."""

    name: str
    count: int
    num_cpus: float
    num_gpus: float
    nbytes: float
    before: bool = False
    """Over before the others start."""
    judge: str | None = None
    """The judge that it serves, if it does."""


class NotEnoughResources(Refused):
    """The cluster cannot hold the run; the message is a table."""


def _folder_bytes(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def _judge_bytes(path: str) -> float:
    if not Path(path).exists():
        return 0.0
    return float(Path(path).stat().st_size) if Path(path).is_file() else _folder_bytes(Path(path))


class ModelSizes:
    """Sizes of a model, from its folder, without loading anything: parameters, and bytes of its frozen parts."""

    def __init__(self, family: Family):
        denoiser = family.empty_denoiser(family.dtype)
        self.parameters = sum(p.numel() for p in denoiser.parameters())
        blocks = (module for module in denoiser.modules() if isinstance(module, family.blocks))
        self.block = max(sum(p.numel() for p in module.parameters()) for module in blocks)
        self.compute_bytes = family.dtype.itemsize
        folders = {kind: set(what.folders) for kind, what in family.kinds.items()}
        decoder = family.target(ANY_SOURCE, Geometry(height=1, width=1)).kind
        self.decoder = _bytes_of(Path(family.path), folders[decoder])
        """What a sampler needs of the codec."""
        self.codec = _bytes_of(Path(family.path), set().union(*folders.values()))


ANY_SOURCE = Source(path="", content="")


def _bytes_of(path: Path, folders: set[str]) -> float:
    return sum(_folder_bytes(path / name) for name in folders)


def trainer_role(model: ModelSizes, trainer: TrainerConfig, counts: Counts) -> Role:
    """State per rank, T = trained parameters, R = ranks: 4T (master) + optimizer + 4T (gradient) [+ 4T EMA], the frozen base
    and the frozen sides over R, and one gathered block. Activations are not counted: they depend on the picture size and on
    gradient checkpointing.
    """
    ema = 4 if trainer.ema_decay is not None else 0
    each = 4 + OPTIMIZER_BYTES[trainer.optimizer] + 4 + ema
    shard = each * counts.trained + counts.frozen_bytes + counts.side_bytes
    return Role(
        name="trainer rank",
        count=trainer.ranks,
        num_cpus=trainer.num_cpus,
        num_gpus=trainer.num_gpus,
        nbytes=shard / trainer.ranks + 2 * model.compute_bytes * model.block,
    )


OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}
"""Per trained parameter: two fp32 moments, two bytes, or (nearly) a row and a column."""


def sampler_role(model: ModelSizes, samplers: SamplersConfig, *, encodes: bool) -> Role:
    """encodes: conditions are not in a cache, so the text encoders are loaded too."""
    return Role(
        name="sampler",
        count=samplers.count,
        num_cpus=samplers.num_cpus,
        num_gpus=samplers.num_gpus,
        nbytes=model.compute_bytes * model.parameters + (model.codec if encodes else model.decoder),
    )


def encoder_role(model: ModelSizes, preprocess: PreprocessConfig, *, before: bool) -> Role:
    """The encoders of `preprocess`, at work before the trainer or beside it."""
    return Role(
        name="encoder (preprocess, before the rest)" if before else "encoder",
        before=before,
        count=preprocess.encoders,
        num_cpus=preprocess.num_cpus,
        num_gpus=preprocess.num_gpus,
        nbytes=model.codec,
    )


JUDGES_CPUS = 0.05


def judging_role() -> Role:
    """The judging actor."""
    return Role(name="judging actor", count=1, num_cpus=JUDGES_CPUS, num_gpus=0, nbytes=0)


def judge_roles(judges: JudgesConfig, names: Sequence[str], *, before: bool = False) -> list[Role]:
    """The Serve replicas of those judges of `names` that are deployed here, at their most."""
    return [
        Role(
            name=f"judge {name}",
            judge=name,
            before=before,
            count=judge.most_replicas,
            num_cpus=judge.num_cpus,
            num_gpus=judge.num_gpus,
            nbytes=sum(_judge_bytes(path) for _, path in local_paths(judge)),
        )
        for name, judge in judges.to_deploy(names).items()
    ]


def checkpoint_bytes(trainer: TrainerConfig, counts: Counts) -> float:
    """Bytes of one committed checkpoint: masters, optimizer, EMA, frozen sides."""
    ema = 4 if trainer.ema_decay is not None else 0
    return float(counts.trained * (4 + OPTIMIZER_BYTES[trainer.optimizer] + ema) + counts.side_bytes)


def export_bytes(trainer: TrainerConfig, counts: Counts, dtype: str) -> float:
    """Bytes of one export: the trained weights and, if they are kept, their average."""
    kinds = 2 if trainer.ema_decay is not None else 1
    return float(counts.trained * kinds * getattr(torch, dtype).itemsize)


def check_shared(key: str, folder: Path, timeout_s: float = 60.0) -> None:
    """Raise Refused unless every node of the cluster sees the folder of recipe `key`: actors on other nodes write there."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return

    @ray.remote(num_cpus=0, max_retries=0)
    def sees(path: Path) -> bool:
        return path.is_dir()

    answers = ray.get(
        [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(folder)
            for node in nodes
        ],
        timeout=timeout_s,
    )
    blind = [node["NodeManagerHostname"] for node, seen in zip(nodes, answers, strict=True) if not seen]
    if blind:
        raise Refused(f"{key}: {folder} is not visible on {', '.join(blind)}; use a folder shared by all nodes")


def at_once(needed: Sequence[Role]) -> list[Role]:
    """The roles that run at the same time."""
    return [role for role in needed if not role.before]


def table(needed: Sequence[Role], available: dict[str, float] | None) -> str:
    """Needed by role, and below it the totals against what the cluster has free (unknown in a dry run without one)."""
    lines = [f"{'role':<40}{'count':>6}{'CPU':>8}{'GPU':>8}{'GiB each':>10}{'GiB all':>10}"]
    for role in needed:
        each = (role.nbytes + OVERHEAD) / GIB
        cpus, gpus = role.count * role.num_cpus, role.count * role.num_gpus
        lines.append(f"{role.name:<40}{role.count:>6}{cpus:>8.2f}{gpus:>8.2f}{each:>10.2f}{role.count * each:>10.2f}")
    together = at_once(needed)
    total = sum(role.count * (role.nbytes + OVERHEAD) for role in together) / GIB
    cpus, gpus = totals(together)
    lines.append(f"{'needed at once':<46}{cpus:>8.2f}{gpus:>8.2f}{'':>10}{total:>10.2f}")
    if available is not None:
        free = available.get("memory", 0.0) / GIB
        lines.append(
            f"{'free in the cluster':<46}{available.get('CPU', 0):>8.2f}{available.get('GPU', 0):>8.2f}{'':>10}{free:>10.2f}"
        )
    return "\n".join(lines)


def totals(needed: Sequence[Role]) -> tuple[float, float]:
    """(CPUs, GPUs) of all roles."""
    return sum(r.count * r.num_cpus for r in needed), sum(r.count * r.num_gpus for r in needed)


def check(needed: Sequence[Role], available: dict[str, float]) -> None:
    """Raise NotEnoughResources, with the table, unless everything fits now."""
    together = at_once(needed)
    stages = [totals(together), *(totals([role]) for role in needed if role.before)]
    cpus, gpus = (max(stage) for stage in zip(*stages, strict=True))
    short = []
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        have = available.get(name, 0.0)
        if need > have + 1e-6:
            short.append(f"{need:g} {name} needed, {have:g} free")
    memory = sum(role.count * (role.nbytes + OVERHEAD) for role in together if not role.num_gpus)
    if memory > available.get("memory", math.inf):
        short.append(f"{memory / GIB:.1f} GiB of memory needed, {available['memory'] / GIB:.1f} GiB free")
    if short:
        raise NotEnoughResources(
            f"the cluster is too small: {'; '.join(short)}. Lower num_cpus, num_gpus or the counts of "
            f"the roles below, or add nodes.\n{table(needed, available)}"
        )


def reserve(roles: Sequence[Role], timeout_s: float = 120.0) -> PlacementGroup:
    """A placement group with one bundle for each process of `roles`, in their order. Raises when it is not granted in time."""
    each = [{"CPU": role.num_cpus, "GPU": role.num_gpus} for role in roles for _ in range(role.count)]
    bundles = [{name: amount for name, amount in bundle.items() if amount} for bundle in each]
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        raise NotEnoughResources(
            f"no room for {' and '.join(role.name for role in roles)} within {timeout_s:.0f} s, though the totals fit: "
            f"bundles {bundles}; another job may hold the rest"
        )
    return group
