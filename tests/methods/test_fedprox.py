from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, Factors, State, Visit, Work
from fedloom.errors import ConfigError
from fedloom.methods import build
from fedloom.methods.fedit import FedIT
from fedloom.methods.fedprox import FedProx
from fedloom.rng import generator

from .cases import first_work, received, start, update

CLIENT = Client("a", 12, 4)


def penalty_and_gap(over: str, of: str, key: int = 0) -> tuple[Tensor, dict[str, Tensor], State, State]:
    """The proximal term at a random point, the model's change to there, the point and the start, in float64."""
    method = build({"name": "fedprox", "mu": 0.6, "of": of, "over": {"name": over}}, {"rank": 4, "alpha": 6.0})
    state = start(method, dtype=torch.float64)
    state["B"] = {s: torch.randn(x.shape, generator=generator("B", s), dtype=x.dtype) for s, x in state["B"].items()}
    work = first_work(method, received(method, state, CLIENT), CLIENT)
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
    work = first_work(method, received(method, state, CLIENT), CLIENT)
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
        work = first_work(method, received(method, state, CLIENT), CLIENT)
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
