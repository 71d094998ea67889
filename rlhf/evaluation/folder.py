"""An evaluation's folder: one writer at a time, and no pictures of another evaluation.

    <out>/  painting.json  lock  pictures/        from the start
            config.toml                           the recipe of the last start
            index.html  results.json              at the end; results.json comes last and means: finished

painting.json holds everything that decides the pixels, weights and prompts by their fingerprints. Who judges is not part
of it: an evaluation that stopped over a judge goes on with another one. Left out: extending a finished evaluation.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from rlhf.errors import Refused
from rlhf.rewards.protocols import quick_fingerprint
from rlhf.runs.durable import write_durably
from rlhf.runs.folder import check_place, made
from rlhf.tables import EvaluatedModelTable, SamplingTable, WeightsTable
from rlhf.types import Prompt


def check_out(out: Path) -> None:
    """Raise Refused where `out` is finished, holds something else than an evaluation, or cannot be made."""
    check_place(out, "out")
    if (out / "results.json").exists():
        raise Refused(f"out = {str(out)!r} holds a finished evaluation, which is never overwritten; choose another")
    if out.exists() and not (out / "painting.json").exists() and {path.name for path in out.iterdir()} - {"lock"}:
        raise Refused(f"out = {str(out)!r} is not empty and holds no evaluation; choose another folder")


def painting(
    model: EvaluatedModelTable, tuned: WeightsTable, sampling: SamplingTable, prompts: Sequence[Prompt], seed: int
) -> dict[str, Any]:
    """What decides the pixels of every picture, by dotted key."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        sources = [(source.content, source.fit) for source in prompt.sources]
        row = [prompt.key, prompt.instruction, sources, prompt.geometry.height, prompt.geometry.width]
        digest.update(json.dumps(row).encode())
    tables = {"model": model, "tuned": tuned, "sampling": sampling}
    keys = {f"{name}.{key}": value for name, table in tables.items() for key, value in table.model_dump().items()}
    return keys | {
        "seed": seed,
        "the weights at model.path": quick_fingerprint(Path(model.path)),
        "the weights at model.denoiser": quick_fingerprint(Path(model.denoiser)) if model.denoiser else None,
        "the tuned weights": quick_fingerprint(Path(str(tuned.denoiser or tuned.lora))),
        "the prompts": digest.hexdigest(),
    }


@contextmanager
def claim(out: Path, ours: Mapping[str, Any], recipe: str) -> Iterator[Path]:
    """Make `out`, or go on in it, with `recipe` as its config.toml; others are kept out meanwhile. `ours`: see `painting`.

    Raises Refused where it is finished, in use, or begun with something else (naming what).
    """
    with (made(out, "out") / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"out = {str(out)!r} is in use by another evaluation that runs now") from error
        check_out(out)
        begun = out / "painting.json"
        if begun.exists():
            theirs = json.loads(begun.read_text(encoding="utf-8"))
            if other := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
                begun_with = f"out = {str(out)!r} was begun with other values of {', '.join(other)}"
                raise Refused(f"{begun_with}; choose another folder, or remove that one")
        write_durably(begun, json.dumps(ours, indent=1))
        (out / "pictures").mkdir(exist_ok=True)
        (out / "config.toml").write_text(recipe, encoding="utf-8")
        yield out
