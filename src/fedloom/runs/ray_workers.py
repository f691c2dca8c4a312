"""A run whose clients are trained by workers over Ray: what each of them loads, and that all of them hold the same."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from fedloom.data import hub
from fedloom.errors import ConfigError
from fedloom.ray import cluster, pickles, worker
from fedloom.ray.pool import Pool
from fedloom.ray.remote_trainer import RemoteTrainer
from fedloom.ray.worker import Hello
from fedloom.runs import memory
from fedloom.runs.config import RunConfig
from fedloom.runs.experiment import Elsewhere, Experiment, base_of, device_of, dtype_of, trainer_of
from fedloom.train.trainer import Trainer


def check_startable(config: RunConfig) -> None:
    """Raise ConfigError if Ray is not installed, its cluster does not answer, or it is too small for the workers."""
    cluster.check(config.engine.address)
    _crew(config)


@contextmanager
def connected(e: Experiment, on_status: Callable[[str], None]) -> Iterator[tuple[Experiment, Pool]]:
    """The workers of a run while the block lasts, and the experiment as they train it.

    Raises ConfigError if they do not all hold the model that this process holds.
    """
    c = e.config
    on_status("starting Ray and its workers")
    with cluster.connected(c.engine.address):
        crew = _crew(c)
        make = partial(load, c, max(1, len(e.tables.labels)), list(e.sites), c.engine.threads or crew.cpus)
        actor = worker.actor(crew.cpus, crew.gpus)
        actors = [actor.remote(pickles.dumps(make), [*sys.path, os.getcwd()]) for _ in range(crew.workers)]
        try:
            said = worker.hellos(actors, c.engine.patience_s)
            for one in said:
                _check(one, said[0], e)
            pool = Pool(actors, c.engine.patience_s, lambda one: _check(one, said[0], e))
            yield (
                replace(e, device=torch.device(said[0].device), dtype=said[0].dtype, elsewhere=_where(said, pool)),
                pool,
            )
        finally:
            worker.end(actors)


def load(config: RunConfig, labels: int, sites: list[str], threads: int) -> tuple[Trainer, Hello]:
    """A worker's trainer, made where the worker is. Raises ConfigError or ModelError."""
    hub.quiet()
    torch.set_num_threads(threads)
    device = device_of(config)
    dtype = dtype_of(config, device)
    base = base_of(config, labels, device, dtype)
    trainer = trainer_of(config, base, sites, device, dtype)
    host, process = worker.here()
    return trainer, Hello(host, process, device.type, dtype, base.sha256, memory.free(device))


def _crew(config: RunConfig) -> cluster.Crew:
    c = config.engine
    return cluster.crew(cluster.resources(c.address), c.workers, c.threads, config.model.device)


def _check(one: Hello, first: Hello, e: Experiment) -> None:
    if one.model != e.base.sha256:
        raise ConfigError(f"the worker at {one.host} has another base model than this process: its sha256 differs")
    if (one.device, one.dtype) != (first.device, first.dtype):
        raise ConfigError(
            f"the worker at {one.host} computes in {one.dtype} on {one.device}, the one at {first.host} in {first.dtype} on "
            f"{first.device}: set model.device and model.dtype to what all of them have"
        )


def _where(said: Sequence[Hello], pool: Pool) -> Elsewhere:
    """Memory of a processor is shared by the workers of its host."""
    hosts = Counter(one.host for one in said)
    free = [one.free // (hosts[one.host] if one.device == "cpu" else 1) for one in said if one.free is not None]
    return Elsewhere(len(said), min(free, default=None), RemoteTrainer(pool))
