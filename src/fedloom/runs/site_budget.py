"""Differential privacy of rows on many machines: each site draws its own noise, keeps its own ledger, and stops by itself.

A site tells the server one number after a visit: its epsilon so far, which depends on counts that are public anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom import disk
from fedloom.engine import Engine
from fedloom.errors import RunError
from fedloom.flower.coordinator import Coordinator
from fedloom.loop import Record
from fedloom.privacy.accountant import Release
from fedloom.privacy.example_level import Private
from fedloom.privacy.ledger import Entry
from fedloom.privacy.secret import secret_file
from fedloom.runs import private
from fedloom.runs.budget import Budget, affordable, per_round
from fedloom.runs.experiment import Experiment
from fedloom.runs.privacy_section import PrivacySection
from fedloom.state import State


class SiteLedgers:
    """The ledgers of a site's clients for one run, a file each."""

    def __init__(self, folder: Path, section: PrivacySection) -> None:
        self._folder, self._section = folder, section

    def spend(self, client: str, t: int, part: int, release: Release, of: str) -> None:
        """Pay before the steps are made. Raises RoundError if they would pass the target."""
        self._budget(client, release).pay(Entry(t, client, release, f"{part}:{of}"))

    def epsilon(self, client: str) -> float:
        """What the client has spent so far."""
        return self._budget(client, Release(1.0, 0)).ledger.epsilon(self._section.delta)

    def _budget(self, client: str, release: Release) -> Budget:
        # From the disk each time: on one machine another worker may have trained this client since.
        return Budget(disk.make_folder(self._folder) / f"{client}.jsonl", self._section, {client: release})


def at_site(folder: Path, e: Experiment) -> SiteLedgers | None:
    """Make the steps of an experiment private, where its run file asks for it. `folder` is of this run at the site."""
    section = e.config.privacy
    if section is None or section.unit != "example":
        return None
    private.check_delta(e.config, e.clients)
    ledgers = SiteLedgers(disk.make_folder(folder) / "ledgers", section)
    z = private.noise_multiplier(e.config, e.clients)
    made = Private(section.first_clip, z, secret_file(folder / "noise.key"), ledgers.spend)
    e.trainer.settings = replace(e.trainer.settings, private=made)
    return ledgers


class SitesBudget(Budget):
    """The server's view: what the sites' public counts allow, and what they say that they have spent."""

    def __init__(
        self, path: Path, section: PrivacySection, per_round: Mapping[str, Release], told: Mapping[str, float]
    ) -> None:
        super().__init__(path, section, per_round)
        self._told = told

    def last_round(self, done: int, wanted: int) -> int:
        target = self.section.target_epsilon
        if target is None or done >= wanted:
            return wanted
        last = affordable(self.epsilon, wanted, target * (1 + 1e-9))
        if last <= done:
            raise RunError(
                f"the privacy budget is spent: one more round after round {done} would take epsilon of a site beyond "
                f"privacy.target_epsilon {target:g}. Set train.rounds = {done}, or begin a new run with more noise or a larger "
                "target"
            )
        return last

    def spend(self, record: Record, state: State) -> dict[str, Any]:
        """What rounds.jsonl says of a round that the sites have paid for, from which clients' own numbers go."""
        record.metrics, record.suspicious = {}, {}
        noisy = math.isfinite(self.epsilon(1))  # clipping alone is no privacy
        return {
            "unit": self.section.unit,
            "epsilon": max(self._told.values(), default=0.0) if noisy else None,
            "delta": self.section.delta,
            "noise_multiplier": min(one.noise_multiplier for one in self.per_round.values()),
            "sites": dict(sorted(self._told.items())),
        }


def at_server(budget: Budget | None, path: Path, engine: Engine, e: Experiment) -> Budget | None:
    """The budget of a run, where its sites have ledgers of their own."""
    section = e.config.privacy
    if section is None or section.unit != "example" or not isinstance(engine, Coordinator):
        return budget
    releases: dict[str, Release] = {}
    for client in e.clients:
        # A site knows its own rows alone, and takes the noise that these need.
        known = e.clients if e.config.engine.superlink is None else [client]
        releases |= per_round(e, [client], private.noise_multiplier(e.config, known))
    return SitesBudget(path / "privacy.jsonl", section, releases, engine.epsilons)
