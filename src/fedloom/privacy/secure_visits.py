"""An engine that gives sums alone: the simulator, with the secure sum's real messages between its clients and the server.

Each client checks its own upload, for nobody else can, encodes weight * spread(upload) and masks it; the server adds masked
words and opens the sum of those who answered. A coordinate that fewer than `cover` clients train would be read off the sum:
all who could tell it apart send there what they received, as if they had not trained it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedloom.core import Client, Exchange, Failure, Method, Round, State
from fedloom.engine import Answer, Job, Total
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.contribution import contribution
from fedloom.privacy.exchange import Aggregator, Party, Shares, shares_size
from fedloom.privacy.keys import RunKey
from fedloom.privacy.memory import Memory
from fedloom.privacy.secret import derive
from fedloom.privacy.sum_plan import Rule, SumPlan, planned
from fedloom.simulation import LocalVisits, Simulation

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class SecureSums(Rule):
    """How a run's sums are made, and the keys of its clients, which all live in this process."""

    run: str = field(default_factory=lambda: os.urandom(8).hex())
    keys: dict[str, RunKey] = field(default_factory=dict, repr=False)
    memory: Memory = field(default_factory=Memory, repr=False)

    def public(self, clients: Iterable[Client]) -> dict[str, bytes]:
        """Client id -> public key; who has no key yet gets one."""
        return {client.id: self.keys.setdefault(client.id, RunKey()).public for client in clients}


class SecureSimulation(Simulation[Rows]):
    """The simulator under secure sums. `sums` is set once it is made."""

    sums: SecureSums

    def visits(self, method: Method, round: Round) -> LocalVisits[Rows]:
        return SecureVisits(self, method, round, self.sums)


class SecureVisits(LocalVisits[Rows]):
    """A round's visits, whose uploads come as one sum."""

    def __init__(self, engine: Simulation[Rows], method: Method, round: Round, sums: SecureSums) -> None:
        super().__init__(engine, method, round)
        self.sums, self._part, self._live = sums, 0, round.clients

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        sums, keys = self.sums, self.sums.public(self._live)
        plan = planned(self.method, x, self._live, self.round.sites, sums, sums.run, self.round.t, self._part, keys)
        at = _OneSum(self, plan)
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

    def __init__(self, visits: SecureVisits[Any], plan: SumPlan) -> None:
        self.visits, self.plan = visits, plan
        self.clients = {client.id: client for client in visits._live}
        self.server = Aggregator(plan.terms)
        self.parties: dict[str, Party] = {}
        self.sizes: dict[str, dict[str, int]] = {}

    def add(self, answer: Answer, received: State) -> Failure | None:
        """What one client does with its upload, and what the server does with the words; or why the client sends none."""
        client, sums, plan = answer.client, self.visits.sums, self.plan
        visit = self.visits.engine.visit(client, self.visits.round.t)
        try:
            words = contribution(
                self.visits.method,
                answer.state,
                received,
                visit,
                fixed=plan.terms.fixed,
                share=plan.shares[client.id],
                thin=plan.thin,
                layout=plan.layout.digest,
            )
        except ValueError as error:
            return Failure(client, str(error))
        if plan.noise is not None:
            words = words + plan.noise.draw(words, self._noise_key(client), plan.terms.t, plan.terms.part)
        party = Party(client.id, sums.keys[client.id], plan.terms, sums.memory)
        masked = party.mask(words)
        self.server.take(client.id, masked)
        self.parties[client.id] = party
        self.sizes[client.id] = plan.sizes() | {"masks": self.server.overhead(client.id)}
        return None

    def open(self) -> Total:
        """The second message: all who sent masked words open their sum. Raises RoundError if there are too few."""
        present = self.server.present
        self.server.require_enough()
        answers: dict[str, Shares] = {}
        for i in present:
            answers[i] = self.parties[i].unmask(present, self.server.boxes_for(i))
            self.sizes[i]["masks"] += shares_size(answers[i])
        state = self.plan.state(self.server.open(answers))
        if self.plan.noise is not None:
            std = self.plan.noise.std(len(present)) * 2.0**-self.plan.terms.fixed.fraction * self.plan.largest
            self.visits.round.report["noise_std"] = std / len(present)
        return Total(tuple(self.clients[i] for i in present), state, self.sizes)

    def _noise_key(self, client: Client) -> bytes:
        """Each client's own, all of one secret here."""
        method = self.visits.method
        key = method.key if isinstance(method, ClientLevel) else None
        return derive(key or os.urandom(32), "client", client.id)
