"""Small files of preference pairs, in Pick-a-Pic's columns and as JSONL."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rlhf.data.examples import blocks_of, check_block, write_index

SCHEMA = pa.schema(
    [
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("caption", pa.string()),
        ("ranking_id", pa.int64()),
    ]
)


def png(seed: int, height: int = 24, width: int = 32) -> bytes:
    """A noise picture's file."""
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(picture)


def encoded(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def row(seed: int, label: float | None = 1.0, caption: str | None = None, **changes) -> dict:
    """A good row, but for `changes`."""
    caption = f"a dish {seed % 3}" if caption is None else caption
    pictures = {"jpg_0": png(2 * seed), "jpg_1": png(2 * seed + 1)}
    return {**pictures, "label_0": label, "caption": caption, "ranking_id": seed, **changes}


def write_parquet(file: Path, rows: list[dict], row_group_size: int = 4) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=row_group_size)
    return file


def write_arrow(file: Path, rows: list[dict], batch: int = 4) -> Path:
    """As `datasets` saves to disk: Arrow's stream format, pictures as {bytes, path}."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = SCHEMA.set(0, pa.field("jpg_0", image)).set(1, pa.field("jpg_1", image))
    rows = [{**r, **{n: {"bytes": r[n], "path": None} for n in ("jpg_0", "jpg_1")}} for r in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(file), schema) as writer:
        for start in range(0, len(rows), batch):
            writer.write_table(pa.Table.from_pylist(rows[start : start + batch], schema=schema))
    return file


def index_of(file: Path, **needs) -> Path:
    """The index of a file of pairs, checked and beside it."""
    needs = {"source_counts": range(1), "items": None, **needs}
    write_index(file.with_suffix(".index"), [check_block(block, **needs) for block in blocks_of(file)])
    return file.with_suffix(".index")


def write_jsonl(folder: Path, count: int, source: bool = False) -> Path:
    """pairs.jsonl and its pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        names = {"winner": f"pictures/{i}_w.png", "loser": f"pictures/{i}_l.png"}
        names |= {"source": f"pictures/{i}_s.png"} if source else {}
        for side, name in enumerate(names.values()):
            (folder / name).write_bytes(png(10 * i + side))
        lines.append(json.dumps({"image_id": str(i), "prompt": f"a dish {i % 3}", **names}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"
