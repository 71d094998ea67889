"""The nouns of the system, all frozen values.

`media` and `latents` are opaque handles: inside one process they are arrays, between Ray actors they are object references,
so that the driver passes pairs around without ever holding a pixel.

Shapes: B batch, C latent channels, F frames (1 of a picture), H W pixels, h w latents, L tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

Condition = dict[str, Tensor]
"""An encoded prompt: tensors by name, each with a leading batch dimension B. Only the family knows the names."""

POLICY, REFERENCE = "policy", "reference"
"""The side that is trained, and the frozen one that preferences are measured against."""
Item = Mapping[str, str]
"""What the input files say of the product on a photo: free columns, column → text. A judge's config names those it needs."""
Fit = Literal["crop", "pad", "stretch"]
"""How a medium is brought to another aspect: cut, shown whole on white, or stretched."""
CENTRE = (0.5, 0.5)


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as (run seed, prompt cursor, attempt): equal tuples give equal seeds anywhere."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 1


def noise_from(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 noise, drawn on the CPU so that every device sees the same; AVX2 may change its last bits."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The size of a picture or video: H × W pixels, F frames."""

    height: int
    width: int
    frames: int = 1


Sized = Callable[[int, int], Geometry]
"""What is made of a picture of (H, W) pixels, or where it is a prompt's first source."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Where a medium lies in a table: row `row`, from 0, of a row group or record batch; `number`, from 1, of the whole."""

    part: int
    row: int
    column: str
    number: int
    item: int | None = None
    """Of a cell that holds a list."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Which frames of a video file a medium is, and which part of them."""

    first: int = 0
    stride: int = 1
    box: tuple[int, int, int, int] | None = None
    """(left, right, top, bottom) in pixels, without the last column and row; None: the whole frame."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture or video of a data set, and how it is shown to a model. `rlhf.data.sources` opens it."""

    path: str
    """Absolute path of its file, or of the table that holds it."""
    cell: Cell | None = None
    """Its place in a table; None: a file of its own."""
    content: str
    """xxh3-128 of its bytes when it was checked."""
    height: int
    """Pixels, as it is in its file, of a clip in its box."""
    width: int
    clip: Clip | None = None
    """Of a video; None: a picture."""
    fit: Fit = "crop"
    mirrored: bool = False
    """Left to right, after fitting."""
    crop: tuple[float, float] = CENTRE
    """(down, across) of a crop in what may be cut off: 0 … 1."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a frozen encoder computes once: a text, media, or both. `kind` is a key of the family's `kinds`."""

    kind: str
    text: str | None = None
    sources: tuple[Source, ...] = ()
    geometries: tuple[Geometry, ...] = ()
    """The size that each source is brought to."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The row of one encoding: tensors by name, without a batch dimension."""

    tensors: Mapping[str, Tensor]
    unknown: float | None = None
    """Share of the text's tokens that the encoder does not know; None: there is no text."""
    cut: float | None = None
    """Share of the text's tokens beyond the encoder's limit."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An instruction and its sources: the unit that candidates are compared within. `key`: its name in the data set."""

    key: str
    instruction: str
    sources: tuple[Source, ...] = ()
    item: Item = field(default_factory=dict)
    geometry: Geometry
    """Of what is generated."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something to learn from: a prompt and, by role (winner, loser, target, …), what was made of it."""

    prompt: Prompt
    targets: Mapping[str, Source]
    mask: Source | None = None
    """White where it counts more, of the size of what was made; None: everything counts alike."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One sampled edit of one prompt."""

    cursor: int
    """Position of the prompt in the run's prompt stream."""
    attempt: int
    """0, 1, … within the prompt; (run seed, cursor, attempt) seeds the noise."""
    version: int
    """Of the policy that sampled it."""
    media: Any
    """uint8 (F, H, W, 3), or a reference to it."""
    latents: Any
    """bf16 (C, h, w) of the finished sample x0, or a reference to it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The filter's answer. Never a reward."""

    valid: bool
    reason: str = ""
    pass_probability: float | None = None
    raw_response: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the judges said of one candidate: its verdict and, if it passed, one scalar per reward (higher is better)."""

    verdict: Verdict
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference between two candidates of one prompt."""

    prompt: Prompt
    cursor: int
    winner: Candidate
    loser: Candidate
    winner_score: Score
    loser_score: Score
    margin: float
    """Difference of the scaled rewards' totals, > 0."""
    margins: Mapping[str, float]
    """Difference of each scaled reward alone, in the units of `margin`."""

    @property
    def version(self) -> int:
        """The older of the two candidates' policy versions: what staleness is measured from."""
        return min(self.winner.version, self.loser.version)

    def with_candidates(self, change: Callable[[Candidate], Candidate]) -> "Pair":
        """The same pair with its winner and then its loser changed."""
        return replace(self, winner=change(self.winner), loser=change(self.loser))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B examples for an objective, (t, noise) shared by roles and models. Latents' … is h, w, of videos F, h, w."""

    x0: Mapping[str, Tensor]
    """(B, C, …) clean latents by role, fp32: the roles that the objective names, no others."""
    condition: Condition
    t: Tensor
    """(B,) process time, 1 noise, 0 data."""
    noise: Tensor
    """(B, C, …) standard normal."""
    weight: Mapping[str, Tensor]
    """(B,) by role, what each counts for in a mean over B: 1 on average over the whole update, 0 for what is not there."""
    loss_mask: Mapping[str, Tensor] = field(default_factory=dict)
    """By role, broadcastable to (B, C, …): what each latent's squared error is multiplied by. Empty: by nothing."""

    def to(self, device: str) -> "Batch":
        """The same batch on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            return {name: moved(inner) for name, inner in value.items()}

        return Batch(**moved(vars(self)))
