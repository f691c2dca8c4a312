"""A run's privacy budget: what its rounds will release, what they did, and where it must stop."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.client import Client
from fedloom.errors import RoundError, RunError
from fedloom.loop import Record
from fedloom.privacy.accountant import Release, epsilon
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.example_level import Private
from fedloom.privacy.ledger import Entry, Ledger
from fedloom.privacy.noise import digest
from fedloom.privacy.secret import secret_file
from fedloom.runs import canaries, private
from fedloom.runs.experiment import Experiment
from fedloom.runs.privacy_section import PrivacySection
from fedloom.state import State


def affordable(after: Callable[[int], float], rounds: int, most: float) -> int:
    """How many of so many rounds keep epsilon, which grows with them, at `most`."""
    return bisect_right(range(1, rounds + 1), most, key=after)


class Budget:
    """The ledger of one run, and its promise."""

    def __init__(self, path: Path, section: PrivacySection, per_round: Mapping[str, Release]) -> None:
        """`per_round`: what a round releases about each client, or under "" about every one."""
        self.section, self.per_round = section, per_round
        self.ledger = Ledger(path)

    def epsilon(self, rounds: int = 0) -> float:
        """The largest over the clients, after so many rounds more."""
        return max(
            epsilon([*self.ledger.releases(whose), replace(one, count=one.count * rounds)], self.section.delta)
            for whose, one in self.per_round.items()
        )

    def last_round(self, done: int, wanted: int) -> int:
        """The last round, `wanted` at most, that the budget allows after `done` rounds. Raises RunError if it is spent."""
        target = self.section.target_epsilon
        paid = max([done, *(entry.round for entry in self.ledger.entries)])
        if target is None or paid >= wanted:
            return wanted
        more = affordable(self.epsilon, wanted - paid, target)
        if more == 0 and paid == done:
            raise RunError(
                f"the privacy budget is spent: epsilon {self.epsilon():.4g} after {paid} rounds, and one more would pass "
                f"privacy.target_epsilon {target:g}. The model of round {done} is what it buys: set train.rounds = {done}, or "
                "begin a new run with more noise or a larger target"
            )
        return paid + more

    def spend(self, record: Record, state: State) -> dict[str, Any]:
        """Pay for a round before its state is used; what rounds.jsonl says of it, from which clients' own numbers go.

        Raises RoundError, and writes nothing, if the round would pass the target.
        """
        record.metrics, record.suspicious = {}, {}
        if record.stage == "clients" and "" in self.per_round:
            self.pay(Entry(record.t, "", self.per_round[""], digest(state).hex()))
        found = self.epsilon()
        return {
            "unit": self.section.unit,
            "epsilon": found if math.isfinite(found) else None,
            "delta": self.section.delta,
            "noise_multiplier": next(iter(self.per_round.values())).noise_multiplier,
        }

    def pay(self, entry: Entry) -> None:
        """Write an entry. Raises RoundError if it would pass the target."""
        target, delta = self.section.target_epsilon, self.section.delta
        if entry not in self.ledger.entries and target is not None:
            after = epsilon([*self.ledger.releases(entry.whose), entry.release], delta)
            if after > target * (1 + 1e-9):
                whom = f"client {entry.whose!r}" if entry.whose else "every client"
                raise RoundError(
                    f"round {entry.round}: privacy budget spent: epsilon of {whom} would be {after:.4g}, beyond "
                    f"privacy.target_epsilon {target:g}. Nothing of this round is kept"
                )
        self.ledger.add(entry)


def opened(path: Path, e: Experiment) -> tuple[Budget | None, Experiment]:
    """The budget of the run in a directory, and the experiment with that run's canaries and its secret key for noise."""
    section = e.config.privacy
    if section is not None and section.canaries:
        e = replace(e, rows=replace(e.rows, canaries=canaries.plant(path, e)))
    if section is None or section.unit is None:
        return None, e
    key = secret_file(path / "noise.key")
    z = private.noise_multiplier(e.config, e.clients)
    budget = Budget(path / "privacy.jsonl", section, per_round(e, e.clients, z))
    method = e.method
    if isinstance(method, ClientLevel):
        return budget, replace(e, plan=replace(e.plan, method=replace(method, key=key)))

    def spend(client: str, t: int, part: int, release: Release, of: str) -> None:
        budget.pay(Entry(t, client, release, f"{part}:{of}"))

    e.trainer.settings = replace(e.trainer.settings, private=Private(section.first_clip, z, key, spend))
    return budget, e


def per_round(e: Experiment, clients: list[Client], z: float) -> dict[str, Release]:
    """What a round releases."""
    section = e.config.privacy
    assert section is not None
    if section.unit == "client":
        return {"": Release(z, grid=private.grid(e.config))}
    return {client.id: Release(z, *private.steps_and_rate(e.config, client)) for client in clients}
