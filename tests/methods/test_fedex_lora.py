from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client, State
from fedloom.loop import one_round
from fedloom.methods import build
from fedloom.rng import generator

from .cases import (
    ONE,
    SITES,
    TWO,
    ZERO,
    after,
    engine,
    first_work,
    ideal,
    random_uploads,
    received,
    served,
    start,
    uploads,
)


def test_fedex_lora_by_hand() -> None:
    """Scale 2, weights 3/4 and 1/4: the residual is 2 (3/4 B1 A1 + 1/4 B2 A2 - [4 4 1]^T [2 3])."""
    method = build({"name": "fedex_lora"}, {"rank": 1, "alpha": 2.0})
    new = after(method, ZERO, uploads((3, ONE), (1, TWO)))
    assert new["A"]["s"].tolist() == [[2.0, 3.0]] and new["B"]["s"].tolist() == [[4.0], [4.0], [1.0]]
    left, right = new["left"]["s"], new.get("right", {}).get("s")
    residual = left if right is None else left @ right
    #  3/4 [3 6; 5 10; 0 0] + 1/4 [35 42; 5 6; 20 24] = [11 15; 5 9; 5 6];  minus [8 12; 8 12; 2 3]
    assert residual.tolist() == [[6.0, 6.0], [-6.0, -6.0], [6.0, 6.0]]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("sites", [{"s": (40, 50)}, {"s": (7, 5)}], ids=["factors", "dense"])
def test_fedex_lora_is_exact_over_rounds(rslora: bool, sites: dict[str, tuple[int, int]]) -> None:
    """W0 + D is the mean of the clients' models, as factors or dense, and crossing from one to the other."""
    method = build({"name": "fedex_lora"}, {"rank": 2, "alpha": 3.0, "rslora": rslora})
    scale = lora.scale(3.0, 2, rslora)
    at: State = method.init(sites, generator(0))
    client = Client("x", 1, 2)
    forms = []
    for t in range(1, 9):
        before = served(method, at, client, sites)
        product = {s: scale * at["B"][s] @ at["A"][s] for s in sites}
        sent = random_uploads([2, 2, 2], sites, t)
        at = after(method, at, sent, t)
        forms.append("s" in at["right"])
        if t == 1:
            left, right = at["left"]["s"], at["right"].get("s")
            assert torch.linalg.matrix_rank(left if right is None else left @ right) <= 4, "(K - 1) r"
        got, want = served(method, at, client, sites), ideal(sent, lambda client: scale)
        for s in sites:
            torch.testing.assert_close(got[s], before[s] - product[s] + want[s], rtol=1e-9, atol=1e-9)
    assert forms == ([True] * 5 + [False] * 3 if sites["s"] == (40, 50) else [False] * 8)


def test_fedex_lora_offset_reaches_those_that_missed_rounds() -> None:
    method = build({"name": "fedex_lora"}, {"rank": 2})
    at = method.init(SITES, generator(0))
    for t in (1, 2):
        at = after(method, at, random_uploads([2, 2], SITES, t), t)
    client = Client("late", 1, 2)
    down = received(method, at, client, 3)
    assert down["left"] is at["left"]
    work = first_work(method, down, client, 3)
    assert set(work.train) == {"A", "B"} and work.base["left"] is at["left"]


def test_fedex_lora_gets_no_offset_back() -> None:
    method = build({"name": "fedex_lora"}, {"rank": 4})
    state = start(method)
    clients = [Client("a", 12, 4), Client("b", 20, 4)]
    state, _ = one_round(method, engine(), state, clients, 1)
    _, record = one_round(method, engine(), state, clients, 2)
    assert "left" in record.down.by_role and set(record.up.by_role) == {"A", "B", "head"}
