"""The clipping bound that adapts, and the one that the server measures: direction, noise, sensitivity and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.core import Client, State, Trained, Work
from fedloom.errors import ConfigError, RoundError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.privacy.client_level import ALL, ClientLevel
from fedloom.privacy.clip_bound import bit_weight, check_count, next_bound, reach
from fedloom.privacy.secure_visits import SecureSimulation, SecureSums

from ..methods.cases import RANK, Rows, ToyTrainer, engine, start

KEY = bytes(32)
METHOD = build({"name": "fedit"}, {"rank": RANK})


def settled(rule: Callable[[float, float], float], bound: float, norms: torch.Tensor, rounds: int = 60) -> float:
    for _ in range(rounds):
        bound = rule(bound, float((norms <= bound).double().mean()))
    return bound


@pytest.mark.parametrize("first", [0.1, 10.0])
def test_the_bound_finds_the_median_from_both_sides(first: float) -> None:
    norms = torch.linspace(0.5, 1.5, 101)
    assert settled(next_bound, first, norms) == pytest.approx(1.0, rel=0.1)

    def reversed_(bound: float, within: float) -> float:
        """The clipped share where the unclipped one belongs, as one library has it: the bound runs away."""
        return next_bound(bound, 1 - within)

    assert not 0.3 < settled(reversed_, first, norms) < 3.0


@pytest.mark.parametrize("z, n, change, count", [(1.0, 100, 1.005038, 5.0), (4.0, 100, 4.364358, 5.0)])
def test_the_noise_is_split_as_in_the_paper(z: float, n: int, change: float, count: float) -> None:
    w = bit_weight(z, n)
    assert z * reach(1.0, w) == pytest.approx(change, abs=1e-6)
    assert z * reach(1.0, w) / (2 * w) == pytest.approx(count) and count == n / 20
    # The bits cost nothing beside: both together are one release of multiplier z.
    assert 1 / change**2 + 1 / (2 * count) ** 2 == pytest.approx(1 / z**2, rel=1e-5)


def test_few_clients_cannot_be_counted() -> None:
    with pytest.raises(ConfigError, match="needs at least 57 clients in a round, got 12"):
        check_count(4.0, 12)
    check_count(4.0, 57)
    assert bit_weight(4.0, 57) < 1.0 == bit_weight(4.0, 12) == bit_weight(0.0, 3)


class Drawn(ToyTrainer):
    """Changes of known length: the norms of n clients lie evenly between 0.5 and 1.5."""

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Rows], t: int, part: int = 0) -> list[Trained]:
        return [Trained(stretched(work.train, length(client, len(works))), 1, 1.0, 0.0) for client, work in works]


def length(client: Client, n: int) -> float:
    return 0.5 + (int(client.id) + 0.5) / n


def stretched(train: State, norm: float) -> State:
    count = sum(x.numel() for group in train.values() for x in group.values())
    step = norm / math.sqrt(count)
    return {role: {site: x + step for site, x in group.items()} for role, group in train.items()}


def many(count: int) -> list[Client]:
    return [Client(f"{i:03d}", 10, RANK) for i in range(count)]


def drawn(kind: Any = None, trainer: ToyTrainer | None = None) -> Any:
    rows = engine().data("a")
    made = engine(trainer or Drawn(), **({} if kind is None else {"kind": kind}))
    made.data, made.cohort = lambda client: rows, 100
    return made


def adaptive(z: float, first: float, noise: str = "server") -> ClientLevel:
    return ClientLevel(over=METHOD, clip=first, noise_multiplier=z, clipping="adaptive", noise=noise, key=KEY)  # type: ignore[arg-type]


def secure(*args: Any, **options: Any) -> SecureSimulation[Rows]:
    made: SecureSimulation[Rows] = SecureSimulation(*args, **options)
    made.sums = SecureSums(keys=KEYS)
    return made


KEYS: dict[str, Any] = {}


def test_a_run_follows_the_median_under_noise() -> None:
    method, bounds = adaptive(1.0, 0.6), []
    state = federate(
        method, drawn(), start(method), many(40), 20, on_round=lambda s, r: bounds.append(r.report["clip"])
    )
    assert bounds[0] == pytest.approx(0.6) and abs(bounds[-1] - 1.0) < 0.15
    assert float(state["clip_bound"][ALL]) == pytest.approx(bounds[-1], rel=0.05)
    assert method.serve(state, many(1)[0]).keys() == {"A", "B", "head"}


@pytest.mark.parametrize("noise", ["server", "clients"])
def test_the_noise_on_change_and_count_is_what_the_split_says(noise: str) -> None:
    """Clients' noise is for as few as a sum is opened for: here all of 24 give theirs, 16 - 7 are counted on."""
    n, z, first = 24, 1.0, 0.9
    counted = []
    method = adaptive(z, first, noise)
    state = start(method)
    for i in range(10):
        at = drawn(secure if noise == "clients" else None)
        record = one_round(replace(method, key=bytes([i]) * 32), at, state, many(n), 1)[1]
        counted.append(record.report["clip_within"])
    more = math.sqrt(24 / (16 - 7)) if noise == "clients" else 1.0
    w = bit_weight(z, n)
    assert record.report["noise_std"] == pytest.approx(z * reach(first, w) * 1.001 * more / n, rel=1e-3)
    true = sum(length(client, n) <= first for client in many(n)) / n
    off = torch.tensor(counted) - true
    expected = more * (n / 20) * 1.001 / n
    assert 0.5 * expected < float(off.square().mean().sqrt()) < 1.6 * expected


def test_a_bit_is_half_a_step_either_way_and_the_whole_vector_within_reach() -> None:
    method = adaptive(1.0, 0.9)
    client = many(100)[70]  # changes by 1.2
    received = {"A": {"s": torch.zeros(2, 3)}, "clip_bound": {ALL: torch.tensor(0.9)}}
    received["clip_within"] = {ALL: torch.tensor(0.9 * bit_weight(1.0, 100))}
    for length, sign in ((1.2, -1.0), (0.3, 1.0)):
        sent, within = method._clipped(
            {"A": received["A"]}, stretched({"A": received["A"]}, length), _visit(client), 0.9
        )
        assert within == (sign > 0)
        total = math.hypot(float(sent["A"]["s"].norm()), float(received["clip_within"][ALL]))
        assert total <= method.reach(received) * (1 + 1e-6)


def _visit(client: Client) -> Any:
    from fedloom.core import Visit

    return Visit(1, client, {})


def test_auto_is_the_norm_of_the_servers_own_training() -> None:
    method = ClientLevel(over=METHOD, clip=0.1, noise_multiplier=0.0, clipping="auto", key=KEY)
    assert method.needs_proxy_data
    at = drawn(trainer=ToyTrainer(optimizer="sgd"))
    at.proxy = Client("server", 10, RANK)
    clients = many(4)
    first = start(method)
    state, record = one_round(method, at, first, clients, 1)
    alone, _ = one_round(METHOD, drawn(trainer=ToyTrainer(optimizer="sgd")), method.inner(first), [at.proxy], 1)
    moved = math.sqrt(
        sum(float((x - first[r][s]).square().sum()) for r, group in alone.items() for s, x in group.items())
    )
    assert record.report["clip"] == pytest.approx(moved, rel=1e-5) == float(state["clip_bound"][ALL])
    assert record.stage == "clients" and record.clients == [client.id for client in clients]
    again, second = one_round(method, at, state, clients, 2)
    assert second.report["clip"] == record.report["clip"] and again.keys() == state.keys()


def test_a_server_that_learns_nothing_sets_no_bound() -> None:
    method = ClientLevel(over=METHOD, clip=0.1, noise_multiplier=0.0, clipping="auto", key=KEY)
    at = drawn(trainer=ToyTrainer(lr=0.0))
    at.proxy = Client("server", 10, RANK)
    with pytest.raises(RoundError, match="the server's own training changes the model by 0"):
        one_round(method, at, start(method), many(3), 1)
