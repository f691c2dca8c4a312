"""The Ray cluster of a run: one that is there, or one on this machine for as long as the run lasts."""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.errors import ConfigError
from fedloom.text import shown


@dataclass(frozen=True)
class Resources:
    """What a machine has."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Crew:
    """How many workers, and what Ray keeps for each."""

    workers: int
    cpus: int
    gpus: int


def check(address: str | None) -> None:
    """Raise ConfigError if Ray is not installed, or nothing listens at the address of its cluster."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine.name = 'ray' needs Ray, which is not installed: pip install 'fedloom[ray]'")
    if address is None or address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"engine.address is {shown(address)}, expected host:port of a Ray cluster's head, as in '10.0.0.5:6379', or 'auto' "
            "for the one on this machine"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"engine.address: no Ray cluster answers at {shown(address)} ({error.strerror or error}): start one with "
            "`ray start --head`, or remove engine.address for workers on this machine"
        ) from None


def _ray(address: str | None) -> Any:
    """Ray itself, which reads its environment when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default it tells its makers of every start
    early = sys.modules.get("ray")
    if address is None and (early is None or not early.is_initialized()):
        if early is not None and "RAY_AUTH_MODE" not in os.environ:
            raise ConfigError(
                "Ray was imported before fedloom could ask it for a token, and would let in whoever reaches its ports: set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in the environment, or call ray.init() before fedloom.run"
            )
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    return ray


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray while the block lasts: the cluster at `address`, one that this process has joined already, or a new one.

    Whoever reaches Ray's ports runs code as the user who started it: a new one lets in who has a token that nobody else knows.
    """
    ray = _ray(address)
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "a Ray cluster on this machine" if address is None else f"the Ray cluster at {shown(address)}"
        raise ConfigError(f"{where} cannot be used: {str(error).strip().splitlines()[0][:200]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def resources(address: str | None) -> list[Resources]:
    """Cores and GPUs of each machine of the cluster; of this machine, if Ray is yet to be started on it."""
    ray = _ray(address)
    if address is None and not ray.is_initialized():
        return [Resources(os.cpu_count() or 1, torch.cuda.device_count())]
    with connected(address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Resources(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]


def crew(there: Sequence[Resources], workers: int | None, threads: int | None, device: str) -> Crew:
    """Who these machines can hold: by default a worker for each GPU, or two. Raises ConfigError if they are too small.

    >>> crew([Resources(16, 4)], None, None, "auto")
    Crew(workers=4, cpus=4, gpus=1)
    """
    gpus, cores = sum(x.gpus for x in there), sum(x.cpus for x in there)
    on_gpus = device == "cuda" or (device == "auto" and gpus > 0)
    wanted = workers or (gpus if on_gpus else min(2, cores))
    if on_gpus and not gpus:
        raise ConfigError(
            "model.device is 'cuda', but Ray has no GPU: set it to 'cpu', or engine.address to a cluster with GPUs"
        )
    if on_gpus and wanted > gpus:
        raise ConfigError(f"{wanted} workers want a GPU each, and Ray has {gpus}: lower engine.workers")
    least = min(x.cpus for x in there if x.gpus or not on_gpus)
    cpus = threads or max(1, least // math.ceil(wanted / len(there)))
    if wanted > sum(x.cpus // cpus for x in there):
        raise ConfigError(
            f"{wanted} workers (engine.workers) of {cpus} cores (engine.threads) do not fit into the "
            f"{' + '.join(str(x.cpus) for x in there)} cores that Ray has: lower one of them"
        )
    return Crew(wanted, cpus, int(on_gpus))
