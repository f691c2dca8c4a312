from __future__ import annotations

import pytest
import torch

from fedloom.core import Client
from fedloom.errors import ConfigError
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.rng import generator
from fedloom.state import State

from .cases import EXAMPLES, RANK, after, engine, start

SITES = {"p": (5, 4), "q": (3, 6)}


def problem(K: int = 5) -> tuple[State, list[tuple[Client, State]]]:
    """A server's state and what K clients send, at random."""

    def draw(*key: int | str) -> State:
        rng = generator(*key)
        A = {s: torch.randn(2, n, generator=rng, dtype=torch.float64) for s, (_, n) in SITES.items()}
        return {"A": A, "B": {s: torch.randn(m, 2, generator=rng, dtype=torch.float64) for s, (m, _) in SITES.items()}}

    sent = []
    for k in range(K):
        change = draw("client", k)
        at = draw("server")
        sent.append((Client(f"c{k}", k + 1, 2), {r: {s: at[r][s] + 0.3 * change[r][s] for s in SITES} for r in "AB"}))
    return draw("server"), sent


def flat(state: State) -> torch.Tensor:
    return torch.cat([state[r][s].flatten() for r in "AB" for s in SITES])


def reference(x: torch.Tensor, uploads: torch.Tensor, T: torch.Tensor, steps: int, lr: float) -> torch.Tensor:
    """The loss written out over whole vectors, and Adam by its formula."""
    m, v = torch.zeros_like(T), torch.zeros_like(T)
    for i in range(1, steps + 1):
        T = T.detach().requires_grad_()
        p = T.softmax(0)
        tau = uploads - x
        loss = (p * (1 - torch.nn.functional.cosine_similarity(x[None], uploads))).sum()
        loss = loss + (p * (tau - p @ tau).norm(dim=1)).sum()
        (g,) = torch.autograd.grad(loss, T)
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g**2
        T = T.detach() - lr * (m / (1 - 0.5**i)) / ((v / (1 - 0.999**i)).sqrt() + 1e-8)
    return T


@pytest.mark.parametrize("steps, lr", [(1, 1e-3), (30, 0.05)])
def test_weights_are_those_of_the_loss_written_out(steps: int, lr: float) -> None:
    first, sent = problem()
    method = build({"name": "fedawa", "steps": steps, "lr": lr}, {"rank": 2})
    T = torch.tensor([client.examples / 15 for client, _ in sent], dtype=torch.float64)
    state = first
    for t in (1, 2):
        uploads = torch.stack([flat(x) for _, x in sent])
        T = reference(flat(state), uploads, T, steps, lr)
        state = after(method, state, sent, t)
        torch.testing.assert_close(flat(state), T.softmax(0) @ uploads, rtol=1e-5, atol=1e-6)
        got = torch.stack([state["awa_T"][client.id] for client, _ in sent])
        torch.testing.assert_close(got.double(), T, rtol=1e-4, atol=1e-6)


def test_a_client_that_goes_its_own_way_loses_weight() -> None:
    """Four clients change alike, the fifth far the other way."""
    first, sent = problem()
    near = sent[0][1]
    away = {r: {s: first[r][s] - 5 * (x - first[r][s]) for s, x in group.items()} for r, group in near.items()}
    uploads = [(Client(f"c{k}", 10, 2), near if k < 4 else away) for k in range(5)]
    method = build({"name": "fedawa", "steps": 20, "lr": 0.05}, {"rank": 2})
    state = first
    for t in range(1, 6):
        state = after(method, first | {k: v for k, v in state.items() if k == "awa_T"}, uploads, t)
    T = torch.stack([state["awa_T"][f"c{k}"] for k in range(5)])
    assert float(T.softmax(0)[4]) < 0.05 and float(T[:4].std()) < 1e-4


def test_weights_belong_to_clients_and_not_to_places() -> None:
    """A client that is away for a round keeps its T, and the others theirs."""
    method = build({"name": "fedawa", "steps": 5, "lr": 0.1}, {"rank": RANK})
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    at = engine()
    one = federate(method, at, start(method), clients, 1)
    two = federate(method, at, one, clients[1:], 2, start=2)
    assert set(two["awa_T"]) == set(EXAMPLES)
    assert torch.equal(two["awa_T"]["a"], one["awa_T"]["a"])
    assert all(not torch.equal(two["awa_T"][k], one["awa_T"][k]) for k in "bcd")


def test_methods_that_read_their_uploads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedawa cannot go over flexlora: .* reads each upload itself"):
        build({"name": "fedawa", "over": {"name": "flexlora"}}, {"rank": 4})
