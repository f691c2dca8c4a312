from __future__ import annotations

import torch

from fedloom.core import Client, State, Work
from fedloom.loop import federate
from fedloom.methods import build

from .cases import CASES, RANK, SITES, engine, random_uploads, received, start, update, visited

CLIENT = Client("a", 1, RANK)


METHOD = build({"name": "pf2lora_first_order", "own_rank": 2, "own_lr": 7.0}, {"rank": RANK, "alpha": 6.0})


def test_pf2lora_is_the_sum_of_the_common_adapter_and_the_clients_own() -> None:
    (_, common), (_, mine) = random_uploads([RANK, 2])
    state = start(METHOD, dtype=torch.float64) | common
    sent, visit = received(METHOD, state, CLIENT), engine().visit(CLIENT, 1)
    got = update(METHOD.model(sent, {"C": mine["A"], "D": mine["B"]}, visit))
    fresh = METHOD.model(sent, {}, visit)
    for site, (m, n) in SITES.items():
        both = common["B"][site] @ common["A"][site] + mine["B"][site] @ mine["A"][site]
        torch.testing.assert_close(got[site], 1.5 * both)
        torch.testing.assert_close(update(fresh)[site], 1.5 * common["B"][site] @ common["A"][site])
        assert fresh.train["C"][site].shape == (2, n) and fresh.train["D"][site].shape == (m, 2)
        assert fresh.train["C"][site].abs().max() > 0, "or its gradient would be zero for ever"


def test_pf2lora_trains_the_lower_level_by_sgd_then_the_upper_one_on_top() -> None:
    works: list[Work] = []

    def trained(work: Work) -> State:
        works.append(work)
        return {role: {site: x + 1 for site, x in group.items()} for role, group in work.train.items()}

    state = start(METHOD)
    sent, kept = visited(METHOD, received(METHOD, state, CLIENT), CLIENT, trained)
    lower, upper = works
    assert (set(lower.train), lower.optimizer, lower.lr) == ({"C", "D"}, "sgd", 7.0)
    assert (set(upper.train), upper.optimizer, upper.lr) == ({"A", "B", "head"}, None, 1.0)
    assert set(sent) == {"A", "B", "head"} and set(kept) == {"C", "D"}, "what is its own is never sent"
    for site in SITES:
        assert torch.equal(upper.fixed["D"][site], kept["D"][site])
        assert torch.equal(kept["D"][site], lower.train["D"][site] + 1)
        assert torch.equal(upper.train["A"][site], state["A"][site])


def test_pf2lora_clients_start_apart_and_go_on_from_their_own() -> None:
    at = engine()
    state = federate(METHOD, at, start(METHOD), CASES[0].clients(), 2)
    assert not {"C", "D"} & state.keys()
    own = {key: at.own(key) for key in "abcd"}
    works = {client.id: at.model(METHOD, (client, METHOD.serve(state, client)), 3) for client in CASES[0].clients()}
    for key, work in works.items():
        assert work.train == {role: own[key][role] for role in ("C", "D")}
        assert all((own[key]["D"][site] != 0).any() for site in SITES)
    assert not any(torch.equal(own["a"]["C"][site], own["b"]["C"][site]) for site in SITES)
