"""Clients and their budgets. A new budget is a field of `Client`, a line in `BUDGETS` and a key of [clients]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from fedloom.errors import ConfigError


@dataclass(frozen=True)
class Client:
    """What the server knows of a client: identity, weight and budgets."""

    id: str
    examples: int
    rank: int
    """Rank of the adapter that the client trains."""
    keep: float = 1.0
    """1 - dropout rate: the share of rows and columns that the client trains."""

    def to_dict(self) -> dict[str, Any]:
        """By field name: in manifests and on the wire."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Client:
        """Inverse of `to_dict`. Raises ValueError for a field that is missing, unknown or of another type."""
        known = {field.name: field for field in fields(Client)}
        if strange := values.keys() - known.keys():
            raise ValueError(f"has {', '.join(sorted(map(str, strange)))}, expected {', '.join(known)}")
        made: dict[str, Any] = {}
        for name, field in known.items():
            if name not in values:
                if field.default is MISSING:
                    raise ValueError(f"has no {name}")
                continue
            kind = {"str": str, "int": int, "float": float}[str(field.type)]
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"has {name} of type {type(value).__name__}, expected {field.type}")
            made[name] = kind(value)
        return Client(**made)


@dataclass(frozen=True)
class Failure:
    """A client that sent nothing usable, and why."""

    client: Client
    reason: str


@dataclass(frozen=True)
class Budget:
    """How a field of `Client` is set and what it may be."""

    key: str
    """Of [clients]: one value, or a list that is cycled over the clients."""
    low: float
    above: bool = False
    """Whether a value must be above `low` rather than at least that."""


BUDGETS = {"rank": Budget("ranks", 1), "keep": Budget("keep", 0.0, above=True)}
"""Field of `Client` -> its budget."""


def whole_budget(method: object, name: str) -> Any:
    """All that a method can use of a budget: its attribute of that name, or else the default of the client's field."""
    default = next(field.default for field in fields(Client) if field.name == name)
    return getattr(method, name) if default is MISSING else default


def check_range(method: object, client: Client, name: str) -> None:
    """Raise ConfigError if a client's budget is out of range, whether the method follows it or not."""
    value, most, budget = getattr(client, name), whole_budget(method, name), BUDGETS[name]
    if value > most or value < budget.low or (budget.above and value == budget.low):
        low = f"a number above {budget.low:g} and at most {most:g}" if budget.above else f"{budget.low:g} to {most:g}"
        raise ConfigError(
            f"client {client.id!r} has {name} {value:g}, expected {low}: change {budget.key} in [clients]"
            + (f", or {name} in [lora]" if hasattr(method, name) else "")
        )


def check_followed(method: object, client: Client, followed: frozenset[str], who: str) -> None:
    """Raise ConfigError if a client has less than the whole of a budget that the method does not follow."""
    for name, budget in BUDGETS.items():
        check_range(method, client, name)
        value, whole = getattr(client, name), whole_budget(method, name)
        if value != whole and name not in followed:
            raise ConfigError(
                f"{who} follows no {name} budget, got {name} {value:g}, expected {whole:g}: "
                f"remove {budget.key} from [clients], or choose a method that follows it (see `fedloom methods`)"
            )
