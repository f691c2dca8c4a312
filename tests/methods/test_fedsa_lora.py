from __future__ import annotations

import torch

from fedloom import lora
from fedloom.core import Client, State
from fedloom.loop import federate
from fedloom.methods import build

from .cases import ONE, SITES, TWO, ZERO, Case, engine, start, update, uploads


def test_fedsa_lora_by_hand() -> None:
    """A is averaged; B and the head stay with the client, and no other client's reach it."""
    method = build("fedsa_lora", rank=1)
    head: State = {"head": {"w": torch.zeros(1)}}
    first = ZERO | head
    sites = {"s": (3, 2)}
    client = Client("a", 3, 1)
    received = method.broadcast(first, client, 1)
    assert list(received) == ["A"]
    work = method.prepare(received, head, sites, client, 1)
    assert set(work.train) == {"A", "B", "head"} and (work.train["B"]["s"] == 0).all()
    trained = ONE | {"head": {"w": torch.ones(1)}}
    sent, kept = method.finish(work, trained, received)
    assert list(sent) == ["A"] and set(kept) == {"B", "head"}
    after = method.aggregate(first, uploads((3, lora.only(ONE, "A")), (1, lora.only(TWO, "A"))))
    assert after["A"]["s"].tolist() == [[2.0, 3.0]]
    assert torch.equal(after["B"]["s"], ZERO["B"]["s"]) and after["head"]["w"].item() == 0
    again = method.prepare(method.broadcast(after, client, 2), kept, sites, client, 2)
    assert torch.equal(again.train["B"]["s"], ONE["B"]["s"]) and again.train["head"]["w"].item() == 1
    new = method.prepare(method.broadcast(after, client, 2), head, sites, client, 2)
    assert (new.train["B"]["s"] == 0).all()


def test_fedsa_lora_clients_end_with_models_of_their_own() -> None:
    method = Case("", "fedsa_lora").method()
    at = engine()
    last = federate(method, at, start(method), Case("", "fedsa_lora").clients(), 3)
    own = {k: at.own(k) for k in "abcd"}
    models = [
        update(method, method.prepare({"A": last["A"]}, own[k], SITES, Client(k, 1, 4), 0))["layers.0.in"]
        for k in "abcd"
    ]
    assert all(not torch.equal(x, y) for i, x in enumerate(models) for y in models[:i])
