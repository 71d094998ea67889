"""What the configuration of every job is built of: tables that refuse unknown keys, local paths, the cluster."""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LOCAL_PATH = "local path"


def _possible(path: str) -> str:
    if not path:
        raise ValueError("is empty: give a path")
    if "\0" in path or any(len(part.encode()) > 255 for part in path.split("/")):
        raise ValueError("no path can be this: it holds a NUL character, or a name of over 255 bytes")
    return path


LocalPath = Annotated[str, LOCAL_PATH, AfterValidator(_possible)]
"""A file or folder of this machine: `jobs.cli` makes it absolute, and refuses a relative one in a submitted job."""


class Section(BaseModel):
    """A frozen table that refuses unknown keys, naming the nearest valid one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values.keys() - cls.model_fields.keys():
                near = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r} = {values[key]!r}; {hint}")
            for key, value in values.items():  # pydantic would take true for 1
                kinds = {cls.model_fields[key].annotation, *get_args(cls.model_fields[key].annotation)}
                if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                    raise ValueError(f"{key} = {str(value).lower()}: give a number")
        return values

    def conflicts(self) -> Iterator[str]:
        """What is wrong with keys that do not fit together, each said in a line."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if found := [*self.conflicts()]:
            raise ValueError("; ".join(found))
        return self


def local_paths(config: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every local path that is set."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from local_paths(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            optional = (get_args(member)[1:] for member in get_args(field.annotation))
            if any(LOCAL_PATH in marks for marks in (field.metadata, *optional)):
                yield prefix + name, value


def _card(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*GB", text):
        raise ValueError('write the memory of a card like "80GB"')
    return text


class ClusterConfig(Section):
    address: str | None = None
    """A running cluster ("auto" or host:port; also RAY_ADDRESS). Unset: the job starts one of its own and ends it."""
    card: Annotated[str, AfterValidator(_card)] | None = None
    """Memory of one of its GPUs, e.g. "80GB"; unset: of this machine's."""
    num_cpus: int | None = Field(None, ge=1)
    """Of a cluster that the job starts; unset: this machine's."""
    object_store_memory: int | None = Field(None, ge=80_000_000)
