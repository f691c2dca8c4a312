from __future__ import annotations

import torch

from fedloom.core import Client, State, Visit
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.state import only

from .cases import ONE, SITES, TWO, ZERO, Case, after, engine, first_work, received, start, update, uploads, visited


def test_fedsa_lora_by_hand() -> None:
    """A is averaged; B and the head stay with the client, and no other client's reach it."""
    method = build({"name": "fedsa_lora"}, {"rank": 1})
    head: State = {"head": {"w": torch.zeros(1)}}
    first = ZERO | head
    sites = {"s": (3, 2)}
    client = Client("a", 3, 1)
    down = received(method, first, client)
    assert list(down) == ["A"] == list(method.serve(first, client))
    visit = Visit(1, client, sites)
    start = method.model(down, head, visit).train
    assert set(start) == {"A", "B", "head"} and (start["B"]["s"] == 0).all()
    trained = ONE | {"head": {"w": torch.ones(1)}}
    flow = method.client(down, head, visit)
    assert set(flow.send(None).train) == {"A", "B", "head"}
    flow.close()
    sent, kept = only(trained, "A"), {"B": trained["B"], "head": trained["head"]}
    new = after(method, first, uploads((3, sent), (1, only(TWO, "A"))))
    assert new["A"]["s"].tolist() == [[2.0, 3.0]]
    assert torch.equal(new["B"]["s"], ZERO["B"]["s"]) and new["head"]["w"].item() == 0
    again = method.model(received(method, new, client, 2), kept, Visit(2, client, sites))
    assert torch.equal(again.train["B"]["s"], ONE["B"]["s"]) and again.train["head"]["w"].item() == 1
    fresh = method.model(received(method, new, client, 2), head, Visit(2, client, sites))
    assert (fresh.train["B"]["s"] == 0).all()


def test_fedsa_lora_sends_A_alone_and_keeps_the_rest() -> None:
    method = Case("", {"name": "fedsa_lora"}).method()
    state, client = start(method), Client("a", 12, 4)
    own: State = {"head": state["head"]}
    down = received(method, state, client)

    def train(work: object) -> State:
        made = first_work(method, down, client, own=own).train
        return {role: {site: x + 1 for site, x in group.items()} for role, group in made.items()}

    sent, kept = visited(method, down, client, train, own=own)
    assert list(sent) == ["A"] and set(kept) == {"B", "head"}
    assert all(torch.equal(x, state["A"][site] + 1) for site, x in sent["A"].items())
    assert all((x == 1).all() for x in kept["B"].values())


def test_fedsa_lora_clients_end_with_models_of_their_own() -> None:
    case = Case("", {"name": "fedsa_lora"})
    method, at = case.method(), engine()
    last = federate(method, at, start(method), case.clients(), 3)
    own = {k: at.own(k) for k in "abcd"}
    models = [
        update(method.model({"A": last["A"]}, own[k], Visit(3, Client(k, 1, 4), SITES)))["layers.0.in"] for k in "abcd"
    ]
    assert method.personal_models
    assert all(not torch.equal(x, y) for i, x in enumerate(models) for y in models[:i])
