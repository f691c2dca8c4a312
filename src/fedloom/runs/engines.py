"""Where the clients of a run are trained: in this process, by its workers over Ray, or on the nodes of a Flower deployment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.checkpoint import ClientStates
from fedloom.engine import Engine
from fedloom.flower.transport import Transport
from fedloom.ray.pool import Pool
from fedloom.runs import evaluate, export, flower_server, private, ray_workers
from fedloom.runs.config import RunConfig
from fedloom.runs.experiment import Experiment
from fedloom.runs.run_directory import RunDirectory


@dataclass(frozen=True)
class Reached:
    """An experiment, and those who train its clients if this process does not."""

    e: Experiment
    transport: Transport | None = None
    pool: Pool | None = None


def name_of(config: RunConfig, transport: Transport | None) -> str:
    """The engine of a run: who has a transport has Flower's."""
    return config.engine.name if transport is None else "flower"


def device(config: RunConfig) -> torch.device | None:
    """Of this process's own model; None for the configuration's. Where workers train, it trains and scores nothing."""
    return torch.device("cpu") if config.engine.name == "ray" else None


def check_startable(config: RunConfig, transport: Transport | None) -> None:
    """Raise ConfigError if what the engine needs is not installed or not there. Writes nothing."""
    if config.engine.name == "ray":
        ray_workers.check_startable(config)
    elif config.engine.name == "flower" and transport is None:
        flower_server.check_startable(config)


@contextmanager
def connected(
    run: RunDirectory,
    e: Experiment,
    transport: Transport | None,
    on_status: Callable[[str], None],
    on_warning: Callable[[str], None],
) -> Iterator[Reached]:
    """Those who train, while the block lasts."""
    name = name_of(e.config, transport)
    if name == "ray":
        with ray_workers.connected(e, on_status) as (there, pool):
            yield Reached(there, pool=pool)
    elif name == "flower" and transport is None:
        with flower_server.connected(run, e, on_status, on_warning) as started:
            yield Reached(e, started)
    else:
        yield Reached(e, transport)


def engine(
    run: RunDirectory,
    reached: Reached,
    client_states: ClientStates,
    cohort: int,
    progress: Callable[[int], None],
    on_status: Callable[[str], None],
) -> tuple[Engine, Experiment]:
    """The engine of a run, and the experiment with the clients that it has."""
    e, pool = reached.e, reached.pool
    away: dict[str, Any] = {} if pool is None else {"drive": pool.drive, "each": pool.each, "notes": pool.notes}
    here = private.engine(e.config)(
        e.trainer,
        e.sites,
        e.rows_of,
        client_states=client_states,
        fresh=e.head,
        cohort=cohort if reached.transport is None else 1,
        proxy=e.server,
        secret=e.config.seed,
        score=lambda works: evaluate.scores(e, works),
        write=lambda client, work: export.write(e, work, run.path / "clients" / client / "adapter"),
        progress=progress,
        **away,
    )
    if reached.transport is None:
        return here, e
    return flower_server.coordinator(reached.transport, run, e, here, on_status)
