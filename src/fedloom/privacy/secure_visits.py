"""An engine that gives sums alone: the simulator, with the secure sum's real messages between its clients and the server.

Each client checks its own upload, for nobody else can, encodes weight * spread(upload) and masks it; the server adds masked
words and opens the sum of those who answered. A coordinate that fewer than `cover` clients train would be read off the sum:
all who could tell it apart send there what they received, as if they had not trained it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fedloom.core import Client, Each, Exchange, Failure, Method, Round, State
from fedloom.engine import Answer, Job, Total
from fedloom.errors import MethodError, RoundError
from fedloom.privacy.cover import covered
from fedloom.privacy.exchange import Aggregator, Party, Shares, Terms
from fedloom.privacy.fixed_point import FixedPoint, Layout
from fedloom.privacy.keys import RunKey
from fedloom.privacy.memory import Memory
from fedloom.simulation import LocalVisits, Simulation
from fedloom.spec import reject_reason
from fedloom.state import only

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class SecureSums:
    """How a run's sums are made, and the keys of its clients, which all live in this process."""

    least: int = 3
    """Clients of the smallest sum that is opened."""
    cover: int = 3
    """Clients that must train a coordinate; the others leave it as it was."""
    limit: float = 65536.0
    """Largest size of a number that a client sends, times its share of the largest weight."""
    bits: Literal[32, 64] = 64
    run: str = field(default_factory=lambda: os.urandom(8).hex())
    keys: dict[str, RunKey] = field(default_factory=dict, repr=False)
    memory: Memory = field(default_factory=Memory, repr=False)

    def terms(self, clients: Iterable[Client], t: int, part: int) -> Terms:
        """The terms of one sum of these clients; who has no key yet gets one."""
        keys = {client.id: self.keys.setdefault(client.id, RunKey()).public for client in clients}
        return Terms(self.run, t, keys, FixedPoint(len(keys), self.limit, self.bits), part, least=self.least)


class SecureSimulation(Simulation[Rows]):
    """The simulator under secure sums. `sums` is set once it is made."""

    sums: SecureSums

    def visits(self, method: Method, round: Round) -> LocalVisits[Rows]:
        return _SecureVisits(self, method, round, self.sums)


class _SecureVisits(LocalVisits[Rows]):
    def __init__(self, engine: Simulation[Rows], method: Method, round: Round, sums: SecureSums) -> None:
        super().__init__(engine, method, round)
        self.sums, self._part, self._live = sums, 0, round.clients

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        if isinstance(x, Each):
            raise MethodError(f"{self.method.name} awaits Each: it reads every upload, and a secure sum hides them")
        at = _OneSum(self, x, self.sums.terms(self._live, self.round.t, self._part))
        received: dict[str, State] = {}

        def noted() -> Iterator[Job]:
            for client, state in jobs:
                received[client.id] = state
                yield client, state

        for answer in self.run(noted()):
            sent = received.pop(answer.client.id)
            failed = answer if isinstance(answer, Failure) else at.add(answer, sent)
            if failed is not None:
                yield failed
        total = at.open()
        self._live, self._part = total.clients, self._part + 1
        yield total


class _OneSum:
    """One exchange's sum, with both sides of it."""

    def __init__(self, visits: _SecureVisits[Any], x: Exchange[Any], terms: Terms) -> None:
        self.visits, self.x, self.terms = visits, x, terms
        self.clients = {client.id: client for client in visits._live}
        self.largest = max(x.weight(client) for client in self.clients.values())
        self.server = Aggregator(terms)
        self.parties: dict[str, Party] = {}
        self.layout: Layout | None = None
        self.sizes: dict[str, dict[str, int]] = {}
        self.thin = self._thin()

    def add(self, answer: Answer, received: State) -> Failure | None:
        """What one client does with its upload, and what the server does with the words; or why the client sends none."""
        client, sums = answer.client, self.visits.sums
        if why := reject_reason(self.x.expects(client, received), answer.state):
            return Failure(client, why)
        wide = self._wide(client, answer.state, received)
        self.layout = self.layout or Layout.of(wide)
        try:
            vector = self.layout.vector(wide)
            if self.thin.any():
                vector = torch.where(self.thin, self.layout.vector(self._untrained(client, received)), vector)
            words = self.terms.fixed.encode(vector * (self.x.weight(client) / self.largest))
        except ValueError as error:
            return Failure(client, str(error))
        party = Party(client.id, sums.keys[client.id], self.terms, sums.memory)
        masked = party.mask(words)
        self.server.take(client.id, masked)
        self.parties[client.id] = party
        size = words.element_size()
        self.sizes[client.id] = {role: size * sum(x.numel() for x in g.values()) for role, g in wide.items()}
        self.sizes[client.id]["masks"] = masked.overhead
        return None

    def open(self) -> Total:
        """The second message: all who sent masked words open their sum. Raises RoundError if there are too few."""
        present = self.server.present
        if len(present) < self.terms.least or self.layout is None:
            raise RoundError(
                f"round {self.terms.t}: {len(present)} of {len(self.clients)} clients sent a masked upload, expected at least "
                f"{self.terms.least} (privacy.min_clients). The checkpoint of round {self.terms.t - 1} stands; resume"
            )
        answers: dict[str, Shares] = {}
        for i in present:
            answers[i] = self.parties[i].unmask(present, self.server.boxes_for(i))
            self.sizes[i]["masks"] += sum(len(share) for by in answers[i].values() for share in by.values())
        total = self.terms.fixed.decode(self.server.open(answers)) * self.largest
        return Total(tuple(self.clients[i] for i in present), self.layout.state(total), self.sizes)

    def _wide(self, client: Client, upload: State, received: State) -> State:
        visits = self.visits
        return visits.method.spread(upload, received, visits.engine.visit(client, visits.round.t))

    def _untrained(self, client: Client, received: State) -> State:
        wanted = self.x.expects(client, received)
        return self._wide(client, only(received, *wanted), received)

    def _thin(self) -> Tensor:
        """Which coordinates some clients train, but fewer than a sum needs. Raises RoundError if they cannot be left out."""
        least = min(self.visits.sums.cover, len(self.clients))
        cover: Tensor | None = None
        for client in self.clients.values():
            wide = covered(self.visits.method, self.x, client, self.terms.t, self.visits.round.sites)
            there = Layout.of(wide).vector(wide)
            cover = there if cover is None else cover + there
        assert cover is not None
        thin = (cover > 0) & (cover < least)
        if thin.any() and (why := self._not_skipped()):
            raise RoundError(
                f"round {self.terms.t}: {int(thin.sum())} of {len(thin)} coordinates are trained by fewer than {least} clients "
                f"(privacy.min_cover), whom a sum would tell apart, and {self.visits.method.name} cannot leave them out "
                f"({why}): give clients larger budgets"
            )
        return thin

    def _not_skipped(self) -> str | None:
        for client in self.clients.values():
            received = self.x.send(client)
            wanted = self.x.expects(client, received)
            if why := reject_reason(wanted, only(received, *wanted)):
                return why
        return None
