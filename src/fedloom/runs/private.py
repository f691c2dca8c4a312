"""What [privacy] of a run file asks for: checked against the method and the clients, and put around both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from fedloom import describe, methods
from fedloom.client import Client
from fedloom.core import Method
from fedloom.data.tokenize import Encoded
from fedloom.errors import ConfigError
from fedloom.runs.config import RunConfig
from fedloom.simulation import Simulation


def need_installed(package: str) -> None:
    """Raise ConfigError if a package of the extra `privacy` is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"[privacy] needs {package}, which is not installed: pip install 'fedloom[privacy]'")


def check_method(config: RunConfig, method: Method) -> None:
    """Raise ConfigError if [privacy] cannot be kept with this method or engine."""
    c = config.privacy
    if c is None:
        return
    need_installed("cryptography")
    if c.secure_aggregation:
        _check_sums(config, method)


def _check_sums(config: RunConfig, method: Method) -> None:
    if config.engine.name != "inprocess":
        raise ConfigError(
            f"privacy.secure_aggregation is not built for engine.name = {config.engine.name!r} yet: set it to 'inprocess', or "
            "secure_aggregation to false"
        )
    if why := describe.sum_obstacle(method):
        fit = [name for name in methods.names() if describe.describe(name).secure_sum == "yes"]
        raise ConfigError(
            f"privacy.secure_aggregation hides single uploads, and {method.name} needs them ({why}). "
            f"Methods that fit: {', '.join(fit)}"
        )


def check_clients(config: RunConfig, clients: Sequence[Client]) -> None:
    """Raise ConfigError if [privacy] cannot be kept with these clients."""
    c = config.privacy
    if c is not None and c.secure_aggregation:
        asked = max(1, round(config.clients.fraction * len(clients)))
        if asked < c.min_clients:
            raise ConfigError(
                f"privacy.min_clients is {c.min_clients}, but a round asks {asked} clients: no sum would be opened. "
                "Have more clients or a larger clients.fraction"
                + ("" if asked < 2 else f", or set min_clients to {asked} if so small a sum may be seen")
            )


def engine(config: RunConfig) -> Callable[..., Simulation[Encoded]]:
    """What makes the simulator that keeps [privacy]."""
    c = config.privacy
    if c is None or not c.secure_aggregation:
        return Simulation
    from fedloom.privacy.secure_visits import SecureSimulation, SecureSums

    sums = SecureSums(least=c.min_clients, cover=c.min_cover, limit=c.limit, bits=c.bits)

    def secure(*args: Any, **options: Any) -> Simulation[Encoded]:
        made = SecureSimulation[Encoded](*args, **options)
        made.sums = sums
        return made

    return secure
