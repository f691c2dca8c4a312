"""What [privacy] of a run file asks for: checked against the method and the clients, and put around both."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

from fedloom import describe, methods, sampling
from fedloom.client import Client
from fedloom.core import Method
from fedloom.data.tokenize import Encoded
from fedloom.errors import ConfigError
from fedloom.flows import Over
from fedloom.loop import Limits
from fedloom.runs.config import RunConfig
from fedloom.runs.privacy_section import PrivacySection
from fedloom.simulation import Simulation


def need_installed(package: str) -> None:
    """Raise ConfigError if a package of the extra `privacy` is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"[privacy] needs {package}, which is not installed: pip install 'fedloom[privacy]'")


def around(config: RunConfig, method: Method) -> Method:
    """The method with what [privacy] puts over it. Raises ConfigError if it cannot go there."""
    c = config.privacy
    if c is None or not (c.secure_aggregation or c.unit):
        return method
    need_installed("cryptography")
    if c.unit != "client":
        return method
    from fedloom.privacy.client_level import ClientLevel

    if c.clipping == "auto" and config.task.proxy_data is None:
        raise ConfigError(
            "privacy.clip is 'auto', the norm of what the server changes on rows of its own: name them, task.proxy_data "
            "(public ones, about as many as a client has), or set clip to a number"
        )
    z = noise_multiplier(config, ())
    return ClientLevel(over=method, clip=c.first_clip, noise_multiplier=z, clipping=c.clipping, noise=c.noise)


def bare(config: RunConfig, method: Method) -> Method:
    """The method without what [privacy] put over it: its clients send the same numbers."""
    c = config.privacy
    return method.over if c is not None and c.unit == "client" and isinstance(method, Over) else method


def grid(config: RunConfig) -> float:
    """Steps of the integer grid that a release of noise from the clients has at least; 0 for noise from elsewhere."""
    from fedloom.privacy.client_noise import GRID

    return GRID if config.privacy is not None and config.privacy.noise == "clients" else 0.0


def noise_multiplier(config: RunConfig, clients: Sequence[Client]) -> float:
    """The noise of [privacy]: what it says, or what keeps all rounds to its target. Rows are protected at every client."""
    from fedloom.privacy.accountant import Release, epsilon
    from fedloom.privacy.accountant import noise_multiplier as calibrated

    c, rounds = config.privacy, max(1, config.train.rounds)
    assert c is not None
    if c.noise_multiplier is not None:
        return c.noise_multiplier
    assert c.target_epsilon is not None
    if c.unit == "client":
        return calibrated(c.target_epsilon, c.delta, rounds, grid=grid(config))
    found = 0.0
    for steps, rate in sorted({steps_and_rate(config, client) for client in clients}, key=lambda x: -x[0] * x[1] ** 2):
        if not found or epsilon([Release(found, steps * rounds, rate)], c.delta) > c.target_epsilon:
            found = calibrated(c.target_epsilon, c.delta, steps * rounds, rate)
    return found


def steps_and_rate(config: RunConfig, client: Client) -> tuple[int, float]:
    """(steps of a client in a round, probability of a row to be in one)."""
    from fedloom.privacy.example_level import sampling_rate

    train = config.train
    epoch = math.ceil(client.examples / train.batch_size)
    steps = train.local_steps or epoch * (train.local_epochs or 1)
    return steps, sampling_rate(client.examples, train.batch_size)


def _check_rows(config: RunConfig, method: Method) -> None:
    """Raise ConfigError for what has no gradient for each row."""
    need_installed("dp_accounting")
    if config.engine.name == "ray":
        raise ConfigError(
            f"privacy.unit = 'example' is not built for engine.name = {config.engine.name!r} yet: set it to 'inprocess'"
        )
    for name, value in (("lora.dropout", config.lora.dropout), ("train.base_dropout", config.train.base_dropout)):
        if value:
            raise ConfigError(f"privacy.unit = 'example' has no dropout, got {name} = {value}: remove it")
    if method.needs_proxy_data:
        raise ConfigError(
            f"privacy.unit = 'example' has noise in every step, and {method.name} trains on the server's own rows too: "
            "choose another method"
        )


def check_method(config: RunConfig, method: Method) -> None:
    """Raise ConfigError if [privacy] cannot be kept with this method or engine."""
    c = config.privacy
    if c is None:
        return
    if config.clients.max_norm is not None and (c.secure_aggregation or c.unit):
        raise ConfigError(
            f"clients.max_norm is {config.clients.max_norm:g}, and under [privacy] no upload is looked at by itself: "
            "remove it, and clip at the client: privacy.unit = 'client', or [method] name = \"clip_updates\" over yours"
        )
    if c.canaries and (config.task.kind != "classification" or config.engine.name == "flower"):
        raise ConfigError(
            "privacy.canaries get a random class, in the simulator: they need task.kind = 'classification' and engine.name = "
            "'inprocess' or 'ray'; set canaries to 0"
        )
    if c.noise == "clients" and config.engine.name != "inprocess":
        raise ConfigError(
            f"privacy.noise = 'clients' is not built for engine.name = {config.engine.name!r} yet: set it to 'server', or "
            "engine.name to 'inprocess'"
        )
    if c.unit == "client" and config.engine.wire != "float32":
        raise ConfigError(
            f"engine.wire is {config.engine.wire!r}, but under privacy.unit = 'client' noise is made for changes as clients "
            "clipped them, which rounding on the wire would make longer: remove it"
        )
    if c.unit == "example":
        _check_rows(config, method)
    if c.secure_aggregation:
        _check_sums(config, method)


def _check_sums(config: RunConfig, method: Method) -> None:
    if config.engine.wire != "float32":
        raise ConfigError(
            f"engine.wire is {config.engine.wire!r}, but secure sums are of integers, which no rounding may touch: remove it "
            "(privacy.bits = 32 halves their bytes)"
        )
    if why := describe.sum_obstacle(method):
        fit = [name for name in methods.names() if describe.describe(name).secure_sum == "yes"]
        raise ConfigError(
            f"privacy.secure_aggregation hides single uploads, and {method.name} needs them ({why}). "
            f"Methods that fit: {', '.join(fit)}"
        )


def check_delta(config: RunConfig, clients: Sequence[Client]) -> None:
    """Raise ConfigError if privacy.delta is too large for these clients."""
    c = config.privacy
    if c is not None and c.unit is not None:
        n, what = (
            (len(clients), "clients")
            if c.unit == "client"
            else min((client.examples, f"rows of client {client.id!r}") for client in clients)
        )
        if c.delta > 1 / n:
            raise ConfigError(
                f"privacy.delta is {c.delta:g}, above 1 / {n} ({n} {what}): such a promise holds where one of them is "
                f"published whole. Set it below {1 / n:.2g}, far below if you can"
            )


def check_clients(config: RunConfig, clients: Sequence[Client]) -> None:
    """Raise ConfigError if [privacy] cannot be kept with these clients."""
    c = config.privacy
    check_delta(config, clients)
    asked = sampling.count(config.clients.fraction, len(clients))
    if c is not None and c.clipping == "adaptive":
        from fedloom.privacy.clip_bound import check_count

        check_count(noise_multiplier(config, clients), asked)
    if c is not None and c.noise == "clients" and not isinstance(c.clip, str):
        _check_grid(c, c.clip, asked)
    if c is not None and c.secure_aggregation and asked < c.min_clients:
        raise ConfigError(
            f"privacy.min_clients is {c.min_clients}, but a round asks {asked} clients: no sum would be opened. "
            "Have more clients or a larger clients.fraction"
            + ("" if asked < 2 else f", or set min_clients to {asked} if so small a sum may be seen")
        )


def _check_grid(c: PrivacySection, clip: float, clients: int) -> None:
    from fedloom.privacy.client_noise import GRID
    from fedloom.privacy.fixed_point import FixedPoint

    steps = clip * 2.0 ** FixedPoint(clients, c.limit, c.bits).fraction
    if steps < 10 * GRID:
        raise ConfigError(
            f"privacy.noise is 'clients', whole numbers on the secure sum's grid, and privacy.clip is {steps:.3g} steps of it, "
            f"expected at least {10 * GRID:g}: set privacy.bits to 64, or a smaller privacy.limit"
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


def limits(config: RunConfig) -> Limits:
    """What uploads must keep to. Under [privacy] none is held against the others: it cannot be seen, or would tell of them."""
    c = config.clients
    if config.privacy is None or not (config.privacy.secure_aggregation or config.privacy.unit):
        return Limits(c.max_norm, c.max_ratio, config.engine.quorum)
    return Limits(None, None, config.engine.quorum)
