"""The nouns of the system: what a prompt, an encoding, a candidate, a score and a pair are.

Everything here is a frozen value. `media` and `latents` fields are opaque handles: inside one process they are arrays,
between Ray actors they are object references, so that the driver passes pairs around without ever holding a pixel.

Shapes: B batch, C latent channels, F frames (1 of a picture), H W pixels, h w latents, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as (run seed, prompt cursor, attempt): equal tuples give equal seeds anywhere."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 1


def noise_from(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape` in fp32, drawn on the CPU so that every device and actor sees the same values.

    CPUs with and without AVX2 differ in the last bits.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


Fit = Literal["crop", "pad", "stretch"]
"""How a medium is brought to another aspect: cut, shown whole on white, or stretched."""
CENTRE = (0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The size of a picture or video."""

    height: int
    """Pixels, H."""
    width: int
    """Pixels, W."""
    frames: int = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Where a medium lies inside a table."""

    part: int
    """Row group or record batch."""
    row: int
    """In the part, from 0."""
    column: str
    number: int
    """Of the row in the table, from 1, for messages."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture or video of a data set, and how it is shown to a model. `rlhf.data.sources` opens it."""

    path: str
    """Absolute path of its file, or of the table that holds it."""
    cell: Cell | None = None
    """Its place in a table; None: a file of its own."""
    content: str
    """xxh3-128 of its bytes when it was checked."""
    fit: Fit = "crop"
    mirrored: bool = False
    """Left to right, after fitting."""
    crop: tuple[float, float] = CENTRE
    """(down, across) of a crop in what may be cut off: 0 … 1."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Something that a frozen encoder computes once: a text, media, or both together. A family says what it needs."""

    kind: str
    """A key of the family's `kinds`."""
    text: str | None = None
    sources: tuple[Source, ...] = ()
    geometries: tuple[Geometry, ...] = ()
    """The size that each source is brought to."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The row of one encoding."""

    tensors: Mapping[str, Tensor]
    """By name, without a batch dimension."""
    unknown: float | None = None
    """Share of the text's tokens that the encoder does not know; None: there is no text."""
    cut: float | None = None
    """Share of the text's tokens beyond the encoder's limit."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An instruction and its sources: the unit that candidates are compared within."""

    key: str
    """Its name in the data set."""
    instruction: str
    sources: tuple[Source, ...] = ()
    item: Item = field(default_factory=dict)
    """Empty where nothing is known."""
    geometry: Geometry
    """Of what is generated."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something to learn from: a prompt and, by role (winner, loser, target, …), what was made of it."""

    prompt: Prompt
    targets: Mapping[str, Source]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One sampled edit of one prompt."""

    cursor: int
    """Position of the prompt in the run's prompt stream."""
    attempt: int
    """0, 1, … within the prompt; (run seed, cursor, attempt) seeds the noise."""
    version: int
    """Policy version that sampled it."""
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
    """Difference of the scaled rewards, > 0."""

    @property
    def version(self) -> int:
        """The older of the two candidates' policy versions: what staleness is measured from."""
        return min(self.winner.version, self.loser.version)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of B examples, ready for an objective. One (t, noise) per example, shared by its roles and by every model.

    Latents are (B, C, …): … is h, w of a picture, or F, h, w of frames.
    """

    x0: Mapping[str, Tensor]
    """(B, C, …) clean latents by role, fp32: the roles that the objective names, no others."""
    condition: Condition
    """Encoded prompts, leading dimension B."""
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

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return Batch(
            x0=moved(self.x0),
            condition=moved(self.condition),
            t=self.t.to(device),
            noise=self.noise.to(device),
            weight=moved(self.weight),
            loss_mask=moved(self.loss_mask),
        )


def evenly_weighted(x0: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight 1 for every row of every role."""
    return {role: torch.ones(len(latents)) for role, latents in x0.items()}
