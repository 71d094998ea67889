"""The audit: every pair that was trained on, written before it trains, in Parquet with a fixed schema.

A file holds one rank's pairs of one step, so nothing is ever appended to a file and a resume can move whole steps away.
With latents it is enough to train on the same pairs again offline.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from rlhf.data.batches import latents_from_array, noise_seed, t_seed
from rlhf.errors import Refused
from rlhf.runs.durable import durable
from rlhf.types import Candidate, Cell, Geometry, Pair, Prompt, Score, Source, seed_from

_SIDE = [
    ("attempt", pa.int32()),
    ("seed", pa.int64()),
    ("version", pa.int64()),
    ("rewards", pa.map_(pa.string(), pa.float64())),
    ("pass_probability", pa.float64()),
    ("latents", pa.binary()),
]
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("index", pa.int32()),
        ("cursor", pa.int64()),
        ("key", pa.string()),
        ("instruction", pa.string()),
        ("sources", pa.string()),
        ("encoding_keys", pa.list_(pa.string())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frames", pa.int32()),
        ("margin", pa.float64()),
        ("t", pa.float64()),
        ("t_seed", pa.int64()),
        ("noise_seed", pa.int64()),
        ("latents_shape", pa.list_(pa.int32())),
        *((f"{side}_{name}", kind) for side in ("winner", "loser") for name, kind in _SIDE),
    ]
)
"""`sources` are the prompt's, in JSON. `latents` are bf16 bytes (C, h, w), the sampler's own; `seed` is the candidate's
starting noise."""


def candidate_seed(seed: int, cursor: int, attempt: int) -> int:
    """The seed of a candidate's starting noise, from (run seed, prompt cursor, attempt)."""
    return seed_from(seed, "candidate", cursor, attempt)


def _side(name: str, candidate: Candidate, score: Score, seed: int, latents: bool) -> dict[str, object]:
    array: np.ndarray = candidate.latents
    return {
        f"{name}_attempt": candidate.attempt,
        f"{name}_seed": candidate_seed(seed, candidate.cursor, candidate.attempt),
        f"{name}_version": candidate.version,
        f"{name}_rewards": list(score.rewards.items()),
        f"{name}_pass_probability": score.verdict.pass_probability,
        f"{name}_latents": array.tobytes() if latents else None,
    }


def write_pairs(
    file: Path,
    pairs: Sequence[Pair],
    encoding_keys: Sequence[Sequence[str]],
    times: Sequence[float],
    *,
    seed: int,
    step: int,
    first_index: int,
    save_latents: bool,
) -> None:
    """Write this rank's pairs of one step, whole or not at all.

    encoding_keys: of each pair, the cache keys of what its prompt was encoded to. times: their training times.
    """
    rows = []
    for index, (pair, keys, t) in enumerate(zip(pairs, encoding_keys, times, strict=True), first_index):
        prompt = pair.prompt
        rows.append(
            {
                "step": step,
                "index": index,
                "cursor": pair.cursor,
                "key": prompt.key,
                "instruction": prompt.instruction,
                "sources": json.dumps([asdict(source) for source in prompt.sources]),
                "encoding_keys": list(keys),
                **asdict(prompt.geometry),
                "margin": pair.margin,
                "t": t,
                "t_seed": t_seed(seed, step, index),
                "noise_seed": noise_seed(seed, step, index),
                "latents_shape": list(pair.winner.latents.shape),
                **_side("winner", pair.winner, pair.winner_score, seed, save_latents),
                **_side("loser", pair.loser, pair.loser_score, seed, save_latents),
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with durable(file) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)


def recorded_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row that `write_pairs` wrote."""
    sources = [{**values, "crop": tuple(values["crop"])} for values in json.loads(row["sources"])]
    return Prompt(
        key=row["key"],
        instruction=row["instruction"],
        sources=tuple(Source(**{**s, "cell": Cell(**s["cell"]) if s["cell"] else None}) for s in sources),
        geometry=Geometry(height=row["height"], width=row["width"], frames=row["frames"]),
    )


def latents_of(row: Mapping[str, Any], side: str) -> Tensor:
    """(C, h, w) fp32 of the winner or loser of a row that `write_pairs` wrote."""
    return latents_from_array(np.frombuffer(row[f"{side}_latents"], np.int16).reshape(row["latents_shape"]))


def read_file(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """One file of a `pairs/` folder. Raises Refused on another schema."""
    schema = pq.read_schema(file)
    if schema != SCHEMA:
        raise Refused(f"{file} is not a pair file of this version: its columns are {schema.names}")
    return pq.read_table(file, columns=columns)


def read_pairs(folder: Path) -> list[dict[str, object]]:
    """Rows of every file of a `pairs/` folder, in the order trained. Raises Refused on another schema."""
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in read_file(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["step"], row["index"]))
