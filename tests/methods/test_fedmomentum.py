from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client
from fedloom.methods import build

from .cases import SITES, after, ideal, random_uploads, served, start, state, uploads

CLIENT = Client("x", 1, 2)


def test_fedmomentum_by_hand() -> None:
    """Rank 1, scale 2, weights 1/2: sum of products without it diag(8, 1/2); adapter sqrt(8), sqrt(8); base 2 * 1/2."""
    method = build({"name": "fedmomentum", "energy": 1.0}, {"rank": 1, "alpha": 2.0})
    sent = uploads((5, state([[1.0, 0.0]], [[16.0], [0.0]])), (5, state([[0.0, 1.0]], [[0.0], [1.0]])))
    at = after(method, state([[0.0, 0.0]], [[0.0], [0.0]]), sent)
    torch.testing.assert_close(at["A"]["s"], torch.tensor([[8.0**0.5, 0.0]]))
    torch.testing.assert_close(at["B"]["s"], torch.tensor([[8.0**0.5], [0.0]]))
    torch.testing.assert_close(at["left"]["s"], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    less = build({"name": "fedmomentum", "energy": 0.9}, {"rank": 1, "alpha": 2.0})
    assert "s" not in after(less, state([[0.0, 0.0]], [[0.0], [0.0]]), sent)["left"], (
        "0.99 of the energy is in the adapter"
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_fedmomentum_is_exact_over_rounds_and_its_adapter_holds_most_of_the_sum(rslora: bool) -> None:
    method = build({"name": "fedmomentum", "energy": 1.0}, {"rank": 2, "alpha": 3.0, "rslora": rslora})
    s = lora.scale(3.0, 2, rslora)
    at = start(method, dtype=torch.float64)
    for t in (1, 2, 3):
        sent = random_uploads([2, 2, 2], key=t)
        before = served(method, at, CLIENT, SITES)
        own = {site: s * at["B"][site] @ at["A"][site] for site in SITES}
        at = after(method, at, sent, t)
        got = served(method, at, CLIENT, SITES)
        for site, D in ideal(sent, lambda client: s).items():
            torch.testing.assert_close(got[site], before[site] - own[site] + D, rtol=1e-9, atol=1e-9)
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            torch.testing.assert_close(s * at["B"][site] @ at["A"][site], (U[:, :2] * S[:2]) @ Vh[:2])
            torch.testing.assert_close(at["B"][site].T @ at["B"][site], at["A"][site] @ at["A"][site].T)


def test_fedmomentum_and_flora_and_fedex_lora_make_the_same_model() -> None:
    sent = random_uploads([2, 2, 2])
    found = []
    for table in ({"name": "fedmomentum", "energy": 1.0}, {"name": "flora"}, {"name": "fedex_lora"}):
        method = build(table, {"rank": 2, "alpha": 3.0})
        found.append(served(method, after(method, start(method, dtype=torch.float64), sent), CLIENT, SITES))
    for other in found[1:]:
        for site in SITES:
            torch.testing.assert_close(found[0][site], other[site], rtol=1e-9, atol=1e-9)


def test_fedmomentum_keeps_ranks_alive_that_the_sum_does_not_fill() -> None:
    """Clients that learnt rank 1 of 2: the other rank has B = 0 and its old A, not zeros in both."""
    method = build({"name": "fedmomentum"}, {"rank": 2})
    sent = random_uploads([2, 2])
    for _, upload in sent:
        for site in SITES:
            upload["A"][site][:] = sent[0][1]["A"][site][:1]
            upload["B"][site][:, 1] = 0
    first = start(method, dtype=torch.float64)
    at = after(method, first, sent)
    for site in SITES:
        assert (at["B"][site][:, 0] != 0).any() and (at["B"][site][:, 1] == 0).all()
        assert torch.equal(at["A"][site][1], first["A"][site][1])


def test_fedmomentum_offset_is_cut_to_the_energy_asked_for() -> None:
    sent = random_uploads([2, 2, 2])
    ranks = []
    for energy in (0.5, 0.9, 0.99, 1.0):
        method = build({"name": "fedmomentum", "energy": energy}, {"rank": 2, "alpha": 3.0})
        at = after(method, start(method, dtype=torch.float64), sent)
        got = served(method, at, CLIENT, SITES)
        kept = 0
        for site, D in ideal(sent, lambda client: 1.5).items():
            S = torch.linalg.svdvals(got[site])
            lost = torch.linalg.svdvals(D - got[site]).square().sum() / D.square().sum()
            assert lost <= 1 - energy + 1e-9 or int((S > 1e-9).sum()) == 2
            kept += int((S > 1e-9).sum())
        ranks.append(kept)
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]
