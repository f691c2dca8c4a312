from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch

from fedloom.core import Client, Method, State
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.state import only

from .cases import EXAMPLES, MIXED, ONE, SITES, ZERO, Case, after, engine, flat, start, uploads

ADAPTIVE = ["fedadagrad", "fedadam", "fedyogi"]


def case(name: str, over: str = "fedit", **fields: Any) -> Case:
    return Case("", {"name": name, "over": {"name": over}, **fields})


def two_rounds(name: str, first: float, second: float, **fields: Any) -> tuple[float, float]:
    """x after each of two rounds from 0, in which the mean change is `first`, then `second`; the number is an entry of A."""
    method = case(name, **fields).method()
    zero: State = {
        "A": {"s": torch.zeros(1, 1, dtype=torch.float64)},
        "B": {"s": torch.zeros(1, 1, dtype=torch.float64)},
    }

    def moved(at: State, change: float) -> State:
        # Two clients of weights 3 and 1, whose changes have that mean.
        up = [(n, at["A"]["s"] + change + d) for n, d in ((3, 1.0), (1, -3.0))]
        return after(method, at, uploads(*((n, {"A": {"s": x}, "B": at["B"]}) for n, x in up)))

    one = moved(zero, first)
    two = moved(one, second)
    assert (two["B"]["s"] == 0).all(), "what did not change stays"
    return one["A"]["s"].item(), two["A"]["s"].item()


def test_fedavgm_by_hand() -> None:
    """m = 2, then 0.5 * 2 + 4 = 5; times 0.1."""
    assert two_rounds("fedavgm", 2.0, 4.0, lr=0.1, momentum=0.5) == pytest.approx((0.2, 0.2 + 0.5), rel=1e-12)


def test_fedadagrad_by_hand() -> None:
    """v = 0.25 + 4, then 20.25; no momentum."""
    want = 0.1 * 2 / (sqrt(4.25) + 0.5)
    got = two_rounds("fedadagrad", 2.0, 4.0, lr=0.1, tau=0.5)
    assert got == pytest.approx((want, want + 0.1 * 4 / (4.5 + 0.5)), rel=1e-12)


def test_fedadam_by_hand() -> None:
    """beta1 = 0.5, beta2 = 0.75: m = 1, then 2.5; v = 0.75 tau^2 + 1, then 0.75 v + 4."""
    want = 0.1 * 1 / (sqrt(1.1875) + 0.5)
    got = two_rounds("fedadam", 2.0, 4.0, lr=0.1, tau=0.5, beta1=0.5, beta2=0.75)
    assert got == pytest.approx((want, want + 0.1 * 2.5 / (sqrt(4.890625) + 0.5)), rel=1e-12)


@pytest.mark.parametrize("second, v", [(4.0, 5.25), (0.5, 1.25 - 0.25 * 0.25)])
def test_fedyogi_by_hand(second: float, v: float) -> None:
    """v = tau^2 + 0.25 * 4 = 1.25; then it grows by 0.25 * 16 where 16 > v, and falls by 0.25 * 0.25 where 0.25 < v."""
    want = 0.1 * 1 / (sqrt(1.25) + 0.5)
    got = two_rounds("fedyogi", 2.0, second, lr=0.1, tau=0.5, beta1=0.5, beta2=0.75)
    m = 0.5 * 1 + 0.5 * second
    assert got == pytest.approx((want, want + 0.1 * m / (sqrt(v) + 0.5)), rel=1e-12)


def rounds(method: Method, changes: list[float]) -> tuple[list[float], State]:
    """An entry of A after each round in which the client's A comes back `change` larger; B comes back as it is."""
    at, seen = ONE, []
    for t, change in enumerate(changes, 1):
        sent = {"A": {"s": at["A"]["s"] + change}, "B": at["B"]}
        at = after(method, at, [(Client("a", 1, 1), sent)], t)
        seen.append(float(at["A"]["s"][0, 0]))
        assert flat(only(at, "B")) == flat(only(ONE, "B"))
    return seen, at


def reference(name: str, changes: list[float], lr: float, beta1: float, beta2: float, tau: float) -> list[float]:
    """Algorithm 2 of Reddi et al., one number."""
    x, m, v, seen = 1.0, 0.0, tau**2, []
    for d in changes:
        m = beta1 * m + (1 - beta1) * d
        if name == "fedadagrad":
            v = v + d**2
        elif name == "fedyogi":
            v = v - (1 - beta2) * d**2 * (1 if v > d**2 else -1 if v < d**2 else 0)
        else:
            v = beta2 * v + (1 - beta2) * d**2
        x += lr * m / (v**0.5 + tau)
        seen.append(x)
    return seen


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_adaptive_rules_are_algorithm_2(name: str) -> None:
    """A large tau, so that a wrong start of v, or a bias that is corrected, shows in the first digits."""
    changes = [0.4, -0.1, 0.3, 0.0, 2.0]
    fields = {"lr": 0.5, "beta1": 0.8, "tau": 0.3} | ({} if name == "fedadagrad" else {"beta2": 0.7})
    seen, at = rounds(build({"name": name, **fields}, {"rank": 1}), changes)
    assert seen == pytest.approx(reference(name, changes, 0.5, 0.8, 0.7, 0.3), rel=1e-5)
    assert {role for role in at if role.startswith("server_")} == {f"server_{x}_{r}" for x in "mv" for r in "AB"}


@pytest.mark.parametrize(
    "over", ["fedit", "fslora", "ffa_lora", "fedsa_lora", "hetlora", "feddpa", "scaffold", "fedex_lora"]
)
def test_without_momentum_at_rate_one_it_is_the_method_under_it(over: str) -> None:
    """x + 1 (x' - x) = x', up to the rounding of one addition."""
    inner, method = build({"name": over}, {"rank": 4, "alpha": 6.0}), case("fedavgm", over, momentum=0.0).method()
    ranks = MIXED if "rank" in inner.budgets else {}
    clients = [Client(k, n, ranks.get(k, 4)) for k, n in EXAMPLES.items()]
    first = start(inner, dtype=torch.float64) if over not in ("ffa_lora", "fedsa_lora") else start(inner)
    at = {"fresh": only(first, "head")}
    # One round: a later one may begin with another last bit.
    want, _ = one_round(inner, engine(**at), first, clients, 1)
    got, _ = one_round(method, engine(**at), first, clients, 1)
    assert set(want) <= set(got)
    for role, group in want.items():
        for site, x in group.items():
            torch.testing.assert_close(got[role][site], x, rtol=1e-6, atol=1e-7)


def test_moments_stay_on_the_server_and_last() -> None:
    method = case("fedadam", lr=0.02).method()
    at, first = engine(), start(method)
    one, record = one_round(method, at, first, Case("", {}).clients(), 1)
    moments = {f"server_{x}_{role}" for x in "mv" for role in ("A", "B", "head")}
    assert set(one) - set(first) == moments and set(record.down.by_role) == {"A", "B", "head"}
    two, record = one_round(method, at, one, Case("", {}).clients(), 2)
    assert set(record.down.by_role) == {"A", "B", "head"}
    fresh, _ = one_round(method, engine(), only(one, "A", "B", "head"), Case("", {}).clients(), 2)
    assert flat(only(two, "A", "B")) != flat(only(fresh, "A", "B")), "round 2 knows of round 1"


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_first_step_of_the_adaptive_is_near_the_rate_whatever_the_change(name: str) -> None:
    """m / sqrt(v) is (1 - beta1) / sqrt(1 - beta2) in size for FedAdam and FedYogi, 1 for FedAdagrad."""
    fields: dict[str, Any] = {} if name == "fedadagrad" else {"beta1": 0.0, "beta2": 0.0}
    for change in (-100.0, 3.0):
        x, _ = two_rounds(name, change, change, lr=0.1, tau=1e-9, **fields)
        assert x == pytest.approx(0.1 * (1 if change > 0 else -1), rel=1e-6)


@pytest.mark.parametrize("name", ["fedavgm", *ADAPTIVE])
def test_what_does_not_train_stays(name: str) -> None:
    """Over FFA-LoRA A stands, bit for bit."""
    method = case(name, "ffa_lora").method()
    first = start(method)
    last = federate(method, engine(), first, Case("", {}, MIXED).clients(), 3)
    assert flat(only(last, "A", "frozen")) == flat(only(first, "A", "frozen"))
    assert all(not torch.equal(last["B"][site], first["B"][site]) for site in SITES)


def test_no_change_is_no_step() -> None:
    for name in ADAPTIVE:
        method = case(name).method()
        new = after(method, ZERO, uploads((1, ZERO), (2, ZERO)))
        assert flat(only(new, "A", "B")) == flat(ZERO), "0 / (tau + tau)"


@pytest.mark.parametrize(
    "name, fields",
    [
        ("fedavgm", {"momentum": 1.0}),
        ("fedavgm", {"lr": 0.0}),
        ("fedadam", {"beta1": -0.1}),
        ("fedadam", {"beta2": 1.0}),
        ("fedadam", {"tau": 0.0}),
        ("fedadagrad", {"lr": -1.0}),
        ("fedyogi", {"tau": float("inf")}),
    ],
    ids=str,
)
def test_refused(name: str, fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: {next(iter(fields))} is"):
        case(name, **fields).method()
