"""Whether every role fits its card: peaks by kind, the margin, and what to lower first, told before anything starts.

A peak is traced (`rlhf.models.memory`, `rlhf.training.memory`) for roles that have a GPU. Remedies are worked out from the same
trace. Left out: what Ray places beside what; roles with a part of a card are taken to share as few cards as hold their parts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from actors.placement import GIB, NotEnoughResources, Role
from rlhf.models.memory import Peak
from rlhf.section import ClusterConfig
from rlhf.training_tables import TrainerConfig

RESERVE = 1.5 * GIB
"""Of a process on a card: CUDA's context, NCCL's buffers, workspaces and fragmentation."""
USABLE = 0.985
"""Share of a card's nominal memory that torch sees: an H100 of 80 GB has 79.2 GiB, and a little of it is not to be had."""
TFLOPS, UTILISATION = 990e12, 0.4
"""Of an H100 in bf16, dense; the share of it that hours are worked out with."""
SHARDED = ("parameters", "gradients", "optimizer", "frozen sides", "average")
PER_EXAMPLE = ("activations", "temporaries")


Remedy = tuple[str, Peak | None]
"""What to set, and the peak that it would give; None: a trace of this recipe does not tell."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A role that needs memory of a card, and the key to lower where it does not fit."""

    role: Role
    peak: Peak
    remedies: Sequence[Remedy] = ()
    """The cheapest first."""


def card_bytes(cluster: ClusterConfig) -> float | None:
    """Memory of one card that torch can use: of `cluster.card`, else of this machine's; None where neither is known."""
    if cluster.card:
        return float(cluster.card.removesuffix("GB")) * GIB * USABLE
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def trainer_remedies(config: TrainerConfig, peak: Peak) -> Iterator[Remedy]:
    """What lowers a trainer rank's peak, the cheapest first."""

    def changed(what: str, **kinds: float) -> Remedy:
        return what, replace(peak, kinds={**peak.kinds, **{name: round(value) for name, value in kinds.items()}})

    def scaled(names: Sequence[str], factor: float) -> dict[str, float]:
        return {name: peak.kinds[name] * factor for name in names if name in peak.kinds}

    in_memory = config.optimizer == "adamw" and not config.offloads("optimizer")
    average, sides = peak.kinds.get("average", 0), peak.kinds.get("frozen sides", 0)
    if average:
        yield changed('trainer.offload = "ema"', average=0)
    if sides:
        yield changed('trainer.offload = "reference"', **scaled(("average", "frozen sides"), 0))
    if in_memory:
        yield changed('trainer.optimizer = "adamw_8bit"', optimizer=peak.kinds["optimizer"] / 4)
    if config.train_batch_size > 1:
        half = config.train_batch_size // 2
        what = (
            f"trainer.train_batch_size = {half} and {'twice' if half * 2 == config.train_batch_size else 'more'} the "
        )
        yield changed(f"{what}gradient_accumulation_steps", **scaled(PER_EXAMPLE, half / config.train_batch_size))
    if config.gradient_checkpointing != "all":
        yield 'trainer.gradient_checkpointing = "all"', None
    if in_memory:
        yield changed('trainer.offload = "optimizer"', **scaled(SHARDED, 0))
    yield changed(f"trainer.ranks = {2 * config.ranks}", **scaled(SHARDED, 0.5))


def batch_remedies(key: str, size: int, peak: Peak) -> Iterator[Remedy]:
    """What lowers the peak of a role whose batch `key` is of this size."""
    if size > 1:
        kinds = {**peak.kinds, "activations": round(peak.kinds["activations"] * (size // 2) / size)}
        yield f"{key} = {size // 2}", replace(peak, kinds=kinds)


def table(shares: Sequence[Share], card: float | None) -> str:
    """Of every role its peak by kind in GiB, and the margin to its part of a card."""
    kinds = dict.fromkeys(kind for share in shares for kind in share.peak.kinds)
    names = [share.role.name for share in shares]

    def line(head: str, values: Sequence[float | None]) -> str:
        return f"{head:<24}" + "".join(
            f"{'' if v is None else f'{v / GIB:.1f}':>{max(12, len(n) + 2)}}"
            for v, n in zip(values, names, strict=True)
        )

    head = f"{'peak, GiB':<24}" + "".join(f"{name:>{max(12, len(name) + 2)}}" for name in names)
    lines = [head, *(line(kind, [share.peak.kinds.get(kind) for share in shares]) for kind in kinds)]
    lines.append(line("one process", [share.peak.nbytes for share in shares]))
    parts, cards, need = _sharing(shares)
    if parts:
        lines.append(
            f"{len(parts)} roles share {cards} card{'s' if cards > 1 else ''}: {need / GIB:.1f} GiB with reserves"
        )
    if card is None:
        lines.append('the card is not known: give its memory, e.g. cluster.card = "80GB", to see whether this fits')
    else:
        room = [min(share.role.num_gpus, 1.0) * card - RESERVE for share in shares]
        lines.append(line("its part of a card", room))
        lines.append(line("to spare", [part - share.peak.nbytes for part, share in zip(room, shares, strict=True)]))
    return "\n".join(lines)


def check(shares: Sequence[Share], card: float | None) -> None:
    """Raise NotEnoughResources where a role that has a whole card does not fit it, or those that share cards do not together."""
    if card is None:
        return
    faults = [_fault(share, card) for share in shares if share.role.num_gpus >= 1]
    parts, cards, need = _sharing(shares)
    if need > cards * card:
        each = ", ".join(f"{share.role.name} {share.peak.nbytes / GIB:.1f}" for share in parts)
        faults.append(
            f"roles that share {cards} card{'s' if cards > 1 else ''} need {need / GIB:.1f} GiB of {cards * card / GIB:.1f} "
            f"({each}, and {RESERVE / GIB:g} for each process){_lower([r for s in parts for r in s.remedies])}"
        )
    if found := [fault for fault in faults if fault]:
        raise NotEnoughResources("\n".join(found))


def _sharing(shares: Sequence[Share]) -> tuple[list[Share], int, float]:
    """The roles with a part of a card that run together, the cards that hold their parts, and the bytes that they need."""
    parts = [share for share in shares if 0 < share.role.num_gpus < 1 and not share.role.before]
    cards = math.ceil(sum(share.role.count * share.role.num_gpus for share in parts) - 1e-6)
    return parts, cards, sum(share.role.count * (share.peak.nbytes + RESERVE) for share in parts)


def _fault(share: Share, card: float) -> str:
    room = card - RESERVE
    if share.peak.nbytes <= room:
        return ""
    fitting = [(what, peak) for what, peak in share.remedies if peak is None or peak.nbytes <= room]
    return (
        f"a {share.role.name} needs {share.peak.nbytes / GIB:.1f} GiB at its peak, a card of {card / GIB:.1f} GiB has "
        f"{room / GIB:.1f} to give{_lower(fitting or share.remedies)}"
    )


def _lower(remedies: Sequence[Remedy]) -> str:
    told = "; or ".join(f"{what} ({peak.nbytes / GIB:.1f} GiB)" if peak else what for what, peak in remedies[:2])
    return f": set {told}" if told else ""


def seconds(flops: float, processes: int) -> float:
    """What operations take that processes share, each at the stated part of an H100's speed."""
    return flops / (TFLOPS * UTILISATION * processes)


def hours(steps: int, parts: Mapping[str, float]) -> str:
    """How long a run takes, from the seconds of a step's parts, which wait for each other."""
    each = ", ".join(f"{name} {value:.0f} s" for name, value in parts.items())
    return (
        f"about {sum(parts.values()) * steps / 3600:.0f} h for {steps} steps on cards like an H100 at "
        f"{UTILISATION:.0%} of {TFLOPS / 1e12:.0f} TFLOP/s (a step: {each}); judges and transfers are not counted"
    )
