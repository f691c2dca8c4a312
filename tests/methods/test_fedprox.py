from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, Factors, State, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.methods.fedit import FedIT
from fedloom.methods.fedprox import FedProx
from fedloom.rng import generator

from .cases import (
    EXAMPLES,
    MIXED,
    ONE,
    SITES,
    TWO,
    Case,
    ToyTrainer,
    engine,
    first_work,
    flat,
    received,
    rows,
    start,
    update,
)

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


# the distance of the product

WHOLE = Client("a", 12, 4)


def penalty_and_gap(over: str, of: str, key: int = 0) -> tuple[Tensor, dict[str, Tensor], State, State]:
    """The proximal term at a random point, the model's change to there, the point and the start, in float64."""
    method = build({"name": "fedprox", "mu": 0.6, "of": of, "over": {"name": over}}, {"rank": 4, "alpha": 6.0})
    state = start(method, dtype=torch.float64)
    state["B"] = {s: torch.randn(x.shape, generator=generator("B", s), dtype=x.dtype) for s, x in state["B"].items()}
    work = first_work(method, received(method, state, WHOLE), WHOLE)
    moved = {
        role: {s: x + torch.randn(x.shape, generator=generator(key, role, s), dtype=x.dtype) for s, x in group.items()}
        for role, group in work.train.items()
    }
    (term,) = work.penalties
    now, then = update(work, moved), update(work)
    return term(moved, work.fixed), {s: now[s] - then[s] for s in now}, moved, work.train


@pytest.mark.parametrize("over, digits", [("fedit", 12), ("ffa_lora", 6), ("fedsa_lora", 6)])  # a start in float32
def test_the_product_term_is_the_dense_distance_of_the_models(over: str, digits: int) -> None:
    """mu/2 (sum over layers of ||s (B A - B0 A0)||_F^2 + ||head - head0||^2), whatever of A and B is trained."""
    term, gap, moved, first = penalty_and_gap(over, "product")
    want = sum(x.square().sum() for x in gap.values())
    want += sum((x - first["head"][s]).square().sum() for s, x in moved.get("head", {}).items())
    torch.testing.assert_close(term, 0.3 * want, rtol=10.0**-digits, atol=0)


def test_the_factor_term_is_the_distance_of_what_is_trained() -> None:
    term, _, moved, first = penalty_and_gap("fedit", "factors")
    want = sum((x - first[role][s]).square().sum() for role, group in moved.items() for s, x in group.items())
    torch.testing.assert_close(term, 0.3 * want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("of", ["factors", "product"])
def test_at_the_start_the_term_and_its_gradient_are_zero(of: str) -> None:
    method = build({"name": "fedprox", "of": of}, {"rank": 4})
    state = start(method)
    state["B"] = {s: torch.randn(x.shape, generator=generator("B", s)) for s, x in state["B"].items()}
    work = first_work(method, received(method, state, WHOLE), WHOLE)
    train = {r: {s: x.clone().requires_grad_() for s, x in group.items()} for r, group in work.train.items()}
    term = work.penalties[0](train, work.fixed)
    term.backward()  # type: ignore[no-untyped-call]
    assert float(term.detach()) == 0.0
    assert all(x.grad is not None and not x.grad.any() for group in train.values() for x in group.values())


def test_only_the_factor_term_depends_on_how_the_product_is_factored() -> None:
    """The same model from (B R, R^-1 A) is as far from the start in the product, and not in the factors."""
    R = torch.randn(4, 4, generator=generator("R"), dtype=torch.float64)
    for of, same in (("product", True), ("factors", False)):
        method = build({"name": "fedprox", "of": of}, {"rank": 4})
        state = start(method, dtype=torch.float64)
        work = first_work(method, received(method, state, WHOLE), WHOLE)
        moved = {r: {s: x + 1.0 for s, x in group.items()} for r, group in work.train.items()}
        turned = moved | {
            "A": {s: torch.linalg.solve(R, x) for s, x in moved["A"].items()},
            "B": {s: x @ R for s, x in moved["B"].items()},
        }
        a, b = (work.penalties[0](x, work.fixed) for x in (moved, turned))
        assert torch.allclose(a, b, rtol=1e-10) is same


@dataclass(frozen=True, kw_only=True)
class Gated(FedIT):
    """An adapter whose ranks are weighed by the input."""

    name: ClassVar[str] = "gated"

    def model(self, received: State, own: State, visit: Visit) -> Work:
        gate = {s: torch.zeros(2, n) for s, (_, n) in visit.sites.items()}
        return Work(
            received, {"gate": gate}, adapter=lambda train, fixed: Factors(train["A"], train["B"], fixed["gate"])
        )

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await self.model(received, own, visit)
        return done.state, {}


def test_a_gated_adapter_has_no_product() -> None:
    with pytest.raises(ConfigError, match='what gated adds depends on the input; expected "factors"'):
        FedProx(over=Gated(rank=4), of="product")
    assert FedProx(over=Gated(rank=4)).of == "factors"
