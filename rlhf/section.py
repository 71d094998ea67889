"""What the configuration of every job is built of: tables that refuse unknown keys, local paths, the cluster."""

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

LOCAL_PATH = "local path"
LocalPath = Annotated[str, LOCAL_PATH]
"""A file or folder of this machine: `jobs.cli` makes it absolute, and refuses a relative one in a submitted job."""


class Section(BaseModel):
    """A frozen table that refuses unknown keys, naming the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values.keys() - cls.model_fields.keys():
                near = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r} = {values[key]!r}; {hint}")
        return values


def is_local_path(field: FieldInfo) -> bool:
    """Whether a key holds a LocalPath (or none)."""
    members = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    return LOCAL_PATH in field.metadata or any(LOCAL_PATH in get_args(member)[1:] for member in members)


def local_paths(config: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every local path that is set."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from local_paths(value, f"{prefix}{name}.")
        elif isinstance(value, str) and is_local_path(field):
            yield prefix + name, value


class ClusterConfig(Section):
    address: str | None = None
    """A running cluster ("auto" or host:port; also RAY_ADDRESS). Unset: the job starts one of its own and ends it."""
    num_cpus: float | None = None
    object_store_memory: int | None = Field(None, ge=80_000_000)
