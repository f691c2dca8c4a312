from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client
from fedloom.loop import one_round
from fedloom.methods import build, products

from .cases import SITES, after, engine, ideal, random_uploads, served, start, state, uploads

LORA = {"rank": 4, "alpha": 6.0}
CLIENT = Client("x", 1, 4)


def scale(client: Client) -> float:
    return lora.scale(6.0, client.rank)


def test_florist_by_hand() -> None:
    """Ranks 1 and 1 at scale 6, weights 1/2: D = diag(6, 3), of whose energy 45 the first direction holds 0.8."""
    sent = uploads((5, state([[1.0, 0.0]], [[2.0], [0.0]])), (5, state([[0.0, 1.0]], [[0.0], [1.0]])))
    first = {"fresh": {"seed": torch.tensor([1])}}
    for energy, want in ((0.79, [[6.0, 0.0], [0.0, 0.0]]), (0.81, [[6.0, 0.0], [0.0, 3.0]])):
        method = build({"name": "florist", "energy": energy}, LORA)
        got = served(method, after(method, first, sent), Client("x", 1, 1), {"s": (2, 2)})
        torch.testing.assert_close(got["s"], torch.tensor(want))


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95, 1.0])
def test_florist_keeps_the_best_approximation_of_that_energy(energy: float) -> None:
    method = build({"name": "florist", "energy": energy}, LORA)
    sent = random_uploads([1, 3, 4])
    got = served(method, after(method, start(method, dtype=torch.float64), sent), CLIENT, SITES)
    for site, D in ideal(sent, scale).items():
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        p = next(p for p in range(1, len(S) + 1) if (S[:p] ** 2).sum() >= (energy - 1e-12) * (S**2).sum())
        torch.testing.assert_close(got[site], (U[:, :p] * S[:p]) @ Vh[:p], rtol=1e-9, atol=1e-9)


def test_florist_that_keeps_all_is_flora() -> None:
    sent = random_uploads([1, 2, 4])
    found = []
    for table in ({"name": "florist", "energy": 1.0}, {"name": "flora"}):
        method = build(table, LORA)
        found.append(served(method, after(method, start(method, dtype=torch.float64), sent), CLIENT, SITES))
    for site in SITES:
        torch.testing.assert_close(found[0][site], found[1][site], rtol=1e-10, atol=1e-10)


def test_florist_that_continues_and_keeps_all_is_flexlora() -> None:
    florist, flex = (
        build({"name": "florist", "start": "continue", "energy": 1.0}, LORA),
        build({"name": "flexlora"}, LORA),
    )
    a = b = start(flex, dtype=torch.float64)
    for t in (1, 2, 3):
        sent = random_uploads([1, 2, 4], key=t)
        a, b = after(florist, a, sent, t), after(flex, b, sent, t)
        for client in (CLIENT, Client("y", 1, 2)):
            one, two = served(florist, a, client, SITES), served(flex, b, client, SITES)
            for site in SITES:
                torch.testing.assert_close(one[site], two[site], rtol=1e-10, atol=1e-10)


def test_florist_that_continues_keeps_the_ranks_alive_that_it_fills_up() -> None:
    """Fewer directions than the client's rank: B = 0 there, and A has a direction, so that B gets a gradient."""
    method = build({"name": "florist", "start": "continue", "energy": 0.3}, LORA)
    first = start(method, dtype=torch.float64)
    at = after(method, first, random_uploads([2, 2]))
    sent = method.serve(at, CLIENT)
    for site in SITES:
        dead = (sent["B"][site] == 0).all(0)
        assert dead.any() and (sent["A"][site][dead].norm(dim=1) > 0).all()
        assert torch.equal(sent["A"][site][dead], first["A"][site][dead])


def test_florist_reports_the_rank_it_kept() -> None:
    method = build({"name": "florist", "energy": 1.0}, LORA)
    _, record = one_round(method, engine(), start(method), [Client("a", 12, 1), Client("b", 20, 2)], 1)
    assert record.report["kept_rank"] == 3.0


@pytest.mark.parametrize(
    ("values", "share", "want"),
    [
        ([2.0, 1.0, 1.0], 0.6, 1),
        ([2.0, 1.0, 1.0], 0.7, 2),
        ([2.0, 1.0, 1.0], 1.0, 3),
        ([0.0, 0.0], 0.9, 1),
        ([1.0], 0.1, 1),
    ],
)
def test_energy_rank(values: list[float], share: float, want: int) -> None:
    assert products.energy_rank(torch.tensor(values), share) == want
