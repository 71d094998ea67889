"""What the columns of examples must hold, by which names, and what kind of table a file is.

Pick-a-Pic's columns of pairs; winner, loser, prompt[, source][, mask]; target, prompt[, source][, mask]. `examples` reads them.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from rlhf.data import formats
from rlhf.data.clips import Asked
from rlhf.data.files import TABLES
from rlhf.data.formats import FOLDER
from rlhf.data.records import BadInput, Field, Problem, Record

LABEL = "1 prefers jpg_0, 0 prefers jpg_1, 0.5 neither"
_TEXT = "give the text that the pictures were made for"
_BYTES = "give the bytes of a PNG, JPEG or WEBP file"
TABLE = (
    Field(name="caption", remedy=_TEXT),
    Field(name="label_0", kind="number", remedy=LABEL),
    Field(name="jpg_0", kind="picture", remedy=_BYTES),
    Field(name="jpg_1", kind="picture", remedy=_BYTES),
    Field(name="has_label", kind="any", required=False),
)
"""Pick-a-Pic v2. label_0 is 1 where the first picture is preferred, 0 the second, 0.5 neither; has_label False: nobody chose."""
LINE = (
    Field(name="prompt", example='"a red apple"', remedy=_TEXT),
    Field(name="winner", kind="picture path", example='"pictures/1.png"'),
    Field(name="loser", kind="picture path", example='"pictures/2.png"'),
)
PREFERRED = ("winner", "loser", "target")
"""What is learnt from or compared."""
TARGET = Field(name="target", kind="picture path", example='"pictures/1.png"')
SOURCE = Field(name="source", kind="picture paths", example='"pictures/3.png"')
MASK = Field(name="mask", kind="picture path", required=False)
IMAGE_ID = Field(name="image_id", required=False, example='"10001"')
IN_FOLDER = {
    "prompt": "write it into a file of the same name that ends with .txt",
    "source": "put it into control_images/ under the same name",
}
"""Remedies for what a folder of pictures lacks."""
ALIASES = {
    "path_target": "target",
    "target_image": "target",
    "control_images": "source",
    "control_image": "source",
    "path_control": "source",
    "path_mask": "mask",
    "control_mask": "mask",
    "mask_image": "mask",
    "instruction": "prompt",
    "source_image": "source",
    "edit_image": "target",
}
"""Names that other trainers' data sets use, and ours."""
CONTROL = re.compile(r"path_control_?(\d*)")
"""Columns of a CSV that name a source each."""
TABLE_SOURCE = Field(
    name="source", kind="picture path", remedy="an edit family learns from a JSONL of winner, loser, prompt, source"
)
TARGET_TABLE = (
    LINE[0],
    replace(TARGET, kind="picture"),
    replace(SOURCE, kind="pictures", required=False),
    replace(MASK, kind="picture"),
    IMAGE_ID,
)
"""A table of pictures to learn from."""


def is_target_table(file: Path) -> bool:
    """Whether a file is a table of pictures to learn from. One that cannot be read is none."""
    try:
        columns = formats.FORMATS[file.suffix].columns(file) if file.suffix in TABLES and file.is_file() else None
    except (pa.ArrowException, OSError, BadInput):
        return False
    return any(ALIASES.get(name, name) == "target" for name in columns or ())


def table_fields(file: Path) -> tuple[Field, ...]:
    """What is read of a table, by the names that its columns have."""
    if not is_target_table(file):
        return TABLE
    columns = formats.FORMATS[file.suffix].columns(file) or ()
    theirs = {ALIASES.get(name, name): name for name in columns}
    return tuple(replace(field, name=theirs.get(field.name, field.name)) for field in TARGET_TABLE)


def renamed(record: Record) -> Record | Problem:
    """A record whose columns go by our names, with the columns of a CSV that name a source each as one list."""
    fields = dict(record.fields)
    numbered = {name: int(found[1] or 0) for name in fields if (found := CONTROL.fullmatch(name))}
    if numbered:
        given = [fields.pop(name) for name in sorted(numbered, key=numbered.__getitem__)]
        fields["path_control"] = [value for value in given if value not in (None, "")]
    for name in sorted(ALIASES.keys() & fields.keys()):
        if (mine := ALIASES[name]) in fields:
            return record.problem(name, f"says the same as {mine}", "keep one of the two")
        fields[mine] = fields.pop(name)
        if name == "source_image" and fields[mine] is None:  # as FireRed's rows say that there is none
            del fields[mine]
    return replace(record, fields=fields)


def fields_of(
    kind: str, source_counts: range, needs_loser: bool, items: Collection[str] | None, asked: Asked
) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
    """What a row must have, and what one with a target. kind: of the file, see `formats.FORMATS`; asked: of videos."""
    if asked.frames == 1:
        return _fields_of(kind, source_counts, needs_loser, items)

    def of_clips(fields: Sequence[Field]) -> tuple[Field, ...]:
        """Paths of videos are opened with their clip; no mask is taken."""
        paths = {name: replace(TARGET, name=name, kind="text", example='"clips/1.mp4"') for name in PREFERRED}
        wanted = (field for field in fields if field.name != MASK.name)
        return tuple(replace(paths[f.name], required=f.required) if f.name in paths else f for f in wanted)

    pair, alone = _fields_of(kind, source_counts, needs_loser, items)
    return of_clips(pair), of_clips(alone)


def _fields_of(
    kind: str, source_counts: range, needs_loser: bool, items: Collection[str] | None
) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
    prompt, winner, loser = LINE
    remedy = "give every pair the image_id of an item"
    known_id = replace(IMAGE_ID, required=True, known=items, known_in="data.item_metadata", remedy=remedy)
    item = IMAGE_ID if items is None else known_id
    if kind in TABLES:
        table_prompt, target, source, mask, _ = TARGET_TABLE
        source = replace(source, counts=source_counts, required=0 not in source_counts)
        pair = (*TABLE, *((TABLE_SOURCE,) if max(source_counts) else ()), item)
        return pair, (table_prompt, target, *((source,) if max(source_counts) else ()), mask, item)
    source = replace(SOURCE, counts=source_counts, required=0 not in source_counts)
    if kind == FOLDER:  # control pictures that the model does not take are told, not left out
        prompt, source = (replace(field, remedy=IN_FOLDER[field.name]) for field in (prompt, source))
        return (), (prompt, TARGET, source, MASK, item)
    others = (*((source,) if max(source_counts) else ()), MASK, item)
    if needs_loser:
        return (*LINE, *others), (*LINE, *others)
    return (prompt, winner, replace(loser, required=False), *others), (prompt, TARGET, *others)
