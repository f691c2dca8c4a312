from __future__ import annotations

import pytest
import torch

from fedloom import lora
from fedloom.core import Client, State
from fedloom.methods import build

from .cases import ONE, SITES, TWO, ZERO, ideal, random_uploads, served, uploads


def test_fedex_lora_by_hand() -> None:
    """Scale 2, weights 3/4 and 1/4: the residual is 2 (3/4 B1 A1 + 1/4 B2 A2 - [4 4 1]^T [2 3])."""
    method = build("fedex_lora", rank=1, alpha=2.0)
    after = method.aggregate(ZERO, uploads((3, ONE), (1, TWO)))
    assert after["A"]["s"].tolist() == [[2.0, 3.0]] and after["B"]["s"].tolist() == [[4.0], [4.0], [1.0]]
    left, right = after["left"]["s"], after.get("right", {}).get("s")
    residual = left if right is None else left @ right
    #  3/4 [3 6; 5 10; 0 0] + 1/4 [35 42; 5 6; 20 24] = [11 15; 5 9; 5 6];  minus [8 12; 8 12; 2 3]
    assert residual.tolist() == [[6.0, 6.0], [-6.0, -6.0], [6.0, 6.0]]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("sites", [{"s": (40, 50)}, {"s": (7, 5)}], ids=["factors", "dense"])
def test_fedex_lora_is_exact_over_rounds(rslora: bool, sites: dict[str, tuple[int, int]]) -> None:
    """W0 + D is the mean of the clients' models, as factors or dense, and crossing from one to the other."""
    method = build("fedex_lora", rank=2, alpha=3.0, rslora=rslora)
    at: State = method.init(sites, lora.generator(0))
    client = Client("x", 1, 2)
    forms = []
    for t in range(1, 9):
        before = served(method, at, client, sites)
        product = {s: lora.scale(3.0, 2, rslora) * at["B"][s] @ at["A"][s] for s in sites}
        sent = random_uploads([2, 2, 2], sites, t)
        at = method.aggregate(at, sent)
        forms.append("s" in at["right"])
        if len(sites["s"]) == 2 and t == 1:
            left, right = at["left"]["s"], at["right"].get("s")
            assert torch.linalg.matrix_rank(left if right is None else left @ right) <= 4, "(K - 1) r"
        got, want = served(method, at, client, sites), ideal(method, sent)
        for s in sites:
            torch.testing.assert_close(got[s], before[s] - product[s] + want[s], rtol=1e-9, atol=1e-9)
    assert forms == ([True] * 5 + [False] * 3 if sites["s"] == (40, 50) else [False] * 8)


def test_fedex_lora_offset_reaches_those_that_missed_rounds() -> None:
    method = build("fedex_lora", rank=2)
    at = method.init(SITES, lora.generator(0))
    for t in (1, 2):
        at = method.aggregate(at, random_uploads([2, 2], SITES, t))
    received = method.broadcast(at, Client("late", 1, 2), 3)
    assert received["left"] is at["left"] and "left" not in method.expected(received, 3)
    work = method.prepare(received, {}, SITES, Client("late", 1, 2), 3)
    assert set(work.train) == {"A", "B"} and work.base["left"] is at["left"]
