from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.methods import build
from fedloom.rng import generator

from .cases import RANK, SITES, Sent, after, random_uploads, uploads


def corrected(sent: list[Sent], **fields: float) -> dict[str, dict[str, Tensor]]:
    ((_, state),) = random_uploads([RANK], key=9)
    return after(build({"name": "lora_fair", **fields}, {"rank": RANK}), state, sent)


def near(sent: list[Sent]) -> list[Sent]:
    """A near a common one with orthonormal rows, as after some local training: a well-conditioned problem."""
    A = {s: torch.linalg.qr(x.T)[0].T for s, x in sent[0][1]["A"].items()}
    return [(client, x | {"A": {s: A[s] + 0.2 * own for s, own in x["A"].items()}}) for client, x in sent]


def dense(sent: list[Sent], site: str) -> tuple[Tensor, Tensor, Tensor]:
    """D, mean B, mean A."""
    total = sum(client.examples for client, _ in sent)
    p = [client.examples / total for client, _ in sent]
    D = sum(q * x["B"][site] @ x["A"][site] for q, (_, x) in zip(p, sent, strict=True))
    B = sum(q * x["B"][site] for q, (_, x) in zip(p, sent, strict=True))
    A = sum(q * x["A"][site] for q, (_, x) in zip(p, sent, strict=True))
    assert isinstance(D, Tensor) and isinstance(B, Tensor) and isinstance(A, Tensor)
    return D, B, A


def objective(X: Tensor, D: Tensor, B: Tensor, A: Tensor, weight: float) -> Tensor:
    """Dense, as the paper writes it."""
    P = (B + X) @ A
    return 1 - (D * P).sum() / (D.norm() * P.norm()) + weight * X.norm()


def test_lora_fair_by_hand() -> None:
    """r = 1, D = (1, 0) 2/2 + (0, 1) 1/2: B goes from (1, 1)/2 to the direction (2, 1)."""
    method = build({"name": "lora_fair", "weight": 0.0, "steps": 200}, {"rank": 1})
    one = {"A": {"s": torch.tensor([[2.0]])}, "B": {"s": torch.tensor([[1.0], [0.0]])}}
    two = {"A": {"s": torch.tensor([[1.0]])}, "B": {"s": torch.tensor([[0.0], [1.0]])}}
    got = after(method, one, uploads((1, one), (1, two)))
    assert got["A"]["s"].tolist() == [[1.5]]
    torch.testing.assert_close(got["B"]["s"][0] / got["B"]["s"][1], torch.tensor([2.0]))


@pytest.mark.parametrize("weight", [0.01, 0.05, 1.0])
def test_lora_fair_minimises_the_dense_objective(weight: float) -> None:
    sent = near(random_uploads([RANK] * 4))
    got = corrected(sent, weight=weight, steps=4000)
    for i, site in enumerate(SITES):
        D, B, A = dense(sent, site)
        X = got["B"][site] - B
        torch.testing.assert_close(got["A"][site], A)
        least, rng = objective(X, D, B, A, weight), generator("around", i)
        assert (X.norm() < 1e-12) == (weight == 1.0), "from some weight on the average itself is the least"
        for size in (1e-3, 1e-2, 0.1, 1.0):
            for _ in range(50):
                step = size * torch.randn(X.shape, generator=rng, dtype=X.dtype)
                assert objective(X + step, D, B, A, weight) >= least - 1e-9


def test_lora_fair_without_a_weight_has_the_direction_of_least_squares() -> None:
    """B + X is G H^-1 up to its length, the best B for the mean A; every step gains."""
    sent = random_uploads([RANK] * 4)
    runs = [corrected(sent, weight=0.0, steps=steps) for steps in (1, 3, 10, 30, 4000)]
    for site in SITES:
        D, B, A = dense(sent, site)
        values = [float(objective(got["B"][site] - B, D, B, A, 0.0)) for got in runs]
        assert values == sorted(values, reverse=True)
        best = D @ A.T @ torch.linalg.inv(A @ A.T)
        Y = runs[-1]["B"][site]
        torch.testing.assert_close(Y / Y.norm(), best / best.norm(), rtol=1e-4, atol=1e-5)


def test_lora_fair_does_not_depend_on_the_size_of_B() -> None:
    sent = random_uploads([RANK] * 3)
    small = [(client, x | {"B": {site: 1e-3 * B for site, B in x["B"].items()}}) for client, x in sent]
    want, got = corrected(sent, weight=0.0), corrected(small, weight=0.0)
    for site in SITES:
        torch.testing.assert_close(got["B"][site], 1e-3 * want["B"][site])


def test_lora_fair_is_fedit_where_nothing_is_to_be_corrected() -> None:
    """A heavy weight, clients that agree, and clients that learnt nothing."""
    sent = random_uploads([RANK] * 3)
    same = [(client, sent[0][1]) for client, _ in sent]
    blank = [(client, x | {"B": {site: torch.zeros_like(B) for site, B in x["B"].items()}}) for client, x in sent]
    plain = build({"name": "fedit"}, {"rank": RANK})
    for some, weight in ((sent, 10.0), (same, 0.01), (blank, 0.0)):
        want, got = after(plain, sent[0][1], some), corrected(some, weight=weight)
        for role, group in want.items():
            for site, x in group.items():
                torch.testing.assert_close(got[role][site], x)
