from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client
from fedloom.methods import build
from fedloom.rng import generator

from .cases import SITES, after, ideal, random_uploads, received, served, state, uploads


def test_flexlora_by_hand() -> None:
    """Ranks 1 and 1 at scale 4 and weights 1/2: D = 2 [2 0; 0 0] + 2 [0 0; 0 1] = diag(4, 2)."""
    method = build({"name": "flexlora"}, {"rank": 2, "alpha": 4.0})
    first = state([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    a, b = state([[1.0, 0.0]], [[2.0], [0.0]]), state([[0.0, 1.0]], [[0.0], [1.0]])
    new = after(method, first, uploads((5, a), (5, b)))
    torch.testing.assert_close(new["A"]["s"], torch.eye(2))
    torch.testing.assert_close(new["B"]["s"], torch.diag(torch.tensor([4.0, 2.0])))
    one = received(method, new, Client("x", 1, 1), 2)
    torch.testing.assert_close(one["B"]["s"], torch.tensor([[1.0], [0.0]]))  # 4 / (alpha / 1)
    two = received(method, new, Client("x", 1, 2), 2)
    torch.testing.assert_close(two["B"]["s"], torch.diag(torch.tensor([2.0, 1.0])))  # / (alpha / 2)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [[1, 2, 3], [4, 4, 4], [1], [3, 1, 4, 1, 5]])
def test_flexlora_is_the_best_of_each_rank(rslora: bool, ranks: list[int]) -> None:
    method = build({"name": "flexlora"}, {"rank": 5, "alpha": 7.0, "rslora": rslora})
    first = method.init(SITES, generator(0))
    sent = random_uploads(ranks)
    new = after(method, first, sent)
    want = ideal(sent, lambda client: lora.scale(7.0, client.rank, rslora))
    for r in range(1, 6):
        got = served(method, new, Client("x", 1, r), SITES)
        for site, D in want.items():
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            torch.testing.assert_close(got[site], U[:, :r] * S[:r] @ Vh[:r], rtol=1e-9, atol=1e-9)


def test_flexlora_ranks_that_were_not_filled_keep_a_direction() -> None:
    method = build({"name": "flexlora"}, {"rank": 4})
    first = {k: {s: x.double() for s, x in g.items()} for k, g in method.init(SITES, generator(0)).items()}
    new = after(method, first, random_uploads([1]))
    for site in SITES:
        assert (new["B"][site][:, 1:] == 0).all() and torch.equal(new["A"][site][1:], first["A"][site][1:])


def test_flexlora_spectrum_shrinks_by_the_share_that_holds_it() -> None:
    """Clients that send back what they received: direction i decays by pi_i, the weight of those with rank >= i."""
    method = build({"name": "flexlora"}, {"rank": 4, "alpha": 3.0})
    at = after(method, method.init(SITES, generator(0)), random_uploads([4]))
    spectrum = {site: torch.linalg.svdvals(at["B"][site]) for site in SITES}
    clients = [Client("a", 2, 1), Client("b", 3, 2), Client("c", 5, 4)]
    share = torch.tensor([1.0, 0.8, 0.5, 0.5], dtype=torch.float64)
    for t in range(1, 4):
        at = after(method, at, [(c, received(method, at, c, t)) for c in clients], t)
        for site in SITES:
            want = spectrum[site] * share**t
            torch.testing.assert_close(torch.linalg.svdvals(at["B"][site]), want.sort(descending=True).values)
