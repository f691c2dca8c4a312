"""An engine that gives sums alone: every client adds masks that cancel to weight * spread(upload), in 64-bit fixed point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedloom.core import Client, Each, Exchange, Failure, Method, Round, State
from fedloom.engine import Answer, Job, Total
from fedloom.rng import generator
from fedloom.simulation import LocalVisits, Simulation
from fedloom.state import Group

from .cases import Rows

BITS = 36
"""Of the fraction: sums up to 2^27 fit."""


def masked(x: Tensor, index: int, count: int, key: tuple[int | str, ...]) -> Tensor:
    """One client's fixed-point numbers under its pairwise masks, which cancel over all `count` clients; int64 wraps around."""
    fixed = (x.double() * 2.0**BITS).round().to(torch.int64)
    for other in range(count):
        if other != index:
            rng = generator("pair", min(index, other), max(index, other), *key)
            mask = torch.randint(-(2**62), 2**62, x.shape, generator=rng)
            fixed = fixed + mask if index < other else fixed - mask
    return fixed


class SecureSum(Simulation[Rows]):
    """Clients' masked uploads are added up here; the loop sees one Total."""

    arrived: list[tuple[Client, State]]
    """Every masked upload, for tests that look at what the server sees."""

    def visits(self, method: Method, round: Round) -> LocalVisits[Rows]:
        self.arrived = []
        return _SecureVisits(self, method, round)


class _SecureVisits(LocalVisits[Rows]):
    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        pairs = list(jobs)
        received = {client.id: state for client, state in pairs}
        answers = [a for a in super().exchange(pairs, x) if isinstance(a, Answer)]
        if isinstance(x, Each):  # nothing can be summed: the loop says so
            yield Total(tuple(a.client for a in answers), {}, {})
            return
        total: dict[str, Group] = {}
        sizes: dict[str, dict[str, int]] = {}
        for i, answer in enumerate(answers):
            visit = self.engine.visit(answer.client, self.round.t)
            wide = self.method.spread(answer.state, received[answer.client.id], visit)
            weight = x.weight(answer.client)
            hidden = {
                role: {
                    site: masked(v * weight, i, len(answers), (self.round.t, role, site)) for site, v in group.items()
                }
                for role, group in wide.items()
            }
            for role, group in hidden.items():
                into = total.setdefault(role, {})
                for site, v in group.items():
                    into[site] = into[site] + v if site in into else v
            sizes[answer.client.id] = {role: sum(v.nbytes for v in group.values()) for role, group in hidden.items()}
            self._arrived().append((answer.client, hidden))
        state = {
            role: {site: (v.double() / 2.0**BITS).to(wide[role][site].dtype) for site, v in group.items()}
            for role, group in total.items()
        }
        yield Total(tuple(a.client for a in answers), state, sizes)

    def _arrived(self) -> list[tuple[Client, State]]:
        assert isinstance(self.engine, SecureSum)
        return self.engine.arrived
