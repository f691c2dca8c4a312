from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import lora, slices
from fedloom.core import Client, State, Upload
from fedloom.errors import ConfigError
from fedloom.methods import build

from .cases import SITES, ZERO, random_uploads, state, uploads


def test_hetlora_by_hand() -> None:
    """||B A||_F of rank-1 factors is |B| |A|: weights 5 * 2 = 10 and 2 * 15 = 30, whatever the numbers of examples."""
    method = build("hetlora", rank=2, alpha=2.0)
    first = state([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    a, b = state([[2.0, 0.0]], [[3.0], [4.0]]), state([[0.0, 15.0], [0.0, 0.0]], [[0.0, 8.0], [2.0, 4.0]])
    after = method.aggregate(first, uploads((100, a), (1, b)))
    torch.testing.assert_close(after["A"]["s"], torch.tensor([[0.5, 11.25], [0.0, 0.0]]))
    torch.testing.assert_close(after["B"]["s"], torch.tensor([[0.75, 6.0], [2.5, 3.0]]))
    assert {k: int(r) for k, r in after["ranks"].items()} == {"c0": 1, "c1": 2}


def test_hetlora_with_equal_norms_and_ranks_is_fedit() -> None:
    sent = random_uploads([4, 4, 4])
    for u in sent:
        norm = torch.stack([lora.product_norm(u.state["B"][s], u.state["A"][s]) for s in SITES]).norm()
        for site in SITES:
            u.state["B"][site] /= norm
    sent = [Upload(Client(u.client.id, 1, 4), u.state, 1) for u in sent]
    first = {"A": sent[0].state["A"], "B": sent[0].state["B"]}
    het, plain = build("hetlora", rank=4).aggregate(first, sent), build("fedit", rank=4).aggregate(first, sent)
    for role in ("A", "B"):
        for site in SITES:
            torch.testing.assert_close(het[role][site], plain[role][site], rtol=1e-12, atol=1e-12)


def tail(at: State, g: int) -> Tensor:
    return torch.stack([at["B"][s][:, g:].norm() * at["A"][s][g:].norm() for s in SITES]).sum()


def test_hetlora_penalty_is_the_norm_of_the_tail_and_has_finite_gradients() -> None:
    method = build("hetlora", rank=4, gamma=0.5, tail_weight=0.25)
    at = random_uploads([4])[0].state
    got = method.penalty(at, {})
    assert got is not None
    torch.testing.assert_close(got, 0.25 * tail(at, 2))
    zero: State = {"A": {s: x.clone().requires_grad_() for s, x in at["A"].items()}, "B": {}}
    zero["B"] = {s: torch.zeros_like(x).requires_grad_() for s, x in at["B"].items()}
    for which in (zero, {r: {s: x.clone().requires_grad_() for s, x in g.items()} for r, g in at.items()}):
        penalty = method.penalty(which, {})
        assert penalty is not None
        penalty.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for g in which.values() for x in g.values())
    assert build("hetlora", rank=4, tail_weight=0.0).penalty(at, {}) is None


@pytest.mark.parametrize("factor, rank", [(0.9, 2), (1.0, 4), (1.1, 4)])
def test_hetlora_prunes_itself_where_the_tail_shrank(factor: float, rank: int) -> None:
    method = build("hetlora", rank=4, gamma=0.5)
    at = random_uploads([4])[0].state
    client = Client("c0", 3, 4)
    received = method.broadcast(at, client, 1)
    work = method.prepare(received, {}, SITES, client, 1)
    trained: State = {"A": received["A"], "B": {s: x.clone() for s, x in received["B"].items()}}
    for x in trained["B"].values():
        x[:, 2:] *= factor
    sent, _ = method.finish(work, trained, received)
    assert {x.shape[0] for x in sent["A"].values()} == {x.shape[1] for x in sent["B"].values()} == {rank}
    after = method.aggregate(at, [Upload(client, sent, 1)])
    assert {x.shape[0] for x in method.broadcast(after, client, 2)["A"].values()} == {rank}, "and stays there"
    assert method.broadcast(after, Client("new", 1, 3), 2)["A"]["layers.0.in"].shape[0] == 3
    kept = build("hetlora", rank=4, gamma=0.5, prune=False).finish(work, trained, received)[0]
    assert {x.shape[0] for x in kept["A"].values()} == {4}


def test_hetlora_never_prunes_to_nothing() -> None:
    method = build("hetlora", rank=1)
    at = random_uploads([1])[0].state
    work = method.prepare(at, {}, SITES, Client("a", 1, 1), 1)
    sent, _ = method.finish(work, slices.take(at, {}), at)
    assert {x.shape[0] for x in sent["A"].values()} == {1}


def test_hetlora_before_anyone_has_learnt_is_a_plain_mean() -> None:
    method = build("hetlora", rank=1)
    a, b = state([[1.0, 0.0]], [[0.0], [0.0]]), state([[3.0, 4.0]], [[0.0], [0.0]])
    after = method.aggregate(ZERO | {"B": {"s": torch.zeros(2, 1)}}, uploads((1, a), (9, b)))
    torch.testing.assert_close(after["A"]["s"], torch.tensor([[2.0, 2.0]]))


@pytest.mark.parametrize("fields", [{"gamma": 0.0}, {"gamma": 1.1}, {"tail_weight": -1.0}])
def test_hetlora_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build("hetlora", **fields)
