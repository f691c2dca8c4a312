from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client, Each, Round, Upload
from fedloom.methods import build
from fedloom.state import only

from .cases import SITES, after, random_uploads, served, start, state, uploads

LORA = {"rank": 4, "alpha": 6.0}


def test_raflora_by_hand() -> None:
    """Alpha 2, scales 2 and 1, weights 3/4 and 1/4: first rank 3/4 * 2 * 4 + 1/4 * 1 * 8 = 8, second 1 * 1 * 4 alone."""
    method = build({"name": "raflora"}, {"rank": 2, "alpha": 2.0})
    one, two = state([[1.0, 0.0]], [[4.0], [0.0]]), state([[1.0, 0.0], [0.0, 1.0]], [[8.0, 0.0], [0.0, 4.0]])
    at = after(method, state([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2), uploads((3, one), (1, two)))
    torch.testing.assert_close(at["A"]["s"], torch.eye(2))
    torch.testing.assert_close(at["B"]["s"], torch.diag(torch.tensor([8.0, 4.0])))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [[1, 2, 4], [1, 3, 3, 4, 2], [2, 4]])
def test_each_column_has_its_weight_among_those_who_hold_it(rslora: bool, ranks: list[int]) -> None:
    """RB-LoRA's form: column i of client k times n_k / sum of the n of clients of rank above i, dense."""
    method = build({"name": "raflora"}, LORA | {"rslora": rslora})
    sent = random_uploads(ranks)
    at = after(method, start(method, dtype=torch.float64), sent)
    got = served(method, at, Client("x", 1, 4), SITES)
    for site in SITES:
        D = torch.zeros(SITES[site], dtype=torch.float64)
        for client, x in sent:
            for i in range(client.rank):
                share = client.examples / sum(c.examples for c, _ in sent if c.rank > i)
                D += share * lora.scale(6.0, client.rank, rslora) * torch.outer(x["B"][site][:, i], x["A"][site][i])
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        torch.testing.assert_close(got[site], (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-9, atol=1e-9)


def test_at_equal_ranks_it_is_flexlora() -> None:
    ra, flex = build({"name": "raflora"}, LORA), build({"name": "flexlora"}, LORA)
    a = b = start(flex, dtype=torch.float64)
    for t in (1, 2):
        sent = random_uploads([4, 4, 4], key=t)
        a, b = after(ra, a, sent, t), after(flex, b, sent, t)
    for site in SITES:
        torch.testing.assert_close(a["B"][site] @ a["A"][site], b["B"][site] @ b["A"][site], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [[1, 2, 4], [1, 2, 2]])
def test_clients_that_learn_nothing_change_nothing(ranks: list[int]) -> None:
    """Even where nobody holds the last ranks. FlexLoRA's would fade."""
    method = build({"name": "raflora"}, LORA)
    first = after(method, start(method, dtype=torch.float64), random_uploads([4, 4]))
    at = first
    clients = [Client(f"c{i}", i + 1, r) for i, r in enumerate(ranks)]
    for t in (2, 3, 4):
        at = after(method, at, [(c, only(method.serve(at, c), "A", "B")) for c in clients], t)
    for site in SITES:
        want = first["B"][site] @ first["A"][site]
        torch.testing.assert_close(at["B"][site] @ at["A"][site], want, rtol=1e-10, atol=1e-10)


def test_a_client_whose_answer_was_not_used_has_no_weight() -> None:
    """Its rank made a band of the round, but the others share it among themselves."""
    method = build({"name": "raflora"}, LORA)
    sent = random_uploads([1, 2, 4])
    first = start(method, dtype=torch.float64)
    flow = method.server(first, Round(1, (*(c for c, _ in sent), Client("gone", 50, 3)), 4, SITES))
    asked = flow.send(None)
    assert isinstance(asked, Each)
    with pytest.raises(StopIteration) as stop:
        flow.send(iter([Upload(c, x, asked.weight(c)) for c, x in sent]))
    got, want = stop.value.value, after(method, first, sent)
    for site in SITES:
        torch.testing.assert_close(got["B"][site] @ got["A"][site], want["B"][site] @ want["A"][site])
