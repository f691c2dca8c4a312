"""One client of four sends finite but absurd numbers, in every round: the run is, bit for bit, one without its uploads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.core import Client, Exchange, Failure, Method, Round, State
from fedloom.engine import Answer, Job, Total
from fedloom.errors import RoundError
from fedloom.loop import Limits, Record, federate, one_round
from fedloom.screening import WINDOW, Moved, Screen, movement, step_fault
from fedloom.simulation import LocalVisits, Simulation

from .methods.cases import CASES, EXAMPLES, Case, ToyTrainer, engine, flat, start

Attack = Callable[[torch.Tensor], torch.Tensor]

ATTACKS: dict[str, Attack] = {
    "3e38": lambda x: torch.full_like(x, 3e38),
    "1e20": lambda x: torch.full_like(x, 1e20),
    "-100 x": lambda x: -100 * x - 0.1,
    "1e4": lambda x: torch.full_like(x, 1e4),
}


class Attacked(Simulation[Any]):
    """Client b sends what an attack makes of its update; without an attack, it fails."""

    attack: Attack | None = None

    def visits(self, method: Method, round: Round) -> LocalVisits[Any]:
        return _Visits(self, method, round)


class _Visits(LocalVisits[Any]):
    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        for result in super().exchange(jobs, x):
            if isinstance(result, Answer) and result.client.id == "b":
                assert isinstance(self.engine, Attacked)
                attack = self.engine.attack
                if attack is None:
                    yield Failure(result.client, "no memory")
                    continue
                bad = {
                    role: {site: attack(v) if v.is_floating_point() else v for site, v in group.items()}
                    for role, group in result.state.items()
                }
                result = replace(result, state=bad)
            yield result


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_an_absurd_client_is_left_out(case: Case, name: str) -> None:
    method, seen = case.method(), list[Record]()
    at = engine(ToyTrainer(), Attacked)
    at.attack = ATTACKS[name]
    got = federate(method, at, start(method), case.clients(), 8, on_round=lambda s, record: seen.append(record))
    for record in seen:
        if record.stage == "clients":
            assert record.dropped.keys() == {"b"}, record.dropped
    want = federate(method, engine(ToyTrainer(), Attacked), start(method), case.clients(), 8)
    assert flat(got) == flat(want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_no_honest_client_is_refused(case: Case) -> None:
    method, seen = case.method(), list[Record]()
    federate(method, engine(), start(method), case.clients(), 8, on_round=lambda s, record: seen.append(record))
    assert not any(record.dropped for record in seen)


def test_more_rows_may_move_further_and_a_large_move_is_named() -> None:
    refused: dict[str, str] = {}
    screen: Screen[str] = Screen(10.0, lambda client, why: refused.update({client.id: why}))
    norms = {"a": (1.0, 10), "b": (1.1, 10), "c": (9.0, 10), "d": (11.0, 10), "e": (30.0, 40), "f": (0.9, 10)}
    moved = [Moved(Client(k, n, 1), norm, k) for k, (norm, n) in norms.items()]
    # The median of six is 5.05: nobody moves ten times as far; without the large ones it is about 1.
    assert list(screen.usable(moved)) == list(norms) and not refused
    screen = Screen(10.0, lambda client, why: refused.update({client.id: why}))
    moved = [Moved(Client(f"c{i}", 10, 1), 1.0, f"c{i}") for i in range(20)]
    moved[12:12] = [Moved(Client("far", 10, 1), 10.5, "far"), Moved(Client("rich", 40, 1), 30.0, "rich")]
    moved.insert(15, Moved(Client("odd", 10, 1), 5.0, "odd"))
    used = list(screen.usable(moved))
    assert list(refused) == ["far"] and "10.5 times as far" in refused["far"] and "clients.max_ratio" in refused["far"]
    assert screen.suspicious == {"rich": 7.5, "odd": 5.0} and "rich" in used and len(used) == 22


def test_results_stream_once_the_median_is_known() -> None:
    taken: list[int] = []

    def results() -> Iterator[Moved[int]]:
        for i in range(30):
            taken.append(i)
            yield Moved(Client(f"c{i:02}", 10, 1), 1.0, i)

    stream = Screen[int](10.0, lambda client, why: None).usable(results())
    assert next(stream) == 0 and len(taken) == WINDOW
    assert list(stream) == list(range(1, 30))
    free = Screen[int](None, lambda client, why: None).usable(results())
    taken.clear()
    assert next(free) == 0 and taken == [0], "without a bound nothing is held back"


def test_movement_compares_what_both_have() -> None:
    sent: State = {"A": {"s": torch.ones(3, 2)}, "seed": {"s": torch.tensor([5])}}
    fewer: State = {"A": {"s": torch.ones(2, 2) + 2}, "seed": {"s": torch.tensor([9])}, "new": {"s": torch.ones(3) * 2}}
    assert movement(fewer, sent) == pytest.approx(math.sqrt(4 * 4 + 3 * 4))


def test_a_step_unlike_recent_ones_is_not_committed() -> None:
    assert step_fault(float("nan"), [], 10.0) == "the aggregate has a NaN or an infinite number"
    assert step_fault(1e6, [1.0, 1.1], 10.0) is None, "of two one cannot tell"
    assert "1e+03 times" in str(step_fault(1000.0, [1.0, 1.1, 0.9], 10.0))
    assert step_fault(99.0, [1.0, 1.1, 0.9], 10.0) is None and step_fault(1e9, [1.0] * 5, None) is None


def test_what_is_not_finite_is_never_the_next_state() -> None:
    """Without a bound, huge numbers overflow in the mean or the SVD: the round fails and the state before it stands."""
    for label in ("flexlora", "fedex_lora"):
        case = next(case for case in CASES if case.label == label)
        at = engine(ToyTrainer(), Attacked)
        at.attack = ATTACKS["3e38"]
        method = case.method()
        state = start(method)
        with pytest.raises(RoundError, match=r"round .*checkpoint of round"):
            for t in range(1, 4):
                state, _ = one_round(method, at, state, case.clients(), t, limits=Limits(max_ratio=None))
        assert set(EXAMPLES) == {client.id for client in case.clients()}
