"""The keys of a configuration schema as dotted names: walking, describing, assigning; what `jobs.cli` is built on.

A schema is a tree of `Section` classes; a key is the dotted path to a leaf or to a section, `judges.hps.path`. In a
table whose entries the user names (`dict[str, Section]`), NAME stands for any of them: `judges.python.NAME.function`.
Left out: sections inside lists, which no recipe has.
"""

import os
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic_core import PydanticUndefined

from rlhf.section import Section, is_local_path

C = TypeVar("C", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key: its type as written for people, and what texts mean for it."""

    type_text: str
    default: Any
    description: str
    is_bool: bool
    is_text: bool
    """Takes strings, so `5` means "5"."""
    is_optional: bool
    is_local_path: bool
    section: type[Section] | None


NAME = "NAME"
"""Part of a key that stands for a name the user gives."""


def keys(schema: type[Section], prefix: str = "") -> dict[str, Key]:
    """Every key of `schema` by dotted name, sections before what is in them."""
    found: dict[str, Key] = {}
    for name, field in schema.model_fields.items():
        options = _options(field.annotation)
        section = next((option for option in options if _is_section(option)), None)
        if (named := _named_section(options)) is not None:
            found |= keys(named, f"{prefix}{name}.{NAME}.")
            continue
        found[prefix + name] = Key(
            type_text=" | ".join(_type_text(option) for option in options),
            default=field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined,
            description=" ".join((field.description or "").split()),
            is_bool=bool in options,
            is_text=any(option is str or _all_text(option) for option in options),
            is_optional=type(None) in options,
            is_local_path=is_local_path(field),
            section=section,
        )
        if section is not None:
            found |= keys(section, f"{prefix}{name}.")
    return found


def find(keys: dict[str, Key], name: str) -> Key | None:
    """The key that a dotted name means, where NAME in a key matches any one part."""
    parts = name.split(".")
    for pattern, key in keys.items():
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(want in (NAME, part) for want, part in zip(wanted, parts, strict=True)):
            return key
    return None


def describe(schema: type[Section]) -> str:
    """A line per key: name, type, default, what it is."""
    lines = []
    for name, key in keys(schema).items():
        if key.section is not None and not key.is_optional:
            continue
        unset = {None: "none", PydanticUndefined: "required"}
        default = next((text for value, text in unset.items() if key.default is value), repr(key.default))
        lines.append(f"  --{name}  {key.type_text}  ({default})".replace("%", "%%"))
        if key.description:
            lines.append(f"      {key.description}".replace("%", "%%"))
    return "\n".join(lines)


def required(keys: dict[str, Key], name: str) -> list[str]:
    """What must be given where `name` is missing: itself, or the keys without a default of that section."""
    if name not in keys or keys[name].section is None:
        return [name]
    inside = [key for key in keys if key.startswith(f"{name}.") and keys[key].section is None]
    return [key for key in inside if keys[key].default is PydanticUndefined] or [name]


def value_of(text: str, key: Key) -> Any:
    """The value that `text` of a command line stands for; a text that is no TOML stays text and pydantic judges it."""
    if key.is_optional and text.lower() in ("none", "null"):
        return None
    if key.is_bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
    return text if key.is_text and not isinstance(value, str) else value


def unknown(schema: type[Section], tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names in `tree` that `schema` does not have."""
    for name, value in tree.items():
        if name not in schema.model_fields:
            yield prefix + name
            continue
        options = _options(schema.model_fields[name].annotation)
        section = next((o for o in options if _is_section(o)), None)
        if section is not None and isinstance(value, dict):
            yield from unknown(section, value, f"{prefix}{name}.")
        elif (named := _named_section(options)) is not None and isinstance(value, dict):
            for own, table in value.items():
                if isinstance(table, dict):
                    yield from unknown(named, table, f"{prefix}{name}.{own}.")


def assign(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested tables, making the tables on the way."""
    *path, last = name.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def remove(tree: dict[str, Any], name: str) -> Any:
    """Take a dotted name out of nested tables and return its value."""
    *path, last = name.split(".")
    for part in path:
        tree = tree[part]
    return tree.pop(last)


def contains(tree: dict[str, Any], name: str) -> bool:
    """Whether nested tables have a dotted name."""
    value: Any = tree
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def with_absolute_paths(config: C) -> C:
    """The same configuration with every local path absolute: `~` expanded, the rest from the current directory."""
    changes: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            changes[name] = with_absolute_paths(value)
        elif isinstance(value, str) and is_local_path(field):
            changes[name] = os.path.abspath(os.path.expanduser(value))
    return config.model_copy(update=changes)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone, without `Annotated` marks."""
    if typing.get_origin(annotation) is Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(annotation) for option in _options(member))
    return (annotation,)


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Section)


def _named_section(options: tuple[Any, ...]) -> type[Section] | None:
    """The Section of a `dict[str, Section]`, or None."""
    values = [typing.get_args(option)[1] for option in options if typing.get_origin(option) is dict]
    return next((value for value in values if _is_section(value)), None)


def _all_text(option: Any) -> bool:
    return typing.get_origin(option) is Literal and all(isinstance(value, str) for value in typing.get_args(option))


def _type_text(option: Any) -> str:
    if option is type(None):
        return "none"
    if typing.get_origin(option) is Literal:
        return " | ".join(repr(value) for value in typing.get_args(option))
    if typing.get_origin(option) in (tuple, list):
        return f"list of {_type_text(typing.get_args(option)[0])}"
    if _is_section(option):
        return "table"
    if typing.get_origin(option) is dict:
        return f"table of {_type_text(_options(typing.get_args(option)[1])[0])}"
    return getattr(option, "__name__", str(option))
