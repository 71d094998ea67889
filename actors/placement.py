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

from rlhf.config import OnlineDPOConfig
from rlhf.models import FAMILIES
from rlhf.rewards.config import JudgesConfig
from rlhf.section import local_paths

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


ENCODER = "encoder (preprocess, before the rest)"


class NotEnoughResources(RuntimeError):
    """The cluster cannot hold the run; the message is a table."""


def _folder_bytes(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def _judge_bytes(path: str) -> float:
    if not Path(path).exists():
        return 0.0
    return float(Path(path).stat().st_size) if Path(path).is_file() else _folder_bytes(Path(path))


def roles(config: OnlineDPOConfig) -> list[Role]:
    """What a run needs beside its driver.

    Trainer state per rank, N = parameters, R = ranks: full fine-tuning 4N (master) + 8N (Adam) + 4N (gradient) + 2N
    (reference) [+ 4N EMA] over R, and one gathered block; LoRA: the bf16 base over R. Activations are not counted: they
    depend on the picture size and on gradient checkpointing.
    """
    trainer = config.trainer
    dtype_bytes = 2 if trainer.mixed_precision == "bf16" else 4
    family = FAMILIES[config.model.family](path=Path(config.model.path), dtype=torch.bfloat16)
    denoiser = family.empty_denoiser(torch.bfloat16)
    count = sum(p.numel() for p in denoiser.parameters())
    block = max(sum(p.numel() for p in m.parameters()) for m in denoiser.modules() if isinstance(m, family.blocks))
    ema = 4 if trainer.ema_decay is not None else 0
    if trainer.lora:
        adapter = adapter_parameters(denoiser, trainer.lora.rank, trainer.lora.targets or family.lora_targets)
        shard = (dtype_bytes * count + (4 + 8 + 4 + 4 + ema) * adapter) / trainer.ranks
    else:
        shard = (4 + 8 + 4 + dtype_bytes + ema) * count / trainer.ranks
    vae = _folder_bytes(Path(config.model.path) / "vae")
    encoders = sum(_folder_bytes(Path(config.model.path) / folder) for folder in family.text_folders)
    samplers, preprocess = config.samplers, config.preprocess
    found = [
        Role(
            name="trainer rank",
            count=trainer.ranks,
            num_cpus=trainer.num_cpus,
            num_gpus=trainer.num_gpus,
            nbytes=shard + 2 * dtype_bytes * block,
        ),
        Role(
            name="sampler",
            count=samplers.count,
            num_cpus=samplers.num_cpus,
            num_gpus=samplers.num_gpus,
            nbytes=dtype_bytes * count + vae,
        ),
        Role(
            name=ENCODER,
            count=preprocess.encoders,
            num_cpus=preprocess.num_cpus,
            num_gpus=preprocess.num_gpus,
            nbytes=encoders + vae,
        ),
        Role(name="judges", count=1, num_cpus=JUDGES_CPUS, num_gpus=0, nbytes=0),
    ]
    return found + judge_roles(config.judges, config.judge_names)


JUDGES_CPUS = 0.05


def judge_roles(judges: JudgesConfig, names: Sequence[str]) -> list[Role]:
    """The Serve replicas of those judges of `names` that are deployed here, at their most."""
    return [
        Role(
            name=f"judge {name}",
            count=judge.most_replicas,
            num_cpus=judge.num_cpus,
            num_gpus=judge.num_gpus,
            nbytes=sum(_judge_bytes(path) for _, path in local_paths(judge)),
        )
        for name, judge in judges.to_deploy(names).items()
    ]


def checkpoint_bytes(config: OnlineDPOConfig) -> float:
    """Bytes of one committed checkpoint with its export: masters, two moments, reference, EMA, and loadable weights."""
    family = FAMILIES[config.model.family](path=Path(config.model.path), dtype=torch.bfloat16)
    denoiser = family.empty_denoiser(torch.bfloat16)
    trainer = config.trainer
    if trainer.lora:
        count = adapter_parameters(denoiser, trainer.lora.rank, trainer.lora.targets or family.lora_targets)
    else:
        count = sum(p.numel() for p in denoiser.parameters())
    ema = 4 + 2 if trainer.ema_decay is not None else 0  # its masters and its export
    compute = 2 if trainer.mixed_precision == "bf16" else 4
    reference = 4 if trainer.lora else compute
    return float(count * (4 + 8 + reference + compute + ema))


def check_shared(folder: Path, timeout_s: float = 60.0) -> None:
    """Raise ValueError unless every node of the cluster sees `folder`: ranks on other nodes write into it."""
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
        raise ValueError(f"run.dir: {folder} is not visible on {', '.join(blind)}; use a folder shared by all nodes")


def adapter_parameters(denoiser: torch.nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Parameters of one LoRA adapter: rank · (in + out) for every linear layer whose name ends in a target."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    )


def at_once(needed: Sequence[Role]) -> list[Role]:
    """The roles that run at the same time: preprocessing is over before the rest starts."""
    return [role for role in needed if role.name != ENCODER]


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
    before = totals([role for role in needed if role.name == ENCODER])
    cpus, gpus = (max(pair) for pair in zip(totals(together), before, strict=True))
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
            f"[trainer], [samplers] or [judges], or add nodes.\n{table(needed, available)}"
        )


def reserve(config: OnlineDPOConfig, timeout_s: float = 120.0) -> PlacementGroup:
    """A placement group with one bundle per trainer rank, then one per sampler. Raises when it is not granted in time."""
    trainer, samplers = config.trainer, config.samplers
    bundles = [{"CPU": trainer.num_cpus, "GPU": trainer.num_gpus}] * trainer.ranks
    bundles += [{"CPU": samplers.num_cpus, "GPU": samplers.num_gpus}] * samplers.count
    bundles = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        raise NotEnoughResources(
            f"no room for trainer and samplers within {timeout_s:.0f} s, though the totals fit: bundles {bundles}; "
            "another job may hold the rest"
        )
    return group
