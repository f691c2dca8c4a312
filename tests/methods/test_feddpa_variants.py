from __future__ import annotations

import torch

from fedloom.core import Client, State, Work
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.state import Group, only

from .cases import CASES, RANK, SITES, engine, flat, random_uploads, start, update, visited

TABLE = {"rank": RANK, "alpha": 6.0}
CLIENT = Client("a", 1, RANK)


def product(state: State) -> Group:
    return {site: 6.0 / RANK * state["B"][site] @ A for site, A in state["A"].items()}


def test_feddpa_mixes_the_global_adapter_and_the_clients_own() -> None:
    (_, common), (_, mine) = random_uploads([RANK, RANK])
    own = {"local_A": mine["A"], "local_B": mine["B"]}
    for name in ("feddpa", "feddpa_f"):
        method = build({"name": name, "mix": 0.3}, TABLE)
        visit = engine().visit(CLIENT, 1)
        got, fresh = update(method.model(common, own, visit)), update(method.model(common, {}, visit))
        for site in SITES:
            torch.testing.assert_close(got[site], 0.7 * product(common)[site] + 0.3 * product(mine)[site])
            torch.testing.assert_close(fresh[site], product(common)[site])


def test_feddpa_trains_the_local_adapter_beside_the_frozen_global_one() -> None:
    method = build({"name": "feddpa", "mix": 0.3}, TABLE)
    (_, common), (_, mine) = random_uploads([RANK, RANK])
    works: list[Work] = []

    def trained(work: Work) -> State:
        works.append(work)
        return {role: {site: x + 1 for site, x in group.items()} for role, group in work.train.items()}

    sent, kept = visited(method, common, CLIENT, trained, own={"local_A": mine["A"], "local_B": mine["B"]})
    assert [set(work.train) for work in works] == [{"A", "B"}, {"local_A", "local_B"}]
    assert only(works[1].fixed, "A", "B") == sent and set(kept) == {"local_A", "local_B"}
    for site in SITES:
        assert torch.equal(sent["A"][site], common["A"][site] + 1)
        assert torch.equal(kept["local_B"][site], mine["B"][site] + 1)


def test_feddpa_f_is_fedit_until_the_last_round() -> None:
    plain, method = build({"name": "fedit"}, TABLE), build({"name": "feddpa_f"}, TABLE)
    at = engine()
    want = federate(plain, engine(), start(plain), CASES[0].clients(), 3)
    assert flat(federate(method, at, start(method), CASES[0].clients(), 3)) == flat(want)
    assert at.client_states.clients() == [], "nothing is kept before the personal phase"


def test_feddpa_f_trains_a_copy_of_the_global_adapter_alone_in_the_end() -> None:
    method = build({"name": "feddpa_f", "mix": 0.3}, TABLE)
    ((_, common),) = random_uploads([RANK])
    flow = method.personal(common, {}, engine().visit(CLIENT, 4))
    work = flow.send(None)
    flow.close()
    assert set(work.train) == {"local_A", "local_B"}
    moved = {role: {site: x + 1 for site, x in group.items()} for role, group in work.train.items()}
    for site, delta in product(common).items():
        torch.testing.assert_close(update(work)[site], delta)
        alone = 6.0 / RANK * (common["B"][site] + 1) @ (common["A"][site] + 1)
        torch.testing.assert_close(update(work, moved)[site], alone, msg="with its whole weight: the mix is for use")
