"""The methods, by name. One file each; a third party's method is named as `"their.module:Class"`."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from fedloom.core import Method
from fedloom.errors import ConfigError, nearest

_KNOWN = {
    "fedit": "FedIT",
    "ffa_lora": "FFALoRA",
    "fedsa_lora": "FedSALoRA",
    "hetlora": "HetLoRA",
    "flexlora": "FlexLoRA",
    "fedex_lora": "FedExLoRA",
    "fslora": "FSLoRA",
    "fedlodrop": "FedLoDrop",
    "fedlora_optimizer": "FedLoRAOptimizer",
}


def names() -> list[str]:
    """The names of all methods.

    >>> "fslora" in names()
    True
    """
    return list(_KNOWN)


def get(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError naming the known ones.

    >>> get("fslora")(rank=8).name
    'fslora'
    """
    if name in _KNOWN:
        module, attribute = f"fedloom.methods.{name}", _KNOWN[name]
    elif ":" in name:
        module, attribute = name.split(":", 1)
    else:
        raise ConfigError(
            f"unknown method {name!r}{nearest(name, _KNOWN)}; known: {', '.join(_KNOWN)}, or your own as 'module:Class'"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"method {name!r} cannot be imported ({error}); expected an importable 'module:Class'"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"{name!r} is not a Method: a method is a subclass of fedloom.core.Method")
    return cls


def build(name: str, **values: Any) -> Method:
    """A method from its name and fields. Raises ConfigError naming the fields it has."""
    cls = get(name)
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"method {name!r} has no field {key!r}{nearest(key, known)}; it has: {', '.join(known)}")
    return cls(**values)


def inner(method: Method, over: str) -> Method:
    """The method that `method` puts its slices over; fields that both have (rank, alpha, weights) are the outer one's.

    Raises ConfigError if that method takes no slices.
    """
    cls = get(over)
    if not cls.sliceable:
        raise ConfigError(
            f"{method.name} cannot go over {over!r}, expected one of {', '.join(n for n in names() if get(n).sliceable)}"
        )
    outer = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "over"}
    return cls(**{f.name: outer[f.name] for f in fields(cls) if f.name in outer})


def choice(method: str, field: str, got: str, *known: str) -> None:
    """Raise ConfigError if a method's field is none of the values known."""
    if got not in known:
        raise ConfigError(f"{method}: {field} is {got!r}{nearest(got, known)}; expected one of {', '.join(known)}")
