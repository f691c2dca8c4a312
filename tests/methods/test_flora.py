from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, State, Visit
from fedloom.methods import build
from fedloom.rng import generator

from .cases import ONE, SITES, TWO, after, ideal, random_uploads, served, start, state, uploads

LORA = {"rank": 4, "alpha": 6.0}


def offset(at: State, site: str) -> Tensor:
    left, right = at["left"][site], at.get("right", {}).get(site)
    return left if right is None else left @ right


def test_flora_by_hand() -> None:
    """Ranks 1 and 2 at alpha 6: scales 6 and 3, weights 3/4 and 1/4, each product merged with its own client's scale."""
    method = build({"name": "flora"}, LORA)
    two = state([[5.0, 6.0], [1.0, 0.0]], [[7.0, 0.0], [1.0, 0.0], [4.0, 4.0]])
    first = {"fresh": {"seed": torch.tensor([1])}}
    got = offset(after(method, first, uploads((3, ONE), (1, two))), "s")
    #  6 * 3/4 [3 6; 5 10; 0 0] + 3 * 1/4 [35 42; 5 6; 24 24]
    assert got.tolist() == [[39.75, 58.5], [26.25, 49.5], [18.0, 18.0]]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [[1, 2, 4], [4, 4], [3], [1, 4, 2, 3, 4]])
def test_flora_is_the_weighted_sum_of_the_clients_updates_over_rounds(rslora: bool, ranks: list[int]) -> None:
    method = build({"name": "flora"}, LORA | {"rslora": rslora})
    at: State = start(method, dtype=torch.float64)
    want = {site: torch.zeros(m, n, dtype=torch.float64) for site, (m, n) in SITES.items()}
    for t in (1, 2, 3):
        sent = random_uploads(ranks, key=t)
        at = after(method, at, sent, t)
        for site, x in ideal(sent, lambda client: lora.scale(6.0, client.rank, rslora)).items():
            want[site] = want[site] + x
    for site in SITES:
        torch.testing.assert_close(offset(at, site), want[site], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(served(method, at, Client("x", 1, 2), SITES)[site], want[site])


def test_flora_at_equal_ranks_is_the_model_that_fedex_lora_merges() -> None:
    """One round from the same start: FLoRA's W0 + offset is FedEx-LoRA's W0 + offset + s B A."""
    flora, fedex = build({"name": "flora"}, LORA), build({"name": "fedex_lora"}, LORA)
    sent = random_uploads([4, 4, 4])
    client = Client("x", 1, 4)
    got = served(flora, after(flora, start(flora, dtype=torch.float64), sent), client, SITES)
    first = start(fedex, dtype=torch.float64)
    want = served(fedex, after(fedex, first, sent), client, SITES)
    for site in SITES:
        torch.testing.assert_close(got[site], want[site], rtol=1e-10, atol=1e-10)


def test_flora_starts_afresh() -> None:
    """Every client and round another A, B = 0: the model is the merged one, whatever was drawn."""
    method = build({"name": "flora"}, LORA)
    at = after(method, start(method, dtype=torch.float64), random_uploads([1, 2]))
    drawn = []
    for client in (Client("a", 1, 2), Client("b", 1, 4)):
        for t in (2, 3):
            work = method.model(method.serve(at, client), {}, Visit(t, client, SITES))
            assert work.train["A"]["layers.0.in"].shape == (client.rank, 6)
            assert all((x == 0).all() for x in work.train["B"].values())
            drawn.append(work.train["A"]["layers.0.in"][0])
            again = method.model(method.serve(at, client), {}, Visit(t, client, SITES))
            assert torch.equal(again.train["A"]["layers.0.in"], work.train["A"]["layers.0.in"])
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_flora_offset_reaches_those_that_missed_rounds() -> None:
    method = build({"name": "flora"}, LORA)
    at = method.init(SITES, generator(0))
    for t in (1, 2):
        at = after(method, at, [(c, _float(x)) for c, x in random_uploads([1, 2], key=t)], t)
    late = served(method, at, Client("late", 1, 1), SITES)
    for site in SITES:
        torch.testing.assert_close(late[site], offset(at, site))


def _float(x: State) -> State:
    return {role: {site: v.float() for site, v in group.items()} for role, group in x.items()}


def test_flora_offset_is_dense_where_that_is_smaller() -> None:
    method = build({"name": "flora"}, LORA)
    first = {"fresh": {"seed": torch.tensor([1])}}
    at = after(method, first, uploads((1, ONE), (1, TWO)))
    assert "s" not in at.get("right", {}), "rank 2 of a 3 x 2 layer is dense"
