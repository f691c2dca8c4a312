"""The keys of a run file as the configuration declares them: name, default, type and meaning, for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.errors import ConfigError, nearest
from fedloom.runs.config import RunConfig


@dataclass(frozen=True)
class Key:
    """One key of a run file."""

    name: str
    default: Any
    """None: unset, which TOML says by leaving the key out."""
    required: bool
    type: str
    """With its bounds, such as `float, above 0`."""
    meaning: str


@dataclass(frozen=True)
class Section:
    """One table of a run file; the first has no name."""

    name: str
    about: str
    keys: tuple[Key, ...]


def sections() -> dict[str, Section]:
    """Every section by name; "" are the keys above all sections.

    >>> [key.name for key in sections()["run"].keys]
    ['keep_checkpoints']
    """
    models = {name: model for name, field in RunConfig.model_fields.items() if (model := _model(field))}
    top = {name: field for name, field in RunConfig.model_fields.items() if name not in models}
    found = {"": Section("", "Above all sections.", tuple(_keys(top)))}
    for name, model in models.items():
        about = " ".join((model.__doc__ or "").split("\n\n")[0].partition("]")[2].lstrip(": ").split())
        found[name] = Section(name, about[:1].upper() + about[1:], tuple(_keys(model.model_fields)))
    return found


def _model(field: FieldInfo) -> type[BaseModel] | None:
    candidates = (field.annotation, *get_args(field.annotation))
    return next((x for x in candidates if isinstance(x, type) and issubclass(x, BaseModel)), None)


def _keys(fields: dict[str, FieldInfo]) -> Iterable[Key]:
    for name, field in fields.items():
        default = None if field.is_required() else field.default
        kind = ", ".join([words(field.annotation), *bounds(field.metadata)])
        yield Key(name, default, field.is_required(), kind, " ".join((field.description or "").split()))


def words(annotation: Any) -> str:
    """A type in words; "unset" is no type of TOML.

    >>> words(Literal["a", "b"]), words(int | list[int] | None)
    ('"a" | "b"', 'int | list of int')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(inner[0])
    if origin is Literal:
        return " | ".join(json.dumps(x) for x in inner)
    if origin in (Union, UnionType):
        return " | ".join(words(x) for x in inner if x is not type(None))
    if origin is list:
        return f"list of {words(inner[0])}"
    return {str: "text", bool: "true | false"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(metadata: Iterable[Any]) -> Iterable[str]:
    """The limits of a number in words."""
    names = {annotated_types.Gt: "above", annotated_types.Ge: "at least", annotated_types.Lt: "below"}
    for limit in metadata:
        if isinstance(limit, annotated_types.Gt | annotated_types.Ge | annotated_types.Lt | annotated_types.Le):
            yield f"{names.get(type(limit), 'at most')} {astuple(limit)[0]:g}"


def print_keys(console: Console, name: str | None) -> None:
    """All sections, or one of them. Raises ConfigError for a section that there is not."""
    found = sections()
    if name is not None and name not in found:
        known = [each for each in found if each]
        raise ConfigError(f"there is no section {name!r}{nearest(name, known)}; a run file has {', '.join(known)}")
    for section in found.values() if name is None else [found[name]]:
        heading = Text(f"[{section.name}]  " if section.name else "", style="bold")
        console.print(heading.append(section.about, style="not bold"), _table(section), sep="\n")


def _table(section: Section) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for key in section.keys:
        default = "required" if key.required else "unset" if key.default is None else json.dumps(key.default)
        about = Text(default).append(f"  {key.type}", style="dim").append(f"\n{key.meaning}")
        table.add_row(Text(f"  {key.name}"), about)
    return table
