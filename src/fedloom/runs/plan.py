"""What a run file says of method and budgets, checked before anything is read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom import methods
from fedloom.client import BUDGETS, Client, whole_budget
from fedloom.core import Method
from fedloom.data import metrics
from fedloom.errors import ConfigError
from fedloom.runs import private
from fedloom.runs.config import RunConfig
from fedloom.text import shown


@dataclass(frozen=True)
class Plan:
    """A configuration with its method and the budgets that are cycled over its clients."""

    config: RunConfig
    method: Method
    budgets: dict[str, list[Any]]
    """Field of `Client` -> values."""

    def clients(self, partition: Mapping[str, list[int]]) -> list[Client]:
        """The clients of a partition, with budgets cycled in the order of their ids."""
        return [self._client(key, len(rows), i) for i, (key, rows) in enumerate(sorted(partition.items()))]

    def _client(self, key: str, examples: int, i: int) -> Client:
        return Client(key, examples, **{name: values[i % len(values)] for name, values in self.budgets.items()})


def plan(config: RunConfig) -> Plan:
    """The plan of a configuration. Raises ConfigError for a method, field or budget that is wrong."""
    lora = {"rank": config.lora.rank, "alpha": config.lora.alpha, "rslora": config.lora.rslora}
    table = config.method.model_dump()
    with own_methods(table):
        method = private.around(config, methods.build(table, lora))
    budgets = {name: _budget(config, name, method) for name in BUDGETS}
    made = Plan(config, method, budgets)
    metrics.check(config.task.metrics or [], config.task.kind)
    for i in range(max(map(len, budgets.values()))):
        method.check(made._client("any", 1, i))
    if method.needs_proxy_data and config.task.proxy_data is None:
        raise ConfigError(f"{method.name} trains on the server in some rounds: name its rows, task.proxy_data")
    private.check_method(config, method)
    return made


@contextmanager
def own_methods(table: Mapping[str, Any]) -> Iterator[None]:
    """Find `own_method:Damped` in the current folder too, after all that is installed: only where a run file names one."""
    here = os.getcwd()
    if here in sys.path or not any(":" in str(t.get("name")) for t in _tables(table)):
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _tables(table: object) -> Iterator[Mapping[str, Any]]:
    """A method's table, and those under it."""
    while isinstance(table, Mapping):
        yield table
        table = table.get("over")


def _budget(config: RunConfig, name: str, method: Method) -> list[Any]:
    key = BUDGETS[name].key
    value = getattr(config.clients, key)
    if value is None:
        return [whole_budget(method, name)]
    if isinstance(value, str):
        return _allocated(config, name, Path(value))
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ConfigError(f"clients.{key} is an empty list, expected at least one budget")
    return values


def _allocated(config: RunConfig, name: str, path: Path) -> list[float]:
    """The values that `fedloom allocate` planned, one for each device."""
    where = f"clients.{BUDGETS[name].key}"
    try:
        rates = json.loads(path.read_text())[name]
        if not isinstance(rates, dict) or not all(type(rate) in (int, float) for rate in rates.values()):
            raise TypeError(f"{name} is {shown(rates)}, expected device -> number")
    except FileNotFoundError:
        raise ConfigError(
            f"{where} names the allocation {str(path)!r}, which does not exist: make it with "
            f"`fedloom allocate FLEET.toml --out {path}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {shown(str(path))} is no allocation ({error}), expected JSON with a table {name}"
        ) from None
    if config.clients.count is not None and len(rates) != config.clients.count:
        raise ConfigError(
            f"{where}: {str(path)!r} plans {len(rates)} devices, expected {config.clients.count} (clients.count)"
        )
    return list(rates.values())


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with local files and directories as absolute paths, so that a run can be resumed from anywhere."""

    def resolve(name: str | None) -> str | None:
        if name is None:
            return None
        try:
            if "\0" in name:  # exists() says no in some versions of Python, and raises in others
                raise ValueError("it has a zero byte")
            return str(Path(name).resolve()) if Path(name).exists() else name
        except (OSError, ValueError) as error:  # longer than a name may be, not to be read, or with a NUL in it
            why = getattr(error, "strerror", None) or error  # without the name, which may be long
            raise ConfigError(f"{shown(name)} is no path that can be read: {why}") from None

    values = config.model_dump()
    values["model"]["name"] = resolve(config.model.name)
    for key in ("data", "eval_data", "proxy_data"):
        values["task"][key] = resolve(values["task"][key])
    for budget in BUDGETS.values():
        if isinstance(values["clients"][budget.key], str):
            values["clients"][budget.key] = resolve(values["clients"][budget.key])
    if config.privacy is not None:
        values["privacy"]["roster"] = resolve(config.privacy.roster)
    if config.network is not None:
        values["network"] = {key: resolve(name) for key, name in values["network"].items()}
    return RunConfig.model_validate(values)
