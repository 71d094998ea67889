"""The keys of a configuration schema as dotted names: walking, describing, assigning; what `jobs.cli` is built on.

A schema is a tree of `Section` classes; a key is the dotted path to a leaf or to a section, `judges.hps.path`. In a
table whose entries the user names (`dict[str, Section]`), NAME stands for any of them: `judges.python.NAME.function`.
Left out: sections inside lists, which no recipe has.
"""

import re
import tomllib
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from rlhf.section import Section

NAME = "NAME"
"""Part of a key that stands for a name the user gives."""


def keys(schema: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of `schema` by dotted name, sections before what is in them."""
    found: dict[str, FieldInfo] = {}
    for name, key in schema.model_fields.items():
        section, named = _section(key.annotation)
        if not named:
            found[prefix + name] = key
        if section is not None:
            found |= keys(section, f"{prefix}{name}.{NAME}." if named else f"{prefix}{name}.")
    return found


def find(keys: dict[str, FieldInfo], name: str) -> FieldInfo | None:
    """The key that a dotted name means, where NAME in a key matches any one part."""
    named = {
        pattern.replace(".", r"\.").replace(NAME, "[^.]*"): key for pattern, key in keys.items() if NAME in pattern
    }
    return keys.get(name) or next((key for pattern, key in named.items() if re.fullmatch(pattern, name)), None)


def leaves(keys: dict[str, FieldInfo]) -> list[str]:
    """The keys that hold no tables."""
    return [name for name, key in keys.items() if _section(key.annotation)[0] is None]


def takes(key: FieldInfo, kind: type | None) -> bool:
    """Whether values of a type, or None, are among a key's."""
    return (type(None) if kind is None else kind) in _options(key.annotation)


def describe(schema: type[Section]) -> str:
    """A line per key: name, type, default, what it is."""
    lines = []
    for name, key in keys(schema).items():
        if _section(key.annotation)[0] is None or takes(key, None):
            default = "required" if key.is_required() else repr(key.get_default(call_default_factory=True))
            lines.append(f"  --{name}  {type_text(key.annotation)}  ({'none' if default == 'None' else default})")
            if key.description:
                lines.append(f"      {' '.join(key.description.split())}")
    return "\n".join(lines).replace("%", "%%")


def value_of(text: str, key: FieldInfo) -> Any:
    """The value that `text` of a command line stands for; a text that is no TOML stays text and pydantic judges it."""
    if takes(key, None) and text.lower() in ("none", "null"):
        return None
    if takes(key, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
    choices = [typing.get_args(option) for option in _options(key.annotation) if typing.get_origin(option) is Literal]
    takes_text = takes(key, str) or any(all(isinstance(one, str) for one in several) for several in choices)
    return text if takes_text and not isinstance(value, str) else value  # `5` means "5"


def take_unknown(schema: type[Section], tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Take what `schema` does not have out of nested tables: (dotted name, value)."""
    for name, value in list(tree.items()):
        if name not in schema.model_fields:
            yield prefix + name, tree.pop(name)
            continue
        section, named = _section(schema.model_fields[name].annotation)
        if section is not None and isinstance(value, dict):
            tables = {f"{name}.{own}": table for own, table in value.items()} if named else {name: value}
            for place, table in tables.items():
                if isinstance(table, dict):
                    yield from take_unknown(section, table, f"{prefix}{place}.")


def assign(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested tables, making the tables on the way."""
    *path, last = name.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def has(tree: dict[str, Any], name: str) -> bool:
    """Whether a dotted name is set in nested tables."""
    *path, last = name.split(".")
    for part in path:
        tree = tree.get(part, {})
    return last in tree


def type_text(annotation: Any) -> str:
    """A type as written for people."""
    option, *others = _options(annotation)
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if others:
        return " | ".join(map(type_text, (option, *others)))
    if option is type(None):
        return "none"
    if _section(option)[0] is not None:
        return "table"
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (tuple, list):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"table of {type_text(_options(arguments[1])[0])}"
    return getattr(option, "__name__", str(option))


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone, without `Annotated` marks."""
    if typing.get_origin(annotation) is Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(annotation) for option in _options(member))
    return (annotation,)


def _section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The Section that a key holds, if it does, and whether in a table whose entries the user names."""
    for option in _options(annotation):
        named = typing.get_origin(option) is dict
        table = typing.get_args(option)[1] if named else option
        if isinstance(table, type) and issubclass(table, Section):
            return table, named
    return None, False
