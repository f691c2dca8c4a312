"""Fields of a dataclass checked by their annotations: types are strict, bounds and choices stand with the field."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields
from functools import cache
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.errors import ConfigError, nearest
from fedloom.text import shown

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@cache
def _adapters(cls: Hashable) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    hints = get_type_hints(cls, include_extras=True)
    plain = {f.name: hints[f.name] for f in fields(cast(Any, cls))}
    # Fields that hold another object, such as the method under a wrapper, are checked by whoever made it.
    return {
        name: (hint, TypeAdapter(hint, config=_STRICT))
        for name, hint in plain.items()
        if not (isinstance(hint, type) and hint.__module__ != "builtins")
    }


def check_fields(instance: Any, what: str) -> None:
    """Raise ConfigError naming the first field whose value is not of its annotation; whole numbers become floats.

    `what` is the owner's name in the message. The instance is a frozen dataclass in its `__post_init__`.
    """
    for name, (hint, adapter) in _adapters(cast(Hashable, type(instance))).items():
        value = getattr(instance, name)
        try:
            object.__setattr__(instance, name, adapter.validate_python(value))
        except ValidationError as error:
            known = get_args(hint) if get_origin(hint) is Literal else ()
            hint_text = nearest(value, known) if known and isinstance(value, str) else ""
            expected = (
                f"one of {', '.join(map(str, known))}"
                if known
                else error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            )
            raise ConfigError(f"{what}: {name} is {shown(value)}{hint_text}; expected {expected}") from None
