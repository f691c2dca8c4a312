from __future__ import annotations

import torch

from fedloom.core import Client, Visit
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.rng import generator
from fedloom.state import State, only

from .cases import (
    EXAMPLES,
    RANK,
    SITES,
    after,
    engine,
    first_work,
    flat,
    received,
    start,
    update,
    visited,
)

LORA = {"rank": RANK, "alpha": 6.0}
CLIENTS = [Client("a", 12, 1), Client("b", 20, 2), Client("c", 8, 3)]


def trained_state(key: int = 0) -> tuple[State, State]:
    """A server state in the middle of a run, and the head."""
    method = build({"name": "fed_plora"}, LORA)
    at = start(method, dtype=torch.float64)
    B = {s: torch.randn(x.shape, generator=generator("B", key, s), dtype=torch.float64) for s, x in at["B"].items()}
    return at | {"B": B}, only(at, "head")


def test_a_client_starts_from_the_whole_global_model() -> None:
    """No noise of initialisation: what is trained and what is folded make up B A, whatever was drawn."""
    method = build({"name": "fed_plora"}, LORA)
    at, _ = trained_state()
    whole = update(method.model(method.serve(at, CLIENTS[0]), {}, Visit(1, CLIENTS[0], SITES)))
    for client in (*CLIENTS, Client("d", 16, RANK)):
        work = first_work(method, received(method, at, client, 3), client, 3)
        assert {x.shape[0] for x in work.train["A"].values()} == {client.rank}
        for site, x in update(work).items():
            torch.testing.assert_close(x, whole[site])


def test_each_component_is_averaged_over_those_who_trained_it_and_the_rest_stay() -> None:
    method = build({"name": "fed_plora"}, LORA)
    at, _ = trained_state()
    sent, want = [], {s: [(0.0, torch.zeros_like(x[0]))] * RANK for s, x in at["A"].items()}
    chosen: dict[str, set[int]] = {site: set() for site in SITES}
    for i, client in enumerate(CLIENTS[:2]):
        got = received(method, at, client, 2)
        upload, _ = visited(
            method,
            got,
            client,
            lambda work, i=i: {r: {s: x + i + 1 for s, x in g.items()} for r, g in work.train.items()},
            2,
        )
        sent.append((client, upload))
        for site, A in at["A"].items():
            for x in upload["A"][site]:
                j = int((A + i + 1 - x).abs().sum(1).argmin())
                chosen[site].add(j)
                weight, total = want[site][j]
                want[site][j] = (weight + client.examples, total + client.examples * x)
    new = after(method, at, sent, 2)
    for site, A in at["A"].items():
        for j in range(RANK):
            weight, total = want[site][j]
            torch.testing.assert_close(new["A"][site][j], total / weight if weight else A[j])
            if not weight:
                assert torch.equal(new["A"][site][j], A[j]) and torch.equal(new["B"][site][:, j], at["B"][site][:, j])
    assert all(0 < len(c) < RANK for c in chosen.values()), "ranks 1 and 2 of 4 leave some out"


def test_with_all_components_it_is_fedit() -> None:
    method, plain = build({"name": "fed_plora"}, LORA), build({"name": "fedit"}, LORA)
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    got, want = (federate(m, engine(), start(m) | only(start(plain), "A", "B"), clients, 3) for m in (method, plain))
    for role in ("A", "B", "head"):
        for site, x in want[role].items():
            torch.testing.assert_close(got[role][site], x)
    assert flat(only(start(method), "A", "B")) == flat(only(start(plain), "A", "B")), "the same start"


def test_the_draw_is_uniform_and_new_in_every_round_and_layer() -> None:
    method = build({"name": "fed_plora"}, LORA)
    at, _ = trained_state()
    client = Client("b", 20, 2)
    counts = torch.zeros(RANK)
    seen = set()
    for t in range(1, 301):
        work = first_work(method, received(method, at, client, t), client, t)
        drawn = []
        for site, A in at["A"].items():
            index = [int((A - x).abs().sum(1).argmin()) for x in work.train["A"][site]]
            drawn.append(tuple(index))
            counts[index] += 1
        seen.add(tuple(drawn))
    # 600 draws of 2 of 4: 300 times each, standard deviation 12.
    assert ((counts - 300).abs() < 60).all() and len(seen) > 30
