from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, Method
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.simulation import Simulation

from .cases import CASES, RANK, SITES, Rows, ToyTrainer, cast, engine, first_head, first_work, received, start, update

FIXED = {"name": "fedalt", "mixer": "fixed", "mix": 0.3}
CLIENTS = CASES[0].clients()


def made(table: dict[str, object]) -> Method:
    return build(table, {"rank": RANK, "alpha": 6.0})


def wide() -> Simulation[Rows]:
    return engine(fresh=cast({"head": first_head()}, torch.float64))


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_fedalt_rest_of_the_world_is_the_mean_of_the_others_last_adapters(rounds: int) -> None:
    """With other clients in every round, and one that never takes part."""
    method, at = made(FIXED), wide()
    picks = {1: "ab", 2: "bc", 3: "a", 4: "ac", 5: "bc"}
    first = start(method, dtype=torch.float64)
    state = federate(
        method, at, first, CLIENTS, rounds, sample=lambda clients, t: [c for c in clients if c.id in picks[t]]
    )
    there = sorted(set("".join(picks[t] for t in range(1, rounds + 1))))
    assert at.client_states.clients() == there and float(state["clients"]["count"]) == len(there)
    for client in CLIENTS:
        work = at.model(method, (client, method.serve(state, client)), rounds)
        others = [at.own(key) for key in there if key != client.id]
        for site in SITES:
            for role in ("A", "B"):
                want = torch.stack([own[role][site] for own in others]).mean(0)
                torch.testing.assert_close(work.fixed[f"rest_{role}"][site], want, rtol=1e-12, atol=1e-14)
            rest = work.fixed["rest_B"][site] @ work.fixed["rest_A"][site]
            mine = work.train["B"][site] @ work.train["A"][site]
            torch.testing.assert_close(update(work)[site], 1.5 * (0.7 * rest + 0.3 * mine))


def test_fedalt_goes_on_from_the_clients_own_adapter() -> None:
    method, at = made(FIXED), wide()
    state = federate(method, at, start(method, dtype=torch.float64), CLIENTS, 2)
    for client in CLIENTS:
        own = at.own(client.id)
        work = first_work(method, received(method, state, client, 3), client, 3, own)
        assert work.train.keys() == {"A", "B", "head"}, "the head stays with the client"
        assert all(work.train[role] == own[role] for role in work.train)


def test_fedalt_learns_its_mixer_from_equal_weights() -> None:
    """The mixer stays with the client; before it is trained the model is that of the fixed one at a half."""
    method, half = made({"name": "fedalt"}), made(FIXED | {"mix": 0.5})
    trainer = ToyTrainer(record=True)
    at = engine(trainer)
    state = federate(method, at, start(method), CLIENTS, 2)
    assert not any("gate" in role for role in state)
    for client in CLIENTS:
        own = at.own(client.id)
        # In the first round the rest of the world is zero, and so is the own adapter before its first step.
        assert all(
            own["gate"][site].shape == (2, n) and own["gate"][site].abs().max() > 0 for site, (_, n) in SITES.items()
        )
    new = Client("new", 1, RANK)
    got, want = (update(m.model(m.serve(state, new), at.fresh, at.visit(new, 3))) for m in (method, half))
    for site in SITES:
        torch.testing.assert_close(got[site], want[site])
        assert got[site].abs().max() > 0, "a new client has the mean of all others"


def test_fedalt_mixer_weighs_rest_and_own_for_each_input() -> None:
    """softmax(gate x) = [1 - a, a]: a gate that is far on one side is one of the two adapters alone."""
    method, trainer = made({"name": "fedalt"}), ToyTrainer()
    at = wide()
    state = federate(method, at, start(method, dtype=torch.float64), CLIENTS, 2)
    work = at.model(method, (CLIENTS[0], method.serve(state, CLIENTS[0])), 2)
    # One input that is always 1 in place of the data, so that a gate can be constant.
    x = (torch.ones(3, 6, dtype=torch.float64).numpy(), torch.zeros(3, 3, dtype=torch.float64).numpy())
    far = 1e6 * torch.ones(6, dtype=torch.float64)
    site = next(iter(SITES))
    for side, table in ((0, FIXED | {"mix": 0.0}), (1, FIXED | {"mix": 1.0})):
        gate = torch.zeros(2, 6, dtype=torch.float64)
        gate[side] = far
        one = made(table).model(method.serve(state, CLIENTS[0]), at.own("a"), at.visit(CLIENTS[0], 2))
        train = {r: dict(g) for r, g in work.train.items()}
        train["gate"][site] = gate
        # The second layer says nothing, in both.
        for part in (train, rest := {r: dict(g) for r, g in one.train.items()}):
            part["B"]["layers.1.out"] = torch.zeros(5, RANK, dtype=torch.float64)
        for fixed in (work.fixed, one.fixed):
            fixed["rest_B"]["layers.1.out"] = torch.zeros(5, RANK, dtype=torch.float64)
        torch.testing.assert_close(trainer.loss(work, train, x), trainer.loss(one, rest, x))
