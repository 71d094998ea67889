"""What of a denoiser is trained, and what the frozen sides beside it are: all of it, LoRA adapters, or whole submodules.

A `Trainable` is made of parts, each of which declares its own parameters. `add` prepares a denoiser for the trainer (on the
meta device), for a sampler and for a frozen copy alike, so that all three have the same names. A side is a frozen state of
what is trained, e.g. the reference that preferences are measured against: LoRA and Modules keep a twin of every trained
parameter inside the same network, Full keeps a second network.

A parameter has two names: the one in the denoiser, and the one in publications, checkpoints and optimizer state, which is the
same for every side. Left out: LoRA dropout (rollouts and training must agree), adapters on embeddings that are tied.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.models.folder import LORA_FILE, MODULES_FILE, MODULES_TABLE, WEIGHTS_FILE
from rlhf.tables import TrainableTable
from rlhf.types import POLICY, seed_from


@dataclass(frozen=True, kw_only=True)
class Export:
    """One file of exported weights, and small text files beside it."""

    file: str
    names: Mapping[str, str]
    """Published name → name in the file: what the file holds."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    """File name → text."""


class Part(Protocol):
    """One way to train a denoiser."""

    @property
    def twins(self) -> bool:
        """Whether sides live in the policy's own network; otherwise each is a network of its own."""

    def folder(self, family: Family) -> str:
        """What its exports are called."""

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        """Put what is trained, and a twin for each of `sides`, into the denoiser in `dtype`.

        Raises Refused where the recipe does not fit the denoiser.
        """

    def names(self, denoiser: nn.Module, side: str) -> dict[str, str]:
        """The part's parameters of a side: name in the denoiser → published name."""

    def stored(self, denoiser: nn.Module) -> dict[str, str]:
        """Name in the denoiser → name in a plain checkpoint, for parameters that the part has renamed."""

    def start(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        """The value, fp32 and whole, that a parameter begins with; None: the one in the checkpoint."""

    def activate(self, denoiser: nn.Module, side: str) -> None:
        """Make `side` the one that the denoiser computes with."""

    def export(self, denoiser: nn.Module, family: Family) -> Export:
        """The file of the part's parameters in a trainer's denoiser."""


# --- full --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every parameter. A side is a second network, in the compute dtype: half the memory of the masters."""

    twins: ClassVar[bool] = False

    def folder(self, family: Family) -> str:
        return family.denoiser_folder

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        assert not sides, "full fine-tuning keeps a side in a network of its own"
        _cast(denoiser.parameters(), dtype)

    def names(self, denoiser: nn.Module, side: str) -> dict[str, str]:
        return {name: name for name, _ in denoiser.named_parameters()}

    def stored(self, denoiser: nn.Module) -> dict[str, str]:
        return {}

    def start(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        return None

    def activate(self, denoiser: nn.Module, side: str) -> None:
        pass

    def export(self, denoiser: nn.Module, family: Family) -> Export:
        """The original config: what FSDP's class would save has another `_class_name`."""
        config = (family.denoiser_path / "config.json").read_text()
        return Export(file=WEIGHTS_FILE, names=self.names(denoiser, POLICY), beside={"config.json": config})


# --- LoRA --------------------------------------------------------------------------------------------------------------

ADAPTER = re.compile(r"(\.lora_[AB]\.)([^.]+)\.")
"""In a parameter's name: PEFT's two matrices, and the adapter that they belong to."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """PEFT's adapters, dropout 0, on every layer whose name ends in one of `targets`; a side is one more adapter.

    A second adapter is exact after every refresh. Switching the adapter off is the reference only until the first one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    twins: ClassVar[bool] = True

    def folder(self, family: Family) -> str:
        return "lora"

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        """Layers inside a module that another part trains whole get none."""
        config = PeftConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=list(self.targets),
            **self._left_out(denoiser),
        )
        on_meta = next(denoiser.parameters()).is_meta  # or PEFT draws values that nobody reads: 20 s for 12B
        for adapter in (POLICY, *sides):
            try:
                inject_adapter_in_model(config, denoiser, adapter_name=adapter, low_cpu_mem_usage=on_meta)
            except ValueError as error:  # PEFT's, where no layer matches or one can have no adapter
                raise Refused(f"trainable.targets = {list(self.targets)} does not fit this model: {error}") from error
        _cast((p for name, p in denoiser.named_parameters() if ADAPTER.search(name)), dtype)
        self.activate(denoiser, POLICY)

    def _left_out(self, denoiser: nn.Module) -> dict[str, str]:
        """PEFT's setting that leaves out modules that are trained whole; none where no target is inside one, as it warns."""
        whole = "|".join(rf"{re.escape(name)}(\..*)?" for name in _sided(denoiser))
        inside = any(
            f".{name}".endswith(f".{target}") and re.fullmatch(whole, name)
            for name, _ in denoiser.named_modules()
            for target in self.targets
        )
        return {"exclude_modules": whole} if inside else {}

    def names(self, denoiser: nn.Module, side: str) -> dict[str, str]:
        found = ((name, ADAPTER.search(name)) for name, _ in denoiser.named_parameters())
        return {name: _of_policy(name) for name, match in found if match and match[2] == side}

    def stored(self, denoiser: nn.Module) -> dict[str, str]:
        """PEFT wraps an adapted layer in `base_layer`."""
        renamed = ((name, name.replace(".base_layer.", ".")) for name, _ in denoiser.named_parameters())
        return {name: plain for name, plain in renamed if plain != name}

    def start(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        """A uniform in ±1/sqrt(in) (PEFT's Kaiming choice), B zero; every side begins with the policy's values."""
        if not ADAPTER.search(name):
            return None
        if ".lora_B." in name:
            return torch.zeros(tuple(shape))
        generator = torch.Generator().manual_seed(seed_from(seed, _of_policy(name)))
        return torch.empty(tuple(shape)).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])

    def activate(self, denoiser: nn.Module, side: str) -> None:
        """PEFT's own `set_adapter` also flips `requires_grad`, which FSDP reads only once and the optimizer never expects."""
        for module in denoiser.modules():
            if isinstance(module, LoraLayer):
                module._active_adapter = [side]

    def export(self, denoiser: nn.Module, family: Family) -> Export:
        """A LoRA file of diffusers. Without rank and alpha in its header diffusers would take alpha = rank."""
        prefix = family.lora_prefix
        values = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": sorted(self.targets),
            **self._left_out(denoiser),
        }
        names = self.names(denoiser, POLICY).values()
        return Export(
            file=LORA_FILE,
            names={name: f"{prefix}.{name.replace(f'.{POLICY}.', '.')}" for name in names},
            metadata={"lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in values.items()})},
        )


def _of_policy(name: str) -> str:
    return ADAPTER.sub(rf"\1{POLICY}.", name)


# --- modules -----------------------------------------------------------------------------------------------------------


class Sided(nn.Module):
    """A module and a copy of it per side; calls and attributes go to the active one."""

    def __init__(self, policy: nn.Module, sides: Sequence[str]):
        super().__init__()
        self.policy = policy
        for side in sides:
            self.add_module(side, copy.deepcopy(policy))
        self.active = POLICY

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self._modules[self.active](*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_modules", "active"):  # not yet there, while a copy is made
                raise
            return getattr(self._modules[self.active], name)


def _sided(denoiser: nn.Module) -> dict[str, Sided]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, Sided)}


LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Who holds one of these may index it, so its members are wrapped and not the list."""


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Whole submodules whose dotted name matches a glob pattern, e.g. `transformer_blocks.*.attn2` (`*` matches dots too)."""

    patterns: tuple[str, ...]
    twins: ClassVar[bool] = True

    def folder(self, family: Family) -> str:
        return "modules"

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        for name in self._matching(denoiser):
            parent, _, leaf = name.rpartition(".")
            module = denoiser.get_submodule(name)
            _cast(module.parameters(), dtype)
            setattr(denoiser.get_submodule(parent), leaf, Sided(module, sides))

    def _matching(self, denoiser: nn.Module) -> list[str]:
        """Names of the outermost modules that match and have parameters. Raises Refused for a pattern without any."""
        found: list[str] = []
        unused = set(self.patterns)
        for name, module in denoiser.named_modules():
            matching = {pattern for pattern in self.patterns if name and fnmatchcase(name, pattern)}
            if not matching or next(module.parameters(), None) is None:
                continue
            unused -= matching
            if not any(f"{name}.".startswith(f"{outer}.") for outer in found):
                found.append(name)
        if unused:
            tops = ", ".join(name for name, _ in denoiser.named_children())
            raise Refused(
                f"trainable.patterns: {', '.join(map(repr, sorted(unused)))} matches no module with parameters; a pattern is "
                f"compared with whole dotted names, which begin with {tops}"
            )
        return [inner for name in found for inner in _without_lists(name, denoiser.get_submodule(name))]

    def names(self, denoiser: nn.Module, side: str) -> dict[str, str]:
        return {
            f"{prefix}.{side}.{name}": f"{prefix}.{name}"
            for prefix, sided in _sided(denoiser).items()
            if side in sided._modules
            for name, _ in sided.get_submodule(side).named_parameters()
        }

    def stored(self, denoiser: nn.Module) -> dict[str, str]:
        sides = {side for sided in _sided(denoiser).values() for side in sided._modules}
        return {name: plain for side in sides for name, plain in self.names(denoiser, side).items()}

    def start(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        return None

    def activate(self, denoiser: nn.Module, side: str) -> None:
        for sided in _sided(denoiser).values():
            sided.active = side

    def export(self, denoiser: nn.Module, family: Family) -> Export:
        """Plain names, as in the denoiser's own checkpoint: `rlhf.models.folder.load_modules` reads it."""
        table = json.dumps({"patterns": list(self.patterns)}, indent=1)
        names = self.names(denoiser, POLICY).values()
        return Export(file=MODULES_FILE, names={name: name for name in names}, beside={MODULES_TABLE: table})


def _without_lists(name: str, module: nn.Module) -> Iterator[str]:
    """`name`, or its members with parameters where it is a list."""
    if not isinstance(module, LISTS):
        yield name
        return
    for leaf, member in module.named_children():
        if next(member.parameters(), None) is not None:
            yield from _without_lists(f"{name}.{leaf}", member)


# --- together ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sizes of a trainable on one model."""

    trained: int
    """Parameters."""
    frozen_bytes: int
    """Of the base in the policy's network, in the compute dtype."""
    side_bytes: int
    """Of all sides together."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """The parts that are trained together."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != 1 and any(not part.twins for part in self.parts):
            raise ValueError("Full trains every parameter: it goes with no other part")

    @property
    def twins(self) -> bool:
        """Whether sides live in the policy's own network."""
        return all(part.twins for part in self.parts)

    def folder(self, family: Family) -> str:
        """What exports are called: `transformer`, `lora`, `lora_modules`."""
        return "_".join(part.folder(family) for part in self.parts)

    def add(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        """Prepare a denoiser on any device: what is trained, in `dtype` (fp32 to train), a gradient for it alone, and twins.

        `family.finish` comes after it. Raises Refused where the recipe does not fit the denoiser.
        """
        # LoRA last: it leaves out what another part trains whole, and PEFT changes requires_grad of everything.
        for part in sorted(self.parts, key=lambda part: isinstance(part, LoRA)):
            part.attach(denoiser, sides if self.twins else (), dtype)
        trained = self._names(denoiser, POLICY)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in trained)

    def _names(self, denoiser: nn.Module, side: str) -> dict[str, str]:
        return {name: published for part in self.parts for name, published in part.names(denoiser, side).items()}

    def trained(self, denoiser: nn.Module, side: str = POLICY) -> dict[str, nn.Parameter]:
        """The parameters of a side by published name, in the denoiser's order: what a publication must cover."""
        names = self._names(denoiser, side)
        return {names[name]: parameter for name, parameter in denoiser.named_parameters() if name in names}

    def stored(self, denoiser: nn.Module) -> dict[str, str]:
        """Name in the denoiser → name in a plain checkpoint, for every parameter."""
        names = {name: name for name, _ in denoiser.named_parameters()}
        return names | {name: plain for part in self.parts for name, plain in part.stored(denoiser).items()}

    def start(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        """The value, fp32 and whole, that a parameter begins with; None: the one in the checkpoint."""
        starts = (part.start(name, shape, seed) for part in self.parts)
        return next((start for start in starts if start is not None), None)

    @contextmanager
    def using(self, denoiser: nn.Module, side: str) -> Iterator[None]:
        """Compute with `side` inside the block and with the policy after it."""
        self._activate(denoiser, side)
        try:
            yield
        finally:
            self._activate(denoiser, POLICY)

    def _activate(self, denoiser: nn.Module, side: str) -> None:
        for part in self.parts:
            part.activate(denoiser, side)

    def exports(self, denoiser: nn.Module, family: Family) -> list[Export]:
        """A file per part."""
        return [part.export(denoiser, family) for part in self.parts]

    def counts(self, family: Family, sides: Sequence[str]) -> Counts:
        """What a trainer of the family's model holds, without loading anything."""
        denoiser = family.empty_denoiser(family.dtype)
        whole = sum(p.numel() for p in denoiser.parameters()) * family.dtype.itemsize
        self.add(denoiser, sides, torch.float32)
        trained = self.trained(denoiser).values()
        twins = [p for side in sides for p in self.trained(denoiser, side).values()] if self.twins else []
        return Counts(
            trained=sum(p.numel() for p in trained),
            frozen_bytes=_nbytes(denoiser.parameters()) - _nbytes(trained) - _nbytes(twins),
            side_bytes=_nbytes(twins) if self.twins else len(sides) * whole,
        )


def load_for_sampling(family: Family, trainable: Trainable, device: str) -> nn.Module:
    """The family's denoiser, whole and frozen, with everything that a publication covers, in the compute dtype."""
    denoiser = family.load_denoiser(device)
    trainable.add(denoiser, (), family.dtype)
    family.finish(denoiser, device)
    return denoiser.to(device).eval().requires_grad_(False)


def _cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Parameters alone: a module's `to` would also round its buffers."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- from a recipe -----------------------------------------------------------------------------------------------------


def _lora(table: TrainableTable, family: Family) -> LoRA:
    assert table.rank is not None and table.alpha is not None
    return LoRA(rank=table.rank, alpha=table.alpha, targets=tuple(table.targets or family.lora_targets))


def _modules(table: TrainableTable) -> tuple[Modules, ...]:
    return (Modules(patterns=table.patterns),) if table.patterns else ()


KINDS: Mapping[str, Callable[[TrainableTable, Family], Trainable]] = {
    "full": lambda table, family: Trainable(parts=(Full(),)),
    "lora": lambda table, family: Trainable(parts=(_lora(table, family), *_modules(table))),
    "modules": lambda table, family: Trainable(parts=_modules(table)),
}


def load_trainable(table: TrainableTable, family: Family) -> Trainable:
    """What a recipe's `[trainable]` means for a family."""
    return KINDS[table.kind](table, family)
