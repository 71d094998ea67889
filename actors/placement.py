"""Where everything runs: what each role needs, what the cluster has, and a refusal with a table when it is not enough.

Every trainer rank, sampler, Serve replica and encoder takes its CPUs and GPUs from its table; the judging actor's share is the
constant below, and contact sheets take none. Memory is arithmetic from the checkpoint's own shapes: nothing is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.reading import READER_CPUS
from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.models.trainable import Counts
from rlhf.rewards.config import JudgeConfig, JudgesConfig
from rlhf.section import local_paths
from rlhf.shards.files import DIFFUSERS, TRANSFORMERS, weight_files
from rlhf.tables import PreprocessConfig, SamplersConfig
from rlhf.training_tables import TrainerConfig
from rlhf.types import Geometry, Source

GIB = 2**30
OVERHEAD = 1.0 * GIB
"""Bytes of an actor process itself: interpreter, torch, diffusers (about 0.9 GB measured)."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0, "prodigy": 16, "sgd": 4}
"""Per trained parameter: two fp32 moments, two bytes, or (nearly) a row and a column."""
JUDGES_CPUS = 0.05
Kind = Literal["trainer", "sampler", "encoder", "judging", "judge"]
Table = TrainerConfig | SamplersConfig | PreprocessConfig | JudgeConfig


@dataclass(frozen=True, kw_only=True)
class Role:
    """One kind of process: how many, what each reserves in Ray, and an estimate of the bytes of model state in each."""

    kind: Kind
    name: str
    """For people."""
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


def _weight_bytes(path: Path) -> float:
    """Of a file, or of the safetensors in a folder; 0 where there is none."""
    files = [path] if path.is_file() else [*weight_files(path, DIFFUSERS)[0], *weight_files(path, TRANSFORMERS)[0]]
    return float(sum(file.stat().st_size for file in files))


class ModelSizes:
    """Sizes of a model, from its folder, without loading anything: parameters, and bytes of its frozen parts."""

    def __init__(self, family: Family):
        denoiser = family.empty_denoiser(family.dtype)
        self.weights = sum(p.nbytes for p in denoiser.parameters())
        """Bytes of the whole denoiser."""
        blocks = (module for module in denoiser.modules() if isinstance(module, family.blocks))
        self.block = max(sum(p.numel() for p in module.parameters()) for module in blocks)
        self.compute_bytes = family.dtype.itemsize
        folders = {kind: set(what.folders) for kind, what in family.kinds.items()}
        sizes = {name: _weight_bytes(Path(family.path) / name) for name in set().union(*folders.values())}
        # The kind of a target is the VAE's, whatever its size.
        decoder = family.target(Source(path="", content="", height=1, width=1), Geometry(height=1, width=1)).kind
        self.decoder = sum(sizes[name] for name in folders[decoder])
        """What a sampler needs of the codec."""
        self.codec = sum(sizes.values())


def _role(
    kind: Kind, name: str, table: Table, count: int, nbytes: float, *, before: bool = False, judge: str | None = None
) -> Role:
    own = {"num_cpus": table.num_cpus, "num_gpus": table.num_gpus}
    return Role(kind=kind, name=name, count=count, nbytes=nbytes, before=before, judge=judge, **own)


def trainer_role(model: ModelSizes, trainer: TrainerConfig, counts: Counts) -> Role:
    """State per rank, T = trained parameters, R = ranks: 4T (master) + optimizer + 4T (gradient) [+ 4T EMA], the frozen base
    and the frozen sides over R, and one gathered block. Left out: activations, which gradient checkpointing changes.
    """
    shard = (_kept_bytes(trainer) + 4) * counts.trained + counts.frozen_bytes + counts.side_bytes
    nbytes = shard / trainer.ranks + 2 * model.compute_bytes * model.block
    return _role("trainer", "trainer rank", trainer, trainer.ranks, nbytes)


def _kept_bytes(trainer: TrainerConfig) -> int:
    """Per trained parameter: master, optimizer, EMA."""
    return 4 + OPTIMIZER_BYTES[trainer.optimizer] + (4 if trainer.ema_decay is not None else 0)


def sampler_role(model: ModelSizes, samplers: SamplersConfig, *, encodes: bool) -> Role:
    """encodes: conditions are not in a cache, so the text encoders are loaded too."""
    nbytes = model.weights + (model.codec if encodes else model.decoder)
    return _role("sampler", "sampler", samplers, samplers.count, nbytes)


def encoder_role(model: ModelSizes, preprocess: PreprocessConfig, *, before: bool) -> Role:
    """The encoders of `preprocess`, at work before the trainer or beside it."""
    return _role("encoder", "encoder", preprocess, preprocess.encoders, model.codec, before=before)


def judging_role(readers: int = 0) -> Role:
    """The judging actor, and how many tasks at a time read media for it."""
    name, cpus = "judging actor and readers" if readers else "judging actor", JUDGES_CPUS + readers * READER_CPUS
    return Role(kind="judging", name=name, count=1, num_cpus=cpus, num_gpus=0, nbytes=0)


def judge_roles(judges: JudgesConfig, names: Sequence[str], *, before: bool = False) -> list[Role]:
    """The Serve replicas of those judges of `names` that are deployed here, at their most."""
    roles = []
    for name, judge in judges.to_deploy(names).items():
        nbytes = sum(_weight_bytes(Path(path)) for _, path in local_paths(judge))
        count = judge.max_replicas or judge.replicas
        roles.append(_role("judge", f"judge {name}", judge, count, nbytes, before=before, judge=name))
    return roles


def checkpoint_bytes(trainer: TrainerConfig, counts: Counts) -> float:
    """Bytes of one committed checkpoint: masters, optimizer, EMA, frozen sides."""
    return float(counts.trained * _kept_bytes(trainer) + counts.side_bytes)


def export_bytes(trainer: TrainerConfig, counts: Counts, dtype: str) -> float:
    """Bytes of one export: the trained weights and, if they are kept, their average."""
    kinds = 2 if trainer.ema_decay is not None else 1
    return float(counts.trained * kinds * getattr(torch, dtype).itemsize)


def check_shared(key: str, folder: Path, timeout_s: float = 60.0) -> None:
    """Raise Refused unless every node of the cluster sees the folder of recipe `key`: actors on other nodes write there."""

    @ray.remote(num_cpus=0, max_retries=0)
    def sees() -> bool:
        return folder.is_dir()

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = ray.get([sees.options(scheduling_strategy=place).remote() for place in places], timeout=timeout_s)
    blind = [node["NodeManagerHostname"] for node, seen in zip(nodes, answers, strict=True) if not seen]
    if blind:
        raise Refused(f"{key}: {folder} is not visible on {', '.join(blind)}; use a folder shared by all nodes")


def table(needed: Sequence[Role], available: dict[str, float] | None) -> str:
    """Needed by role, and below it the totals against what the cluster has free (unknown in a dry run without one)."""

    def line(name: str, cpus: float, gpus: float, gib: float, count: object = "", each: str = "") -> str:
        return f"{name:<40}{count:>6}{cpus:>8.2f}{gpus:>8.2f}{each:>10}{gib:>10.2f}"

    lines = [f"{'role':<40}{'count':>6}{'CPU':>8}{'GPU':>8}{'GiB each':>10}{'GiB all':>10}"]
    for role in needed:
        name = f"{role.name}{' (before the rest)' if role.before else ''}"
        lines.append(line(name, *totals([role]), role.count, f"{(role.nbytes + OVERHEAD) / GIB:.2f}"))
    if together := [role for role in needed if not role.before]:
        lines.append(line("needed at once", *totals(together)))
    if available is not None:
        free = available.get("memory", 0.0) / GIB
        lines.append(line("free in the cluster", available.get("CPU", 0), available.get("GPU", 0), free))
    return "\n".join(lines)


def totals(needed: Sequence[Role]) -> tuple[float, float, float]:
    """(CPUs, GPUs, GiB) of all roles."""
    nbytes = sum(role.count * (role.nbytes + OVERHEAD) for role in needed)
    return sum(r.count * r.num_cpus for r in needed), sum(r.count * r.num_gpus for r in needed), nbytes / GIB


def check(needed: Sequence[Role], available: dict[str, float]) -> None:
    """Raise NotEnoughResources, with the table, unless CPUs and GPUs of every stage fit now, and the memory of the roles
    without a GPU that run together."""
    together = [role for role in needed if not role.before]
    stages = [totals(together), *(totals([role]) for role in needed if role.before)]
    short = []
    for name, need in (("CPU", max(cpus for cpus, _, _ in stages)), ("GPU", max(gpus for _, gpus, _ in stages))):
        have = available.get(name, 0.0)
        if need > have + 1e-6:
            short.append(f"{need:g} {name} needed, {have:g} free")
    _, _, memory = totals([role for role in together if not role.num_gpus])
    free = available.get("memory", math.inf) / GIB
    if memory > free:
        short.append(f"{memory:.1f} GiB of memory needed, {free:.1f} GiB free")
    if short:
        raise NotEnoughResources(
            f"the cluster is too small: {'; '.join(short)}. Lower num_cpus, num_gpus or the counts of "
            f"the roles below, or add nodes.\n{table(needed, available)}"
        )


def reserve(roles: Sequence[Role], timeout_s: float = 120.0) -> PlacementGroup:
    """A placement group with one bundle for each process of `roles`, in their order. Raises when it is not granted in time."""
    each = [{"CPU": role.num_cpus, "GPU": role.num_gpus} for role in roles for _ in range(role.count)]
    bundles = [{name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001} for bundle in each]
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        raise NotEnoughResources(
            f"no room for {' and '.join(role.name for role in roles)} within {timeout_s:.0f} s, though the totals fit: "
            f"bundles {bundles}; another job may hold the rest"
        )
    return group
