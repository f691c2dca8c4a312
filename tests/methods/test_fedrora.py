from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, Method, State
from fedloom.loop import one_round
from fedloom.methods import build
from fedloom.rng import generator

from .cases import EXAMPLES, RANK, SITES, Sent, after, engine, first_work, served, start, update, visited

LORA = {"rank": RANK, "alpha": 4.0}


def made(**fields: Any) -> Method:
    return build({"name": "fedrora", **fields}, LORA)


def sent(ranks: dict[str, int], key: int = 0) -> list[Sent]:
    """Unit directions and magnitudes of both signs, in float64."""
    uploads = []
    for k, r in ranks.items():
        x: State = {"A": {}, "B": {}, "s": {}}
        for site, (m, n) in SITES.items():
            rng = generator(key, k, site)
            A, B = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((r, n), (m, r)))
            x["A"][site], x["B"][site] = A / A.norm(dim=1, keepdim=True), B / B.norm(dim=0)
            x["s"][site] = torch.randn(r, generator=rng, dtype=torch.float64)
        uploads.append((Client(k, EXAMPLES[k], r), x))
    return uploads


def dense(x: State, site: str) -> Tensor:
    return (x["B"][site] * x["s"][site]) @ x["A"][site]


def test_fedrora_by_hand() -> None:
    """Weights 1/2: updates diag(4, 0) and diag(-2, 3) at directions e1, e2. Sum diag(1, 3/2): u1 = e2, u2 = e1.
    Projections of the first (0, 4), of the second (3, -2); of rank 1 the first gets e1 at 4, the second e2 at 3."""
    method = build({"name": "fedrora"}, {"rank": 2, "alpha": 2.0})
    eye = torch.eye(2)
    at: State = {"A": {"s": eye}, "B": {"s": eye}, "s": {"s": torch.zeros(2)}}
    one = {"A": {"s": eye[:1]}, "B": {"s": eye[:, :1]}, "s": {"s": torch.tensor([4.0])}}
    two = {"A": {"s": eye}, "B": {"s": eye}, "s": {"s": torch.tensor([-2.0, 3.0])}}
    new = after(method, at, [(Client("a", 5, 1), one), (Client("b", 5, 2), two)])
    torch.testing.assert_close(new["s"]["s"], torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(new["s:a"]["s"], torch.tensor([0.0, 4.0]))
    torch.testing.assert_close(new["s:b"]["s"], torch.tensor([3.0, -2.0]))
    for who, want in (
        ("a", [[4.0, 0.0], [0.0, 0.0]]),
        ("b", [[0.0, 0.0], [0.0, 3.0]]),
        ("new", [[0.0, 0.0], [0.0, 1.5]]),
    ):
        got = served(method, new, Client(who, 1, 1), {"s": (2, 2)})["s"]
        torch.testing.assert_close(got, torch.tensor(want))


def test_projections_are_those_of_the_dense_update_and_average_to_the_singular_values() -> None:
    method = made()
    uploads = sent({"a": 1, "b": 2, "c": 3, "d": 4})
    at = after(method, start(method, dtype=torch.float64), uploads)
    total = sum(client.examples for client, _ in uploads)
    for site in SITES:
        D = sum(client.examples / total * dense(x, site) for client, x in uploads)
        assert isinstance(D, Tensor)
        torch.testing.assert_close(at["s"][site], torch.linalg.svdvals(D)[:RANK])
        for client, x in uploads:
            want = torch.stack([at["B"][site][:, k] @ dense(x, site) @ at["A"][site][k] for k in range(RANK)])
            torch.testing.assert_close(at[f"s:{client.id}"][site], want)
        mean = sum(client.examples / total * at[f"s:{client.id}"][site] for client, _ in uploads)
        torch.testing.assert_close(mean, at["s"][site])


@pytest.mark.parametrize("top", ["magnitude", "signed"])
def test_clients_of_equal_rank_get_the_directions_that_are_largest_for_them(top: str) -> None:
    method = made(top=top)
    at = after(method, start(method, dtype=torch.float64), sent({"a": 2, "b": 2, "c": 2}))
    chosen = set()
    for k in "abc":
        got = method.serve(at, Client(k, 1, 2))
        for site in SITES:
            s = at[f"s:{k}"][site]
            order = sorted(range(RANK), key=lambda i, s=s: -float(abs(s[i]) if top == "magnitude" else s[i]))
            best = sorted(order[:2])
            assert torch.equal(got["s"][site], s[best]) and torch.equal(got["A"][site], at["A"][site][best])
            assert torch.equal(got["B"][site], at["B"][site][:, best])
            chosen.add((site, *best))
    assert len(chosen) > len(SITES), "not all the same"


def test_one_client_gets_back_what_it_sent() -> None:
    """Its update's SVD, all of it: the projections are the singular values."""
    method = made()
    ((client, x),) = sent({"b": RANK})
    at = after(method, start(method, dtype=torch.float64), [(client, x)])
    for site in SITES:
        torch.testing.assert_close(served(method, at, client, SITES)[site], dense(x, site))
        torch.testing.assert_close(at["s:b"][site], at["s"][site])


def test_who_was_absent_keeps_what_the_server_had_of_it() -> None:
    method = made()
    first = after(method, start(method, dtype=torch.float64), sent({"a": 4, "b": 4}))
    at = after(method, first, sent({"b": 4, "c": 4}, key=1), 2)
    for site in SITES:
        old = (first["B"][site] * first["s:a"][site]) @ first["A"][site]
        want = torch.stack([at["B"][site][:, k] @ old @ at["A"][site][k] for k in range(RANK)])
        torch.testing.assert_close(at["s:a"][site], want)


def test_a_client_sends_unit_directions_and_the_magnitudes_of_what_it_trained() -> None:
    method, client = made(lr_ratio=7.0), Client("b", 20, 3)
    at = after(method, start(method, dtype=torch.float64), sent({"a": 2, "b": 3}))
    got = method.serve(at, client)
    work = first_work(method, got, client, 2)
    for site in SITES:
        torch.testing.assert_close(update(work)[site], served(method, at, client, SITES)[site])

    def train(work: Any) -> State:
        return {r: {s: 1.5 * x + 0.1 for s, x in g.items()} for r, g in work.train.items()}

    trained = train(work)
    upload, kept = visited(method, got, client, train, 2)
    assert not kept
    for site, want in update(work, trained).items():
        torch.testing.assert_close(dense(upload, site), want)  # scale 1: alpha is the rank
        torch.testing.assert_close(upload["A"][site].norm(dim=1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(upload["B"][site].norm(dim=0), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(upload["s"][site], got["s"][site] + 0.7)


def test_magnitudes_move_faster_by_the_ratio_with_adamw() -> None:
    found = []
    for ratio in (1.0, 10.0):
        method = made(lr_ratio=ratio)
        new, _ = one_round(method, engine(), start(method), [Client("b", 20, RANK)], 1)
        found.append(torch.stack([new["s"][site].norm() for site in SITES]).norm())
    assert 5 < found[1] / found[0] < 12


def test_the_head_is_frozen_unless_asked_for() -> None:
    for train_head in (False, True):
        method = made(train_head=train_head)
        at = start(method)
        new, record = one_round(method, engine(), at, [Client("a", 12, 2)], 1)
        assert ("head" in record.up.by_role) == train_head
        assert torch.equal(new["head"]["head.weight"], at["head"]["head.weight"]) != train_head
