"""Where the tail of a cut sum goes: ECLoRA, and FlexLoRA's `tail`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Method, State
from fedloom.methods import build

from .cases import SITES, Sent, after, ideal, random_uploads, served, start, state, uploads

LORA = {"rank": 3, "alpha": 6.0}
CLIENT = Client("x", 1, 3)


def scale(client: Client) -> float:
    return lora.scale(6.0, client.rank)


def rest(at: State, site: str) -> Tensor:
    return at["rest_left"][site] @ at["rest_right"][site]


def test_eclora_by_hand() -> None:
    """Rank 1, scale 2. Round 1: D = diag(4, 2), kept 4, error 2. Round 2: D = diag(1, 1), C = diag(1, 3): kept 3, error 1."""
    method = build({"name": "eclora"}, {"rank": 1, "alpha": 2.0})
    at = state([[0.0, 0.0]], [[0.0], [0.0]])
    a, b = state([[1.0, 0.0]], [[4.0], [0.0]]), state([[0.0, 1.0]], [[0.0], [2.0]])
    at = after(method, at, uploads((5, a), (5, b)), 1)
    torch.testing.assert_close(at["B"]["s"] @ at["A"]["s"], torch.diag(torch.tensor([4.0, 0.0])))
    torch.testing.assert_close(rest(at, "s"), torch.diag(torch.tensor([0.0, 2.0])))
    a, b = state([[1.0, 0.0]], [[1.0], [0.0]]), state([[0.0, 1.0]], [[0.0], [1.0]])
    at = after(method, at, uploads((5, a), (5, b)), 2)
    torch.testing.assert_close(at["B"]["s"] @ at["A"]["s"], torch.diag(torch.tensor([0.0, 3.0])))
    torch.testing.assert_close(rest(at, "s"), torch.diag(torch.tensor([1.0, 0.0])))


@pytest.mark.parametrize("table", [{"name": "eclora"}, {"name": "flexlora", "tail": "error"}])
def test_nothing_is_lost_with_error_feedback(table: dict[str, Any]) -> None:
    """C_r + E is D + the error of the last round, always."""
    method = build(table, LORA)
    at = start(method, dtype=torch.float64)
    error = {site: torch.zeros(m, n, dtype=torch.float64) for site, (m, n) in SITES.items()}
    for t in (1, 2, 3):
        sent = random_uploads([1, 2, 3], key=t)
        at = after(method, at, sent, t)
        kept = served(method, at, CLIENT, SITES)
        for site, D in ideal(sent, scale).items():
            torch.testing.assert_close(kept[site] + rest(at, site), D + error[site], rtol=1e-9, atol=1e-9)
            error[site] = rest(at, site)
            assert torch.linalg.matrix_rank(kept[site]) <= 3
            assert set(method.serve(at, CLIENT)) == {"A", "B", "head"}, "the error stays with the server"


def test_eclora_bounds_the_rank_of_its_error() -> None:
    method = build({"name": "eclora", "error_rank": 1}, LORA)
    at = after(method, start(method, dtype=torch.float64), random_uploads([3, 3]))
    assert {x.shape[1] for x in at["rest_left"].values()} == {1} == {x.shape[0] for x in at["rest_right"].values()}


def unchanged(method: Method, at: State, ranks: list[int]) -> list[Sent]:
    """Clients that send back what they received."""
    clients = [Client(f"c{i}", i + 1, r) for i, r in enumerate(ranks)]
    return [(c, {k: method.serve(at, c)[k] for k in ("A", "B")}) for c in clients]


def test_only_with_the_rest_at_the_server_do_clients_that_learn_nothing_change_nothing() -> None:
    found = {}
    for tail in ("drop", "error", "server"):
        method = build({"name": "flexlora", "tail": tail}, LORA)
        at = after(method, start(method, dtype=torch.float64), random_uploads([3, 3, 3]))
        first = served(method, at, CLIENT, SITES)
        whole = {site: x + (rest(at, site) if tail != "drop" else 0) for site, x in first.items()}
        for t in (2, 3, 4):
            at = after(method, at, unchanged(method, at, [1, 2, 3]), t)
        last = served(method, at, CLIENT, SITES)
        left = {site: last[site] + (rest(at, site) if tail != "drop" else 0) for site in SITES}
        found[tail] = max(float((left[s] - whole[s]).norm() / whole[s].norm()) for s in SITES)
    assert found["server"] < 1e-12 and min(found["error"], found["drop"]) > 0.1


def test_at_equal_ranks_the_server_keeps_what_error_feedback_keeps() -> None:
    a, b = (build({"name": "flexlora", "tail": tail}, LORA) for tail in ("error", "server"))
    one = two = start(a, dtype=torch.float64)
    for t in (1, 2, 3):
        sent = random_uploads([3, 3], key=t)
        one, two = after(a, one, sent, t), after(b, two, sent, t)
    for site in SITES:
        torch.testing.assert_close(served(a, one, CLIENT, SITES)[site], served(b, two, CLIENT, SITES)[site])
