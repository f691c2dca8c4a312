from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build

from .cases import (
    EXAMPLES,
    SITES,
    ZERO,
    after,
    cast,
    engine,
    first_work,
    random_uploads,
    received,
    start,
    state,
    uploads,
    visited,
)


def method(rank: int = 4, alpha: float = 16.0, **fields: Any) -> Any:
    return build({"name": "hetlora", **fields}, {"rank": rank, "alpha": alpha})


def test_hetlora_by_hand() -> None:
    """||B A||_F of rank-1 factors is |B| |A|: weights 5 * 2 = 10 and 2 * 15 = 30, whatever the numbers of examples."""
    first = state([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    a, b = state([[2.0, 0.0]], [[3.0], [4.0]]), state([[0.0, 15.0], [0.0, 0.0]], [[0.0, 8.0], [2.0, 4.0]])
    new = after(method(2, 2.0), first, uploads((100, a), (1, b)))
    torch.testing.assert_close(new["A"]["s"], torch.tensor([[0.5, 11.25], [0.0, 0.0]]))
    torch.testing.assert_close(new["B"]["s"], torch.tensor([[0.75, 6.0], [2.5, 3.0]]))
    assert {k: int(r) for k, r in new["ranks"].items()} == {"c0": 1, "c1": 2}


def test_hetlora_with_equal_norms_and_ranks_is_fedit() -> None:
    sent = random_uploads([4, 4, 4])
    for _, x in sent:
        norm = torch.stack([lora.product_norm(x["B"][s], x["A"][s]) for s in SITES]).norm()
        for site in SITES:
            x["B"][site] /= norm
    sent = [(Client(client.id, 1, 4), x) for client, x in sent]
    first = {"A": sent[0][1]["A"], "B": sent[0][1]["B"]}
    het, plain = after(method(), first, sent), after(build({"name": "fedit"}, {"rank": 4}), first, sent)
    for role in ("A", "B"):
        for site in SITES:
            torch.testing.assert_close(het[role][site], plain[role][site], rtol=1e-12, atol=1e-12)


def tail(at: State, g: int) -> Tensor:
    return torch.stack([at["B"][s][:, g:].norm() * at["A"][s][g:].norm() for s in SITES]).sum()


def test_hetlora_penalty_is_the_norm_of_the_tail_and_has_finite_gradients() -> None:
    at = random_uploads([4])[0][1]
    client = Client("c0", 3, 4)
    work = first_work(method(gamma=0.5, tail_weight=0.25), at, client)
    (penalty,) = work.penalties
    torch.testing.assert_close(penalty(at, {}), 0.25 * tail(at, 2))
    zero: State = {"A": {s: x.clone().requires_grad_() for s, x in at["A"].items()}, "B": {}}
    zero["B"] = {s: torch.zeros_like(x).requires_grad_() for s, x in at["B"].items()}
    for which in (zero, {r: {s: x.clone().requires_grad_() for s, x in g.items()} for r, g in at.items()}):
        penalty(which, {}).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for g in which.values() for x in g.values())
    assert first_work(method(tail_weight=0.0), at, client).penalties == ()


@pytest.mark.parametrize("factor, rank", [(0.9, 2), (1.0, 4), (1.1, 4)])
def test_hetlora_prunes_itself_where_the_tail_shrank(factor: float, rank: int) -> None:
    at = random_uploads([4])[0][1]
    client = Client("c0", 3, 4)

    def shrink(work: Work) -> State:
        B = {s: x.clone() for s, x in work.train["B"].items()}
        for x in B.values():
            x[:, 2:] *= factor
        return {"A": work.train["A"], "B": B}

    pruning = method(gamma=0.5)
    sent, kept = visited(pruning, received(pruning, at, client), client, shrink)
    assert kept == {}
    assert {x.shape[0] for x in sent["A"].values()} == {x.shape[1] for x in sent["B"].values()} == {rank}
    new = after(pruning, at, [(client, sent)])
    assert {x.shape[0] for x in received(pruning, new, client, 2)["A"].values()} == {rank}, "and stays there"
    assert received(pruning, new, Client("new", 1, 3), 2)["A"]["layers.0.in"].shape[0] == 3
    whole, _ = visited(method(gamma=0.5, prune=False), at, client, shrink)
    assert {x.shape[0] for x in whole["A"].values()} == {4}


def test_hetlora_never_prunes_to_nothing() -> None:
    at = random_uploads([1])[0][1]
    sent, _ = visited(method(1, gamma=0.01), at, Client("a", 1, 1), lambda work: cast(at, torch.float64))
    assert {x.shape[0] for x in sent["A"].values()} == {1}
    less = {"A": at["A"], "B": {s: x / 2 for s, x in at["B"].items()}}
    sent, _ = visited(method(1, gamma=0.01), at, Client("a", 1, 1), lambda work: less)
    assert {x.shape[0] for x in sent["A"].values()} == {1}


def test_hetlora_before_anyone_has_learnt_is_a_plain_mean() -> None:
    a, b = state([[1.0, 0.0]], [[0.0], [0.0]]), state([[3.0, 4.0]], [[0.0], [0.0]])
    new = after(method(1), ZERO | {"B": {"s": torch.zeros(2, 1)}}, uploads((1, a), (9, b)))
    torch.testing.assert_close(new["A"]["s"], torch.tensor([[2.0, 2.0]]))


def test_hetlora_ranks_that_a_round_did_not_hold_stay_alive() -> None:
    """With padding alone A[j] = B[:, j] = 0 after one round of small clients, both gradients vanish, and rank j is lost."""
    m, at = method(prune=False), engine()
    small = [Client("a", EXAMPLES["a"], 1), Client("b", EXAMPLES["b"], 2)]
    everyone = [*small, Client("c", EXAMPLES["c"], 4), Client("d", EXAMPLES["d"], 4)]
    state = federate(m, at, start(m), everyone, 2)
    between, _ = one_round(m, at, state, small, 3)
    for site in SITES:
        assert torch.equal(between["A"][site][2:], state["A"][site][2:])
        assert torch.equal(between["B"][site][:, 2:], state["B"][site][:, 2:])
        assert not torch.equal(between["B"][site][:, :2], state["B"][site][:, :2])
    last, _ = one_round(m, at, between, everyone, 4)
    for site in SITES:
        for j in (2, 3):
            assert last["A"][site][j].norm() > 0 and last["B"][site][:, j].norm() > 0
            assert not torch.equal(last["B"][site][:, j], between["B"][site][:, j]), "it goes on learning"


def test_hetlora_ranks_that_all_pruned_count_no_more_and_can_be_learnt_again() -> None:
    """Sent rank 3 of 4, sent back 2: rank 3 is zero in the mean, rank 4 is as it was."""
    at = random_uploads([4])[0][1]
    client = Client("c0", 3, 3)
    m = method(gamma=0.7)
    assert received(m, at, client)["A"]["layers.0.in"].shape[0] == 3

    def shrink(work: Work) -> State:
        B = {s: torch.cat([x[:, :2], x[:, 2:] / 2], dim=1) for s, x in work.train["B"].items()}
        return {"A": work.train["A"], "B": B}

    sent, _ = visited(m, received(m, at, client), client, shrink)
    assert sent["A"]["layers.0.in"].shape[0] == 2
    new = after(m, at, [(client, sent)])
    for site in SITES:
        assert (new["B"][site][:, 2] == 0).all() and torch.equal(new["A"][site][2], at["A"][site][2])
        assert torch.equal(new["B"][site][:, 3], at["B"][site][:, 3]) and torch.equal(
            new["A"][site][3], at["A"][site][3]
        )


@pytest.mark.parametrize("fields", [{"gamma": 0.0}, {"gamma": 1.1}, {"tail_weight": -1.0}])
def test_hetlora_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        method(**fields)
