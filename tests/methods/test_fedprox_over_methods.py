from __future__ import annotations

import pytest
import torch

from fedloom.core import Client
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build

from .cases import EXAMPLES, MIXED, ONE, SITES, TWO, Case, ToyTrainer, engine, first_work, flat, received, rows, start

CLIENT = Client("b", EXAMPLES["b"], 4)


def case(over: str, mu: float, **budgets: dict[str, int]) -> Case:
    return Case("", {"name": "fedprox", "mu": mu, "over": {"name": over}}, **budgets)  # type: ignore[arg-type]


def test_penalty_by_hand() -> None:
    """mu/2 ||x - start||^2: squares (16 + 16) + (16 + 16 + 16) = 80 between ONE and TWO, so 20 at mu = 1/2."""
    work = first_work(case("fedit", 0.5).method(), ONE, Client("a", 1, 1))
    (penalty,) = work.penalties
    assert penalty(ONE, work.fixed).item() == 0
    assert penalty(TWO, work.fixed).item() == 20.0
    assert flat({"A": work.fixed["prox_A"], "B": work.fixed["prox_B"]}) == flat(ONE)


def test_its_gradient_pulls_back_to_the_start() -> None:
    """mu (x - start)."""
    work = first_work(case("fedit", 0.5).method(), ONE, Client("a", 1, 1))
    x = TWO["A"]["s"].clone().requires_grad_()
    work.penalties[0]({"A": {"s": x}, "B": TWO["B"]}, work.fixed).backward()
    torch.testing.assert_close(x.grad, 0.5 * (TWO["A"]["s"] - ONE["A"]["s"]))


@pytest.mark.parametrize("over", ["fedit", "fslora", "hetlora", "fedex_lora", "feddpa", "fedlora_optimizer"])
def test_mu_of_zero_is_the_method_under_it_bit_for_bit(over: str) -> None:
    inner = build({"name": over}, {"rank": 4, "alpha": 6.0})
    method = case(over, 0.0).method()
    ranks = MIXED if "rank" in inner.budgets else {}
    clients = [Client(k, n, ranks.get(k, 4)) for k, n in EXAMPLES.items()]
    first = start(inner)
    at, mine = engine(), engine()
    want, got = federate(inner, at, first, clients, 3), federate(method, mine, first, clients, 3)
    assert flat(got) == flat(want) and all(flat(mine.own(k)) == flat(at.own(k)) for k in EXAMPLES)


def test_the_larger_mu_the_nearer_to_the_start() -> None:
    moved = []
    for mu in (0.0, 1.0, 10.0):
        method = case("fedit", mu).method()
        first = start(method)
        new, record = one_round(method, engine(ToyTrainer(optimizer="sgd", lr=0.05, steps=20)), first, [CLIENT], 1)
        moved.append(sum(float((new[r][s] - first[r][s]).square().sum()) for r in "AB" for s in SITES))
        assert record.train_loss is not None
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2] > 0


def test_the_loss_that_is_reported_is_the_tasks() -> None:
    """The first step's: the penalty is zero there, and large afterwards."""
    losses = []
    for mu in (0.0, 1e4):
        method = case("fedit", mu).method()
        _, record = one_round(method, engine(ToyTrainer(optimizer="sgd", lr=1e-7)), start(method), [CLIENT], 1)
        losses.append(record.train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_over_a_sketch_it_stays_near_the_slice() -> None:
    client = Client("a", 12, 2)
    method = case("fslora", 0.5).method()
    state = start(method)
    down = received(method, state, client)
    work = first_work(method, down, client)
    assert all(torch.equal(work.fixed["prox_A"][site], down["A"][site]) for site in SITES)
    assert work.scale == pytest.approx(6 / 2) and len(work.penalties) == 1
    (done,) = ToyTrainer(optimizer="sgd").fit([(client, work)], [rows("a")], 1)
    assert done.state["A"]["layers.0.in"].shape == (2, 6)


def test_both_penalties_of_a_method_that_has_one() -> None:
    method = case("hetlora", 0.5).method()
    work = first_work(method, received(method, start(method), CLIENT), CLIENT)
    assert len(work.penalties) == 2


def test_refused() -> None:
    with pytest.raises(ConfigError, match="fedprox: mu is"):
        case("fedit", -0.1).method()
