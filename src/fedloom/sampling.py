"""Client sampling: who takes part in a round, a function of the seed and the round alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedloom.core import Client
from fedloom.rng import generator

Sampler = Callable[[list[Client], int], list[Client]]
"""(clients, round) -> the clients that take part."""


def all_clients(clients: list[Client], t: int) -> list[Client]:
    """The sampler that takes every client."""
    return clients


def count(share: float, clients: int) -> int:
    """How many of so many clients a round asks: a share of them, at least one."""
    return max(1, round(share * clients))


def panel(clients: list[Client], most: int, seed: int) -> list[Client]:
    """The clients whose own models are scored, in their order: drawn once for a run, so that a curve has one population."""
    if len(clients) <= most:
        return clients
    order = torch.randperm(len(clients), generator=generator(seed, "panel"))
    return [clients[i] for i in order[:most].sort().values.tolist()]


def fraction(share: float, seed: int) -> Sampler:
    """A sampler that takes a share of the clients, at least one, uniformly: keyed by (seed, t), with no state."""

    def sample(clients: list[Client], t: int) -> list[Client]:
        order = torch.randperm(len(clients), generator=generator(seed, t, "sample"))
        return [clients[i] for i in order[: count(share, len(clients))].tolist()]

    return sample if share < 1 else all_clients
