from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.core import Client, Method, Trained, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.state import State

from .cases import EXAMPLES, RANK, ToyTrainer, after, engine, start, state

FIRST = state([[1.0, 2.0]], [[1.0], [0.0], [2.0]])
LORA = {"rank": 1, "alpha": 1.0}


def upload(method: Method, received: State, client: Client, moved: float, tau: float) -> State:
    """What a client sends whose training adds `moved` everywhere, over a sum of learning rates `tau`."""
    flow = method.client(received, {}, Visit(1, client, {"s": (3, 2)}))
    work = flow.send(None)
    assert isinstance(work, Work)
    trained = {role: {s: x + moved for s, x in group.items()} for role, group in work.train.items()}
    with pytest.raises(StopIteration) as stop:
        flow.send(Trained(trained, steps=1, lr_sum=tau, loss=0.0))
    sent: State = stop.value.value[0]
    return sent


def test_fednova_by_hand() -> None:
    """p = 3/4, 1/4; tau = 2, 6; changes 1, 9: tau_eff = 3, d = 1/2, 3/2, and x + 3 (3/8 + 3/8) = x + 2.25."""
    method = build({"name": "fednova"}, LORA)
    sent = []
    for client, moved, tau in ((Client("a", 3, 1), 1.0, 2.0), (Client("b", 1, 1), 9.0, 6.0)):
        sent.append((client, upload(method, FIRST, client, moved, tau)))
    assert float(sent[0][1]["nova_A"]["s"][0, 0]) == 0.5 and float(sent[1][1]["nova_tau"]["sum"]) == 6.0
    new = after(method, FIRST, sent)
    assert new.keys() == FIRST.keys()
    assert new["A"]["s"].tolist() == [[3.25, 4.25]]
    assert new["B"]["s"].tolist() == [[3.25], [2.25], [4.25]]


def test_a_client_that_took_no_step_changed_nothing() -> None:
    method = build({"name": "fednova"}, LORA)
    a, b = Client("a", 1, 1), Client("b", 1, 1)
    new = after(method, FIRST, [(a, upload(method, FIRST, a, 0.0, 0.0)), (b, upload(method, FIRST, b, 4.0, 2.0))])
    # tau_eff = 1 and the mean of d is 1: half of what b alone would have changed.
    assert new["A"]["s"].tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("over", ["fedit", "ffa_lora", "fslora", "fedsa_lora", "feddpa"])
def test_clients_that_train_alike_are_averaged_as_ever(over: str) -> None:
    table = {"name": over}
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    results = []
    for named in (table, {"name": "fednova", "over": table}):
        method = build(named, {"rank": RANK, "alpha": 6.0})
        first = start(method, dtype=torch.float64)
        results.append(federate(method, engine(fresh={"head": first["head"]}), first, clients, 3))
    plain, nova = results
    assert plain.keys() == nova.keys()
    for role, group in plain.items():
        for site, x in group.items():
            torch.testing.assert_close(nova[role][site], x, rtol=1e-6, atol=1e-7)


def test_equal_steps_of_unequal_learning_rates_weigh_alike() -> None:
    """A client with ten times the learning rate does not pull ten times as hard: its d is what its gradient is."""

    class Faster(ToyTrainer):
        def _one(self, client: Client, work: Work, *rest: Any) -> Trained:
            self.lr = 0.2 if client.id == "a" else 0.02
            return super()._one(client, work, *rest)

    clients = [Client(k, 10, RANK) for k in "abcd"]

    def pull(name: str) -> float:
        """How far the mean moves towards client a's change, for one step of SGD."""
        method = build({"name": name}, {"rank": RANK, "alpha": 6.0})
        first = start(method)
        trainer = Faster(optimizer="sgd", steps=1, record=True)
        new = federate(method, engine(trainer, cohort=1), first, clients, 1)
        a = next(done for client, _, done in trainer.seen if client.id == "a")
        gap = {s: x - first["B"][s] for s, x in a["B"].items()}
        along = sum(float(((new["B"][s] - first["B"][s]) * gap[s]).sum()) for s in gap)
        return along / sum(float(x.square().sum()) for x in gap.values())

    assert pull("fednova") < 0.75 * pull("fedit") or pull("fednova") < 0.25


@pytest.mark.parametrize(
    "over, why",
    [
        ("fedex_lora", "reads each upload itself"),
        ("hetlora", "reads each upload itself"),
        ("scaffold", "c_A is something else in round 1.*or put scaffold over fednova"),
    ],
)
def test_methods_it_cannot_go_over_are_refused(over: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build({"name": "fednova", "over": {"name": over}}, {"rank": 4})
