from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client, Upload
from fedloom.methods import build

from .cases import SITES, served, update


def test_ffa_lora_by_hand() -> None:
    """B is padded with zeros: (3 [1 2] + 1 [4 0]) / 4."""
    method = build("ffa_lora", rank=2, alpha=2.0)
    first = method.init({"s": (1, 3)}, lora.generator(0))
    sent = [
        Upload(Client("a", 3, 2), {"B": {"s": torch.tensor([[1.0, 2.0]])}}, 1),
        Upload(Client("b", 1, 1), {"B": {"s": torch.tensor([[4.0]])}}, 1),
    ]
    after = method.aggregate(first, sent)
    assert after["B"]["s"].tolist() == [[1.75, 1.5]] and torch.equal(after["A"]["s"], first["A"]["s"])


def test_ffa_lora_average_is_exact_for_any_ranks() -> None:
    method = build("ffa_lora", rank=4)
    first = method.init(SITES, lora.generator(0))
    clients = [Client("a", 3, 1), Client("b", 5, 4), Client("c", 4, 2)]
    want, sent = {site: torch.zeros(shape) for site, shape in SITES.items()}, []
    for client in clients:
        work = method.prepare(method.broadcast(first, client, 1), {}, SITES, client, 1)
        rng = lora.generator(client.id)
        B = {site: torch.randn(x.shape, generator=rng) for site, x in work.train["B"].items()}
        for site, delta in update(method, work, {"B": B}).items():
            want[site] += client.examples / 12 * delta
        sent.append(Upload(client, {"B": B}, 1))
    got = served(method, method.aggregate(first, sent), Client("e", 1, 4), SITES)
    for site in SITES:
        torch.testing.assert_close(got[site], want[site], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("a_init", ["kaiming", "orthonormal"])
def test_ffa_lora_clients_make_the_servers_A_from_the_seed(a_init: str) -> None:
    method = build("ffa_lora", rank=4, a_init=a_init)
    first = method.init(SITES, lora.generator(0))
    # A client may name its layers in another order than the server.
    for sites in (SITES, dict(reversed(SITES.items()))):
        client = Client("a", 1, 3)
        received = method.broadcast(first, client, 1)
        assert set(received) == {"frozen", "B"}
        work = method.prepare(received, {}, sites, client, 1)
        assert set(work.train) == {"B"} and not any("A" in group for group in (work.base, work.train))
        assert all(torch.equal(work.fixed["A"][site], first["A"][site][:3]) for site in SITES)
    if a_init == "orthonormal":
        for A in first["A"].values():
            torch.testing.assert_close(A @ A.T, torch.eye(4))
    twins = method.init({"x": (5, 6), "y": (5, 6)}, lora.generator(0))["A"]
    assert not torch.allclose(twins["x"], twins["y"]), "layers differ"
