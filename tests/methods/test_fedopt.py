from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, Method
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.state import State, only

from .cases import EXAMPLES, RANK, after, engine, flat, start, state

FIRST = state([[1.0, 2.0]], [[1.0], [0.0], [2.0]])
CLIENT = Client("a", 1, 1)


def rounds(method: Method, changes: list[float]) -> tuple[list[float], State]:
    """An entry of A after each round in which the client's A comes back `change` larger; B comes back as it is."""
    at, seen = FIRST, []
    for t, change in enumerate(changes, 1):
        sent = {"A": {"s": at["A"]["s"] + change}, "B": at["B"]}
        at = after(method, at, [(CLIENT, sent)], t)
        seen.append(float(at["A"]["s"][0, 0]))
        assert flat(only(at, "B")) == flat(only(FIRST, "B"))
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


def test_momentum_by_hand() -> None:
    """m = 1, then 0.5 + 2, then 1.25 + 0; each step is 0.2 m."""
    method = build({"name": "fedavgm", "momentum": 0.5, "lr": 0.2}, {"rank": 1})
    assert rounds(method, [1.0, 2.0, 0.0])[0] == pytest.approx([1.2, 1.7, 1.95])


def test_no_momentum_at_rate_one_is_the_method_under_it() -> None:
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    plain = build({"name": "fedit"}, {"rank": RANK})
    first = start(plain, dtype=torch.float64)
    at = {"fresh": {"head": first["head"]}}
    want = federate(plain, engine(**at), first, clients, 3)
    method = build({"name": "fedavgm", "momentum": 0.0}, {"rank": RANK})
    got = federate(method, engine(**at), first, clients, 3)
    for role, group in want.items():
        for site, x in group.items():
            torch.testing.assert_close(got[role][site], x, rtol=1e-12, atol=1e-13)


def test_what_the_method_under_it_leaves_alone_does_not_move() -> None:
    """FFA-LoRA's A never changes: no moment builds up there, and no step is made."""
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    method = build({"name": "fedadam", "over": {"name": "ffa_lora"}}, {"rank": RANK})
    first = start(method)
    got = federate(method, engine(), first, clients, 3)
    assert flat(only(got, "A", "frozen")) == flat(only(first, "A", "frozen"))
    assert flat(only(got, "B")) != flat(only(first, "B"))
    assert not any(x.any() for x in got["server_m_A"].values())
