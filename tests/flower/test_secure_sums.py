"""Secure sums through messages: the simulator's bytes, drop-outs, restarts of either side, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.core import Client, Method, State
from fedloom.errors import RoundError, VoidRound
from fedloom.flower.coordinator import Coordinator
from fedloom.flower.message import pack, unpack
from fedloom.flower.node_sums import NodeSums
from fedloom.flower.remote_sums import RemoteSums
from fedloom.flower.worker import Worker
from fedloom.loop import Record, federate, one_round
from fedloom.methods import build
from fedloom.privacy.keys import Identity
from fedloom.privacy.secure_visits import SecureSimulation, SecureSums
from fedloom.privacy.sum_plan import Rule

from ..methods.cases import CASES, EXAMPLES, RANK, Case, Rows, engine, flat, start
from .direct import Direct
from .toys import ToyNode, coordinator

pytestmark = pytest.mark.usefixtures("at_once")
CLIENTS = [Client(key, n, RANK) for key, n in EXAMPLES.items()]
RULE = Rule(least=2, cover=1)
FITTING = [c for c in CASES if not (c.each or c.integers)]


def sites(
    method: Method, clients: Sequence[Client], folder: Path, rule: Rule = RULE, **more: Any
) -> list[Worker]:
    """A worker for each client, with a folder of its own."""
    made = []
    for client in clients:
        node = ToyNode(method, [client], folder / client.id)
        node.run = replace(node.run, sums=NodeSums(rule, "run", folder / client.id, **more))
        made.append(Worker(node))
    return made


def server(at: Direct, folder: Path, clients: Sequence[Client] = CLIENTS, rule: Rule = RULE, **more: Any) -> Coordinator:
    made = coordinator(at, clients, sums=RemoteSums(rule, "run", folder / "server", **more))
    # Each client lives at its own node, as with sites: the roster's deal is that of the order of ids.
    return made


def simulator(rule: Rule = RULE, **options: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> SecureSimulation[Rows]:
        made: SecureSimulation[Rows] = SecureSimulation(*args, **kwargs)
        made.sums = SecureSums(least=rule.least, cover=rule.cover, limit=rule.limit, bits=rule.bits)
        return made

    return engine(kind=make, cohort=1, **options)


def told(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(r.stage, r.clients, r.dropped, r.metrics, r.up.as_dict(), r.down.as_dict(), r.per_client) for r in records]


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.label)
def test_every_fitting_method_has_the_simulators_bytes(case: Case, tmp_path: Path) -> None:
    method, clients = case.method(), case.clients()
    ends = []
    at = Direct(sites(method, clients, tmp_path))
    for where in (simulator(), server(at, tmp_path, clients)):
        records: list[Record] = []
        state = federate(
            method, where, start(method), clients, 2, on_round=lambda _, record: records.append(record)
        )
        ends.append((flat(state), told(records)))
    assert ends[0] == ends[1]
    assert all("masks" in r.up.as_dict() for r in records if r.stage == "clients")
