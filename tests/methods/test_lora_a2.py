from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.core import Client, Exchange, Method, Round, State, Visit, Work
from fedloom.loop import one_round
from fedloom.methods import build
from fedloom.rng import generator
from fedloom.spec import reject_reason
from fedloom.state import only

from .cases import EXAMPLES, RANK, SITES, ToyTrainer, after, engine, start, state, update, visited

LORA = {"rank": RANK, "alpha": 6.0}


def made(**fields: Any) -> Method:
    return build({"name": "lora_a2", **fields}, LORA)


def middle() -> State:
    """A server state in the middle of a run."""
    at = start(made(), dtype=torch.float64)
    return at | {
        "B": {s: torch.randn(x.shape, generator=generator(s), dtype=torch.float64) for s, x in at["B"].items()}
    }


def test_the_server_adds_the_weighted_sum_of_changes_by_hand() -> None:
    """Weights 3/4 and 1/4, B round: the first client chose rank 1, the second rank 0; nothing is divided by who chose."""
    method = build({"name": "lora_a2"}, {"rank": 2})
    at = state([[1.0, 0.0], [0.0, 1.0]], [[8.0, 0.0], [0.0, 8.0]])
    one: State = {"B": {"s": torch.tensor([[4.0], [8.0]])}, "index": {"s": torch.tensor([1], dtype=torch.int32)}}
    two: State = {"B": {"s": torch.tensor([[0.0], [4.0]])}, "index": {"s": torch.tensor([0], dtype=torch.int32)}}
    new = after(method, at, [(Client("a", 3, 1), one), (Client("b", 1, 1), two)], 1)
    #  column 0: [8 0] + 1/4 [-8 4]; column 1: [0 8] + 3/4 [4 0]
    assert new["B"]["s"].tolist() == [[6.0, 3.0], [1.0, 8.0]] and new["A"] is at["A"]


@pytest.mark.parametrize("t", [1, 2])
def test_the_ranks_that_change_the_product_most_are_trained_over_the_whole_model(t: int) -> None:
    """Against the Frobenius norm of each rank's change, dense; the budget is the mean over layers."""
    method, client, at = made(), Client("a", 12, 2), middle()
    role, axis = ("B", 1) if t % 2 else ("A", 0)
    shift = {s: torch.randn(x.shape, generator=generator("shift", s), dtype=torch.float64) for s, x in at[role].items()}
    works: list[Work] = []

    def train(work: Work) -> State:
        works.append(work)
        if len(works) == 1:
            return {role: {s: x + shift[s] for s, x in work.train[role].items()}}
        return {role: {s: x + 1 for s, x in work.train[role].items()}}

    sent, _ = visited(method, method.serve(at, client), client, train, t)
    norms = {}
    for site in SITES:
        for i in range(RANK):
            dB = shift[site][:, i] if role == "B" else at["B"][site][:, i]
            dA = at["A"][site][i] if role == "B" else shift[site][i]
            norms[site, i] = float(torch.linalg.matrix_norm(torch.outer(dB, dA)))
    best = sorted(norms, key=lambda key: -norms[key])[: 2 * len(SITES)]
    assert {(s, int(i)) for s, index in sent["index"].items() for i in index} == set(best)
    for site, index in sent["index"].items():
        assert torch.equal(sent[role][site], at[role][site].index_select(axis, index.long()) + 1), (
            "from the global state"
        )
    assert (works[0].steps, works[1].steps) == (5, None)
    assert works[1].lr == (5.0 if role == "B" else 1.0)


def test_what_is_trained_is_the_whole_global_model() -> None:
    method, at = made(), middle()
    want = update(method.model(method.serve(at, Client("x", 1, RANK)), {}, Visit(1, Client("x", 1, RANK), SITES)))
    for t in (1, 2):
        for rank in (1, 3, RANK):
            client, works = Client("a", 12, rank), []

            def train(work: Work, works: list[Work] = works) -> State:
                works.append(work)
                return {r: {s: x + i for i, (s, x) in enumerate(g.items())} for r, g in work.train.items()}

            visited(method, method.serve(at, client), client, train, t)
            assert len(works) == (1 if rank == RANK else 2), "all ranks need no probe"
            for work in works:
                for site, x in update(work).items():
                    torch.testing.assert_close(x, want[site])


def test_a_layer_may_get_no_rank_and_another_all() -> None:
    method, client, at = made(), Client("a", 12, 2), middle()

    def train(work: Work) -> State:
        return {"B": {s: x + (9.0 if s == "layers.1.out" else 0.0) for s, x in work.train["B"].items()}}

    sent, _ = visited(method, method.serve(at, client), client, train, 1)
    assert {s: len(i) for s, i in sent["index"].items()} == {"layers.0.in": 0, "layers.1.out": RANK}
    new = after(method, at, [(client, sent)], 1)
    assert torch.equal(new["B"]["layers.0.in"], at["B"]["layers.0.in"])
    torch.testing.assert_close(new["B"]["layers.1.out"], at["B"]["layers.1.out"] + 9.0)


def test_at_full_rank_it_is_the_exact_average_of_one_factor_a_turn() -> None:
    method, trainer = made(lr_ratio=1.0), ToyTrainer(record=True)
    at = start(method)
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    for t in (1, 2, 3, 4):
        new, _ = one_round(method, engine(trainer), at, clients, t)
        role, other = ("B", "A") if t % 2 else ("A", "B")
        total = sum(EXAMPLES.values())
        for site in SITES:
            want = sum(EXAMPLES[c.id] / total * x[role][site] for c, _, x in trainer.seen)
            torch.testing.assert_close(new[role][site], want)
            assert torch.equal(new[other][site], at[other][site])
        at, trainer.seen = new, []


def test_the_head_is_frozen_unless_asked_for() -> None:
    for train_head in (False, True):
        method = made(train_head=train_head)
        at = start(method)
        new, record = one_round(method, engine(), at, [Client("a", 12, 2)], 1)
        assert ("head" in record.up.by_role) == train_head
        assert torch.equal(new["head"]["head.weight"], at["head"]["head.weight"]) != train_head


def test_indices_from_outside_are_taken_with_care() -> None:
    """What does not fit is refused; an index out of range changes some rank, and the round goes on."""
    method, client, at = made(), Client("a", 12, 1), middle()
    flow = method.server(at, Round(1, (client,), 1, SITES))
    asked = flow.send(None)
    flow.close()
    assert isinstance(asked, Exchange)
    want = asked.expects(client, method.serve(at, client))
    upload: State = {
        "B": {s: torch.ones(m, 1, dtype=torch.float64) for s, (m, _) in SITES.items()},
        "index": {s: torch.tensor([99], dtype=torch.int32) for s in SITES},
    }
    assert reject_reason(want, upload) is None
    assert all(x.isfinite().all() for x in after(method, at, [(client, upload)])["B"].values())
    two = upload | {"index": {s: torch.tensor([0, 1], dtype=torch.int32) for s in SITES}}
    assert "ranks of" in (reject_reason(want, two) or "")
    assert reject_reason(want, only(upload, "B")) == "missing role index"
