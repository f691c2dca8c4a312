"""A TOML file into a pydantic model: read, validate, and say every wrong key in words.

>>> from pydantic import BaseModel, ConfigDict
>>> class Train(BaseModel):
...     model_config = ConfigDict(extra="forbid")
...     rounds: int
>>> validate(Train, {"rounds": 3, "round": 5}, "run.toml")
Traceback (most recent call last):
    ...
fedloom.errors.ConfigError: run.toml: unknown key 'round'; did you mean 'rounds'?; known here: rounds
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedloom.errors import ConfigError, nearest
from fedloom.text import printable, shortened, shown

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str | int, ...]
"""Names of tables and keys from the top of the file, with numbers for the entries of an array of tables."""
DEEPEST = 32
"""Tables and arrays in each other."""


def read_toml(path: Path, missing: str) -> dict[str, Any]:
    """The values of a TOML file. Raises ConfigError if it cannot be read; `missing` says so where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return loads(text, str(path))


def loads(text: str, source: str) -> dict[str, Any]:
    """The values of a TOML text. Raises ConfigError if it is none, or nested too deeply, or has a number beyond 64 bits."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply, expected at most {DEEPEST} tables in each other") from None
    except ValueError as error:  # a TOMLDecodeError, or an integer of thousands of digits
        raise ConfigError(f"{source} is not valid TOML: {error}") from None
    check_size(values, source)
    return values


def check_size(values: object, source: str) -> None:
    """Raise ConfigError for values that are nested too deeply, and for integers that TOML does not have."""
    level: list[tuple[str, object]] = [("it", values)]
    for _ in range(DEEPEST):
        inner: list[tuple[str, object]] = []
        for name, value in level:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                key = shortened(printable(name), 100)
                raise ConfigError(f"{source}: {key} is an integer of more than 64 bits, expected a smaller one")
            if isinstance(value, Mapping):
                inner += [(str(key), x) for key, x in value.items()]
            elif isinstance(value, list | tuple):
                inner += [(name, x) for x in value]
        level = inner
    if level:
        raise ConfigError(f"{source} is nested too deeply, expected at most {DEEPEST} tables in each other")


def validate(model: type[Model], values: Mapping[str, Any], source: str = "") -> Model:
    """A model from nested values. Raises one ConfigError that names every wrong key, after the name of their source."""
    check_size(values, source or "the input")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A union reports one error for each of its members: the first of those that got furthest says enough.
        told: dict[Key, ErrorDetails] = {}
        for detail in error.errors():
            key = _key(detail, values)
            if key not in told or len(detail["loc"]) > len(told[key]["loc"]):
                told[key] = detail
        lines = [_explain(model, key, detail, values) for key, detail in told.items()]
        raise ConfigError(f"{source}: {itemised(lines)}" if source else itemised(lines)) from None


def itemised(lines: Sequence[str]) -> str:
    """One line, or each of them below the other behind a dash."""
    return lines[0] if len(lines) == 1 else "".join(f"\n  - {line}" for line in lines)


def _key(detail: ErrorDetails, values: object) -> Key:
    """Where in the file it is: pydantic's location without the members of unions, and no further than a value."""
    key: list[str | int] = []
    at = values
    for part in detail["loc"]:
        if isinstance(at, Mapping) and isinstance(part, str):
            at = at.get(part)
        elif isinstance(at, list) and isinstance(part, int) and isinstance(at[part], Mapping):
            at = at[part]
        else:
            break
        key.append(part)
    return tuple(key)


def _explain(model: type[BaseModel], key: Key, detail: ErrorDetails, values: Mapping[str, Any]) -> str:
    name, place = (shortened(x, 100) for x in _named(key, values))
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(model, key[:-1])
        return f"unknown key {shown(name)}{place}{nearest(str(key[-1]), known)}; known here: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{name}{place} is missing, and has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{name}{place}: {message}" if key else message
    return f"{name}{place}: got {shown(detail['input'])}, {message.replace('Input should be', 'expected')}"


def _named(key: Key, values: object) -> tuple[str, str]:
    """A key in words: `limits.latency_s`; `power_w` and ` of device 'near'` within an array of tables."""
    name: list[str] = []
    place = ""
    for part in key:
        if isinstance(part, int):
            values = values[part] if isinstance(values, list) else None
            entry = values.get("id") if isinstance(values, Mapping) else None
            place = f" of {'.'.join(name)} " + (f"number {part + 1}" if entry is None else repr(entry))
            name = []
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
            name.append(part)
    return ".".join(name), place


def known_keys(model: type[BaseModel], key: Sequence[str | int]) -> list[str]:
    """The keys of the table at `key`."""
    table: Any = model
    for part in key:
        if isinstance(part, str):
            fields = table.model_fields if issubclass(table, BaseModel) else table.__dataclass_fields__
            table = _table_of(fields[part].annotation)
    return list(table.model_fields) if issubclass(table, BaseModel) else [f.name for f in dataclasses.fields(table)]


def _table_of(annotation: Any) -> Any:
    """The model in an annotation such as `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_of(part)) is not None), None)
