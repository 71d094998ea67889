"""What of a denoiser is trained, and what the frozen sides beside it are: all of it, LoRA adapters, or whole submodules.

`Trainable.add` prepares a denoiser for the trainer (on the meta device), for a sampler and for a frozen copy alike, so that
all three have the same names. A side is a frozen state of what is trained, e.g. the reference that preferences are measured
against: LoRA and Modules keep a twin of every trained parameter inside the same network, Full keeps a second network.

A parameter has two names: the one in the denoiser, and the one in publications, checkpoints and optimizer state, which is the
same for every side. Left out: LoRA dropout (rollouts and training must agree), adapters on embeddings that are tied.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.errors import Refused
from rlhf.models.family import Family
from rlhf.models.folder import WEIGHTS_FILE
from rlhf.models.lora import LORA_FILE, MODULES_FILE, MODULES_TABLE, is_modules, read_lora, read_modules
from rlhf.training_tables import TrainableTable
from rlhf.types import POLICY, seed_from


@dataclass(frozen=True, kw_only=True)
class Export:
    """One file of exported weights (`names`: published name → name in it), and small text files `beside` it, by name."""

    file: str
    names: Mapping[str, str]
    scales: Mapping[str, float] = field(default_factory=dict)
    """Published name → what its values are multiplied by in the file; absent: 1."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)


DOWN = "lora_A.weight"
ADAPTER, COPY = re.compile(r"(\.lora_[AB]\.)([^.]+)\."), re.compile(r"\.sided\.([^.]+)\.")
"""In a parameter's name: PEFT's two matrices, or a copy inside a `Sided`, and the side that it belongs to."""


def owner(name: str) -> tuple[str | None, str]:
    """Of a parameter's name in the denoiser: its side (None: the frozen base), and its name in files and publications."""
    if adapter := ADAPTER.search(name):
        return adapter[2], ADAPTER.sub(rf"\1{POLICY}.", name)
    if copied := COPY.search(name):
        return copied[1], COPY.sub(".", name)
    return None, name.replace(".base_layer.", ".")  # which PEFT puts around an adapted layer


class Part(Protocol):
    """One way to train a denoiser."""

    label: ClassVar[str | None] = None
    """What its exports are called; None: like the denoiser's own folder."""
    twins: ClassVar[bool] = True
    """Whether sides live in the policy's own network; otherwise each is a network of its own."""

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        """Put what is trained, and a twin for each of `sides`, into the denoiser. Raises Refused where it does not fit."""

    def export(self, denoiser: nn.Module, trained: Iterable[str], family: Family) -> Export:
        """The file of the part's own among the `trained` parameters, published names of a trainer's denoiser."""


@dataclass(frozen=True, kw_only=True)
class Full(Part):
    """Every parameter. A side is a second network, in the compute dtype: half the memory of the masters."""

    twins: ClassVar[bool] = False

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        _cast(denoiser.parameters(), dtype)

    def export(self, denoiser: nn.Module, trained: Iterable[str], family: Family) -> Export:
        """The original config: what FSDP's class would save has another `_class_name`."""
        config = (family.denoiser_path / "config.json").read_text()
        return Export(file=WEIGHTS_FILE, names={name: name for name in trained}, beside={"config.json": config})


@dataclass(frozen=True, kw_only=True)
class LoRA(Part):
    """PEFT's adapters, dropout 0, on every layer whose name ends in one of `targets`; a side is one more adapter.

    A second adapter is exact after every refresh. Switching the adapter off is the reference only until the first one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    init: str = "kaiming"
    begin: Path | None = None
    """A LoRA whose adapters are trained further."""
    label: ClassVar[str | None] = "lora"

    def begun(self, family: Family) -> dict[str, Tensor]:
        """The adapters of `begin`, fp32, as LAYER.lora_A.weight and lora_B. Raises Refused where they are not this LoRA's."""
        if self.begin is None:
            return {}
        file, prefix = f"trainable.start = {str(self.begin)!r}", f"{family.denoiser_folder}."
        if (self.begin / MODULES_FILE).is_file() and not is_modules(self.begin):
            raise Refused(
                f"{file} holds whole modules beside its LoRA, which are not read here: give the LoRA of another run"
            )
        read = read_lora(family.empty_denoiser(torch.float32), self.begin, family.denoiser_folder)
        tensors = {key.removeprefix(prefix): tensor.float() for key, tensor in read.items()}
        ranks = {key.removesuffix(f".{DOWN}"): len(tensor) for key, tensor in tensors.items() if key.endswith(DOWN)}
        endings = tuple(f".{target}" for target in self.targets)
        if others := [layer for layer in ranks if not f".{layer}".endswith(endings)]:
            what = f"adapts {len(others)} layers that trainable.targets do not name, the first is {others[0]}"
            raise Refused(f"{file} {what}: add their endings to trainable.targets")
        if (found := sorted(set(ranks.values()))) != [self.rank]:
            remedy = "set it to the file's" if len(found) == 1 else "its layers must be of one rank"
            raise Refused(
                f"{file} is of rank {' and '.join(map(str, found))}, but trainable.rank = {self.rank}: {remedy}"
            )
        # In the file alpha is the rank; here alpha / rank is multiplied in at every step.
        return {
            key: tensor if key.endswith(DOWN) else tensor * (self.rank / self.alpha) for key, tensor in tensors.items()
        }

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a side is one more adapter
        names = [COPY.sub(".", f".{name}") for name, _ in denoiser.named_modules()]
        if unused := [target for target in self.targets if not any(name.endswith(f".{target}") for name in names)]:
            raise Refused(f"trainable.targets: no layer's name ends in {', '.join(map(repr, unused))}; leave it out")
        config = PeftConfig(lora_dropout=0.0, **self._settings(denoiser))
        on_meta = next(denoiser.parameters()).is_meta  # or PEFT draws values that nobody reads: 20 s for 12B
        for adapter in (POLICY, *sides):
            try:
                inject_adapter_in_model(config, denoiser, adapter_name=adapter, low_cpu_mem_usage=on_meta)
            except ValueError as error:  # PEFT's, where no layer matches or one can have no adapter
                raise Refused(f"trainable.targets = {list(self.targets)} does not fit this model: {error}") from error
        _cast((p for name, p in denoiser.named_parameters() if ADAPTER.search(name)), dtype)
        _activate(denoiser, POLICY)

    def _settings(self, denoiser: nn.Module) -> dict[str, Any]:
        """PEFT's. Modules that are trained whole are excluded where a target lies inside: of others PEFT would warn."""
        settings = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": sorted(self.targets)}
        modules = dict(denoiser.named_modules())
        whole = "|".join(rf"{re.escape(name)}(\..*)?" for name, module in modules.items() if isinstance(module, Sided))
        endings = tuple(f".{target}" for target in self.targets)
        inside = any(f".{name}".endswith(endings) and re.fullmatch(whole, name) for name in modules)
        return settings | ({"exclude_modules": whole} if inside else {})

    def export(self, denoiser: nn.Module, trained: Iterable[str], family: Family) -> Export:
        """A LoRA file of diffusers in which alpha = rank: alpha / rank is in lora_B.

        Programs look for alpha in different places (diffusers in the header, ComfyUI in NAME.alpha tensors, which diffusers
        refuses beside it), and whoever finds none takes alpha = rank. So all of them apply the same adapter.
        """
        prefix = family.denoiser_folder
        names = {name: f"{prefix}.{name.replace(f'.{POLICY}.', '.')}" for name in trained if ADAPTER.search(name)}
        settings = {f"{prefix}.{key}": value for key, value in self._settings(denoiser).items()}
        settings[f"{prefix}.lora_alpha"] = self.rank
        return Export(
            file=LORA_FILE,
            names=names,
            scales={name: self.alpha / self.rank for name in names if ".lora_B." in name},
            metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(settings)},
        )


class Sided(nn.Module):
    """A module and a copy of it per side; calls and attributes go to the active one."""

    def __init__(self, policy: nn.Module, sides: Sequence[str]):
        super().__init__()
        self.sided = nn.ModuleDict({POLICY: policy} | {side: copy.deepcopy(policy) for side in sides})
        self.active = POLICY

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.sided[self.active](*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("sided", "active"):  # not yet there, while a copy is made
                raise
            return getattr(self.sided[self.active], name)


def _activate(denoiser: nn.Module, side: str) -> None:
    """PEFT's own `set_adapter` also flips `requires_grad`, which FSDP reads only once and the optimizer never expects."""
    for module in denoiser.modules():
        if isinstance(module, Sided):
            module.active = side
        elif isinstance(module, LoraLayer):
            module._active_adapter = [side]


@dataclass(frozen=True, kw_only=True)
class Modules(Part):
    """Whole submodules whose dotted name matches a glob pattern, e.g. `transformer_blocks.*.attn2` (`*` matches dots too)."""

    patterns: tuple[str, ...]
    begin: Path | None = None
    """A folder of such modules that are trained further."""
    label: ClassVar[str | None] = "modules"

    def begun(self, family: Family) -> dict[str, Tensor]:
        """The parameters in `begin`, fp32, by published name. Raises Refused where they are not those of these modules."""
        if self.begin is None:
            return {}
        given = f"trainable.start = {str(self.begin)!r}"
        if not is_modules(self.begin):
            remedy = f"give a folder with {MODULES_FILE} and {MODULES_TABLE}, e.g. RUN/final/modules"
            raise Refused(
                f"{given} is no folder of modules alone: {remedy}; a .pt file is written anew under their names"
            )
        empty = family.empty_denoiser(torch.float32)
        read = read_modules(empty, self.begin)
        chosen = {name for name in self._matching(empty)}
        mine = {name for name, _ in empty.named_parameters() if any(name.startswith(f"{one}.") for one in chosen)}
        if differing := mine ^ read.keys():
            what = f"holds {len(read)} tensors, and trainable.patterns choose {len(mine)}: {min(differing)} is of one alone"
            raise Refused(f"{given} {what}; give the patterns of its {MODULES_TABLE}")
        return {name: tensor.float() for name, tensor in read.items()}

    def attach(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        for name in self._matching(denoiser):
            parent, _, leaf = name.rpartition(".")
            module = denoiser.get_submodule(name)
            _cast(module.parameters(), dtype)
            setattr(denoiser.get_submodule(parent), leaf, Sided(module, sides))

    def _matching(self, denoiser: nn.Module) -> list[str]:
        """Names of the outermost modules that match and have parameters. Raises Refused for a pattern without any."""
        found: list[str] = []
        lists: set[str] = set()  # indexed by their owners, so their members are wrapped instead
        unused = set(self.patterns)
        for name, module in denoiser.named_modules():
            matching = {pattern for pattern in self.patterns if name and fnmatchcase(name, pattern)}
            chosen = matching or name.rpartition(".")[0] in lists
            if not chosen or next(module.parameters(), None) is None:
                continue
            unused -= matching
            if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                lists.add(name)
            elif not any(name.startswith(f"{outer}.") for outer in found):
                found.append(name)
        if unused:
            tops = ", ".join(name for name, _ in denoiser.named_children())
            raise Refused(
                f"trainable.patterns: {', '.join(map(repr, sorted(unused)))} matches no module with parameters; a pattern is "
                f"compared with whole dotted names, which begin with {tops}"
            )
        return found

    def export(self, denoiser: nn.Module, trained: Iterable[str], family: Family) -> Export:
        """Plain names, as in the denoiser's own checkpoint: `rlhf.models.lora.load_modules` reads it."""
        table = json.dumps({"patterns": list(self.patterns)}, indent=1)
        names = {name: name for name in trained if not ADAPTER.search(name)}
        return Export(file=MODULES_FILE, names=names, beside={MODULES_TABLE: table})


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Trained parameters; bytes of the base in the policy's network, in the compute dtype; bytes of all sides together."""

    trained: int
    frozen_bytes: int
    side_bytes: int


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """The parts that are trained together."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != 1 and any(not part.twins for part in self.parts):
            raise ValueError("Full trains every parameter: it goes with no other part")

    @property
    def twins(self) -> bool:
        return all(part.twins for part in self.parts)

    def folder(self, family: Family) -> str:
        """What exports are called: `transformer`, `lora`, `lora_modules`."""
        return "_".join(part.label or family.denoiser_folder for part in self.parts)

    def add(self, denoiser: nn.Module, sides: Sequence[str], dtype: torch.dtype) -> None:
        """Prepare a denoiser, before `family.finish`: attach the parts in `dtype`, and leave a gradient to what is trained."""
        # LoRA last: it leaves out what another part trains whole, and PEFT changes requires_grad of everything.
        for part in sorted(self.parts, key=lambda part: isinstance(part, LoRA)):
            part.attach(denoiser, sides if self.twins else (), dtype)
        denoiser.requires_grad_(False)
        for parameter in self.trained(denoiser).values():
            parameter.requires_grad_(True)

    def trained(self, denoiser: nn.Module, side: str = POLICY) -> dict[str, nn.Parameter]:
        """The parameters of a side by published name, in the denoiser's order: what a publication must cover."""
        named = ((*owner(name), parameter) for name, parameter in denoiser.named_parameters())
        return {name: parameter for whose, name, parameter in named if whose == side or not self.twins}

    def start(self, name: str, shape: Sequence[int], seed: int, begun: Mapping[str, Tensor]) -> Tensor | None:
        """What a trained parameter begins with on every side, fp32 and whole: its values in `begun` or, of a new adapter, A as
        `trainable.init` says and B zero.

        None: the parameter is in the checkpoint.
        """
        if not ADAPTER.search(name):
            return begun.get(owner(name)[1])
        if (key := ADAPTER.sub(r"\1", name)) in begun:
            return begun[key]
        if ".lora_B." in name:
            return torch.zeros(tuple(shape))
        generator = torch.Generator().manual_seed(seed_from(seed, owner(name)[1]))
        if any(isinstance(part, LoRA) and part.init == "gaussian" for part in self.parts):
            return torch.empty(tuple(shape)).normal_(generator=generator) / shape[0]
        return torch.empty(tuple(shape)).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])

    def begun(self, family: Family) -> dict[str, Tensor]:
        """What a file gives to begin with, see `LoRA.begun` and `Modules.begun`. Raises Refused."""
        beginners = [part for part in self.parts if isinstance(part, LoRA | Modules)]
        return {key: value for part in beginners for key, value in part.begun(family).items()}

    @contextmanager
    def using(self, denoiser: nn.Module, side: str) -> Iterator[None]:
        """Compute with `side` inside the block and with the policy after it."""
        _activate(denoiser, side)
        try:
            yield
        finally:
            _activate(denoiser, POLICY)

    def counts(self, family: Family, sides: Sequence[str]) -> Counts:
        """What a trainer of the family's model holds, without loading anything."""
        denoiser = family.empty_denoiser(family.dtype)
        whole = _nbytes(denoiser.parameters())
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
    return sum(tensor.nbytes for tensor in tensors)


def load_trainable(table: TrainableTable, family: Family) -> Trainable:
    """What a recipe's `[trainable]` means for a family. Raises Refused for weights to be trained that would be quantised."""
    if family.base != "bf16" and (table.kind != "lora" or table.patterns):
        raise Refused(
            f'model.base = "{family.base}" keeps weights that cannot be trained themselves: set trainable.kind = "lora" without '
            'patterns, or model.base = "bf16"'
        )
    parts: list[Part] = []
    if table.kind == "full":
        parts.append(Full())
    if table.kind == "lora":
        assert table.rank is not None and table.alpha is not None
        begin = Path(table.start) if table.start else None
        targets = tuple(table.targets or family.lora_targets)
        init = table.init or "kaiming"
        parts.append(LoRA(rank=table.rank, alpha=table.alpha, targets=targets, init=init, begin=begin))
    if table.patterns:
        begin = Path(table.start) if table.start and table.kind == "modules" else None
        parts.append(Modules(patterns=table.patterns, begin=begin))
    return Trainable(parts=tuple(parts))
