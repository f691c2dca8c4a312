from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, Factors, Work
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.methods.fed_sb import FedSB, leading
from fedloom.rng import generator

from .cases import CASES, EXAMPLES, RANK, SITES, ToyTrainer, after, engine, received, rows, served, start

TABLE = {"rank": RANK, "alpha": 6.0}


def fed_sb(**fields: object) -> FedSB:
    method = build({"name": "fed_sb", **fields}, TABLE)
    assert isinstance(method, FedSB)
    return method


def test_fed_sb_average_is_exact() -> None:
    """Weights 3/8 and 5/8, of the cores and of the models alike."""
    method = fed_sb(start="seed")
    state, rng = start(method), generator("R")
    sent = [
        (Client(k, n, RANK), {"R": {s: torch.randn(RANK, RANK, generator=rng) for s in SITES}})
        for k, n in (("a", 3), ("b", 5))
    ]
    got = after(method, state, sent)
    want = {s: torch.zeros(shape) for s, shape in SITES.items()}
    for client, x in sent:
        for site, delta in served(method, state | x, client, SITES).items():
            want[site] += client.examples / 8 * delta
    model = served(method, got, sent[0][0], SITES)
    for site in SITES:
        torch.testing.assert_close(got["R"][site], 3 / 8 * sent[0][1]["R"][site] + 5 / 8 * sent[1][1]["R"][site])
        torch.testing.assert_close(model[site], want[site], rtol=1e-5, atol=1e-6)


def test_leading_triplets_are_those_of_the_svd() -> None:
    rng = generator("leading")
    for shape in ((40, 30), (30, 40)):
        X = torch.randn(shape, generator=rng, dtype=torch.float64)
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        X = (U * 0.8 ** torch.arange(30)) @ Vh
        B, core, A = leading(X, 5, rng)
        torch.testing.assert_close((B * core) @ A, (U[:, :5] * 0.8 ** torch.arange(5)) @ Vh[:5], rtol=0, atol=1e-6)
        torch.testing.assert_close(B.T @ B, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(A @ A.T, torch.eye(5, dtype=torch.float64))


def test_fed_sb_starts_from_the_first_step_of_full_fine_tuning() -> None:
    """The clients' mean gradient in the whole weights, by autograd, its sign, and the SVD of that."""
    method, trainer = fed_sb(length=0.03, batches=1), ToyTrainer(batch=10**6, record=True)
    state = start(method)
    want = {site: torch.zeros(shape) for site, shape in SITES.items()}
    for key, n in EXAMPLES.items():
        change = {site: torch.zeros(shape, requires_grad=True) for site, shape in SITES.items()}
        none = Work(train={"head": state["head"]}, base={"left": change}, adapter=lambda train, fixed: _nothing())
        trainer.loss(none, none.train, rows(key)).backward()
        for site, x in change.items():
            assert x.grad is not None
            want[site] += n / sum(EXAMPLES.values()) * x.grad
    after_one, _ = one_round(method, engine(trainer), state, CASES[0].clients(), 1)
    first = next(work for _, work, _ in trainer.seen if "R" in work.train)
    for site, G in want.items():
        U, S, Vh = torch.linalg.svd(-0.03 * G.sign(), full_matrices=False)
        A, B, R = first.fixed["A"][site], first.fixed["B"][site], first.train["R"][site]
        torch.testing.assert_close(B @ R @ A, (U[:, :RANK] * S[:RANK]) @ Vh[:RANK], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(R, S[:RANK].diag(), rtol=1e-3, atol=1e-4)
        assert torch.equal(after_one["A"][site], A) and torch.equal(after_one["B"][site], B)


def _nothing() -> Factors:
    return Factors(
        {site: torch.zeros(1, n) for site, (_, n) in SITES.items()},
        {site: torch.zeros(m, 1) for site, (m, _) in SITES.items()},
    )


def test_fed_sb_bases_stand_from_then_on() -> None:
    method = fed_sb()
    state, _ = one_round(method, engine(), start(method), CASES[0].clients(), 1)
    later = federate(method, engine(), state, CASES[0].clients(), 4, start=2)
    for role in ("A", "B"):
        assert all(torch.equal(x, state[role][site]) for site, x in later[role].items())
    assert set(received(method, later, Client("new", 1, RANK), 5)) == {"A", "B", "R", "head"}, (
        "a newcomer needs no more"
    )


@pytest.mark.parametrize("sites", [SITES, dict(reversed(SITES.items()))], ids=["same order", "another order"])
def test_fed_sb_seed_is_all_a_client_needs(sites: dict[str, tuple[int, int]]) -> None:
    method, client = fed_sb(start="seed"), Client("a", 1, RANK)
    state = start(method)
    assert set(received(method, state, client)) == {"R", "frozen", "head"}
    state |= {"R": {site: torch.eye(RANK) for site in SITES}}
    for site, delta in served(method, state, client, sites).items():
        assert torch.equal(delta, served(method, state, client, SITES)[site])
        S = torch.linalg.svdvals(delta)
        torch.testing.assert_close(S, torch.tensor([6.0 / RANK] * RANK + [0.0] * (len(S) - RANK)), rtol=1e-5, atol=1e-5)
