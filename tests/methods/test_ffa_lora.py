from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.core import Client, Visit
from fedloom.methods import build
from fedloom.rng import generator

from .cases import SITES, after, first_work, received, served, update


def test_ffa_lora_by_hand() -> None:
    """B is padded with zeros: (3 [1 2] + 1 [4 0]) / 4."""
    method = build({"name": "ffa_lora"}, {"rank": 2, "alpha": 2.0})
    first = method.init({"s": (1, 3)}, generator(0))
    sent: list[Any] = [
        (Client("a", 3, 2), {"B": {"s": torch.tensor([[1.0, 2.0]])}}),
        (Client("b", 1, 1), {"B": {"s": torch.tensor([[4.0]])}}),
    ]
    new = after(method, first, sent)
    assert new["B"]["s"].tolist() == [[1.75, 1.5]] and torch.equal(new["A"]["s"], first["A"]["s"])


def test_ffa_lora_average_is_exact_for_any_ranks() -> None:
    method = build({"name": "ffa_lora"}, {"rank": 4})
    first = method.init(SITES, generator(0))
    clients = [Client("a", 3, 1), Client("b", 5, 4), Client("c", 4, 2)]
    want, sent = {site: torch.zeros(shape) for site, shape in SITES.items()}, []
    for client in clients:
        work = first_work(method, received(method, first, client), client)
        rng = generator(client.id)
        B = {site: torch.randn(x.shape, generator=rng) for site, x in work.train["B"].items()}
        for site, delta in update(work, {"B": B}).items():
            want[site] += client.examples / 12 * delta
        sent.append((client, {"B": B}))
    got = served(method, after(method, first, sent), Client("e", 1, 4), SITES)
    for site in SITES:
        torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("a_init", ["kaiming", "orthonormal"])
def test_ffa_lora_clients_make_the_servers_A_from_the_seed(a_init: str) -> None:
    method = build({"name": "ffa_lora", "a_init": a_init}, {"rank": 4})
    first = method.init(SITES, generator(0))
    # A client may name its layers in another order than the server.
    for sites in (SITES, dict(reversed(SITES.items()))):
        client = Client("a", 1, 3)
        down = received(method, first, client)
        assert set(down) == {"frozen", "B"}
        work = method.model(down, {}, Visit(1, client, sites))
        assert set(work.train) == {"B"} and not any("A" in group for group in (work.base, work.train))
        assert all(torch.equal(work.fixed["A"][site], first["A"][site][:3]) for site in SITES)
    if a_init == "orthonormal":
        for A in first["A"].values():
            torch.testing.assert_close(A @ A.T, torch.eye(4))
    twins = method.init({"x": (5, 6), "y": (5, 6)}, generator(0))["A"]
    assert not torch.allclose(twins["x"], twins["y"]), "layers differ"
