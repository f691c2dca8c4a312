from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, State
from fedloom.errors import ConfigError
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.rng import generator

from .cases import CASES, RANK, SITES, Sent, ToyTrainer, after, engine, first_work, received, served, start

TABLE = {"rank": RANK, "alpha": 6.0}


def sent(key: int = 0) -> list[Sent]:
    """Uploads of B alone."""
    rng = generator("B", key)
    return [
        (Client(k, n, RANK), {"B": {s: torch.randn(m, RANK, generator=rng) for s, (m, _) in SITES.items()}})
        for k, n in (("a", 3), ("b", 5), ("c", 4))
    ]


def A_of(state: State, **fields: object) -> dict[str, torch.Tensor]:
    """The A that a client makes of what it is sent."""
    method = build({"name": "fedsvd", **fields}, TABLE)
    client = Client("a", 1, RANK)
    return first_work(method, received(method, state, client), client).fixed["A"]


@pytest.mark.parametrize("a_init", ["kaiming", "orthonormal"])
def test_fedsvd_keeps_the_mean_of_the_models_and_makes_A_orthonormal(a_init: str) -> None:
    method = build({"name": "fedsvd", "a_init": a_init}, TABLE)
    state = start(method)
    for t in (1, 2):
        A, some = A_of(state, a_init=a_init), sent(t)
        state = after(method, state, some, t)
        got = served(method, state, some[0][0], SITES)
        new = A_of(state, a_init=a_init)
        for site in SITES:
            mean = sum(client.examples / 12 * x["B"][site] for client, x in some)
            torch.testing.assert_close(got[site], 6.0 / RANK * mean @ A[site], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(new[site] @ new[site].T, torch.eye(RANK), rtol=1e-5, atol=1e-5)
            gram = state["B"][site].T @ state["B"][site]
            torch.testing.assert_close(gram, gram.diag().diag(), rtol=1e-4, atol=1e-4, msg="B is U S")
            assert (gram.diag().diff() <= 0).all()


def test_fedsvd_starts_as_ffa_lora() -> None:
    """The same seed gives the same A, at both starts; A takes a seed and an (r, r) turn on the wire."""
    for a_init in ("kaiming", "orthonormal"):
        method = build({"name": "fedsvd", "a_init": a_init}, TABLE)
        ffa = build({"name": "ffa_lora", "a_init": a_init}, TABLE).init(SITES, generator(0, "init"))
        state = start(method)
        assert set(received(method, state, Client("a", 1, RANK))) == {"B", "turn", "frozen", "head"}
        for site, A in A_of(state, a_init=a_init).items():
            torch.testing.assert_close(A, ffa["A"][site])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedsvd_is_ffa_lora_at_an_orthonormal_start_under_sgd(optimizer: str) -> None:
    """Gradients turn along with A; Adam's coordinates do not."""
    models = []
    for name in ("fedsvd", "ffa_lora"):
        method = build({"name": name, "a_init": "orthonormal"}, TABLE)
        at = engine(ToyTrainer(optimizer=optimizer, lr=0.05))
        state = federate(method, at, start(method), CASES[0].clients(), 4)
        models.append(served(method, state, Client("a", 1, RANK), SITES))
    apart = max(float((models[0][site] - models[1][site]).norm() / models[1][site].norm()) for site in SITES)
    assert apart < 1e-5 if optimizer == "sgd" else apart > 1e-2


def test_fedsvd_turns_every_so_many_rounds() -> None:
    method = build({"name": "fedsvd", "every": 3}, TABLE)
    state = start(method)
    for t in (1, 2, 3):
        before, state = state, after(method, state, sent(t), t)
        assert all(torch.equal(state["turn"][site], before["turn"][site]) for site in SITES) == (t < 3)


def test_fedsvd_refuses_a_rank_above_a_side() -> None:
    with pytest.raises(ConfigError, match=r"rank 6 for layers\.1\.out of 5 x 7"):
        build({"name": "fedsvd"}, {"rank": 6}).init(SITES, generator(0))
