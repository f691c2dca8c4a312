from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import dora
from fedloom.core import Client, State, Upload, Visit, Work
from fedloom.dora import AXES
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.methods.fedlora_optimizer import FedLoRAOptimizer, product_error
from fedloom.rng import generator

from .cases import (
    EXAMPLES,
    SITES,
    Case,
    Sent,
    ToyTrainer,
    after,
    engine,
    first_work,
    received,
    rows,
    start,
    update,
)

DOUBLE = torch.float64
CLIENT = Client("a", 12, 4)
PLAIN = Case("", {"name": "fedit"})
conventions = pytest.mark.parametrize("convention", AXES)


def method(rank: int = 4, **fields: Any) -> FedLoRAOptimizer:
    made = build({"name": "fedlora_optimizer", **fields}, {"rank": rank, "alpha": 6.0})
    assert isinstance(made, FedLoRAOptimizer)
    return made


def server(dtype: torch.dtype = DOUBLE) -> State:
    state = start(method(), dtype=dtype)
    state["B"] = {
        s: torch.randn(x.shape, generator=generator(s), dtype=DOUBLE).to(dtype) for s, x in state["B"].items()
    }
    return state


def work(m: FedLoRAOptimizer, state: State, t: int, client: Client = CLIENT) -> Work:
    """The work of a visit in round t."""
    return first_work(m, received(m, state, client, t), client, t)


def model(m: FedLoRAOptimizer, state: State, own: State | None = None, client: Client = CLIENT) -> Work:
    """The model of a client that keeps `own`."""
    return m.model(m.serve(state, client), own or {}, Visit(9, client, SITES))


def local(m: FedLoRAOptimizer, state: State, client: Client = CLIENT, own: State | None = None) -> Work:
    """The work of the local phase."""
    flow = m.personal(m.serve(state, client), own or {}, Visit(9, client, SITES))
    asked = flow.send(None)
    flow.close()
    assert isinstance(asked, Work)
    return asked


def personal(m: FedLoRAOptimizer, state: State, trainer: ToyTrainer, client: Client = CLIENT) -> State:
    """What the client keeps after its local phase."""
    at = engine(trainer)
    (answer,) = at.personal(m, [(client, m.serve(state, client))], 9)
    assert answer.client == client and getattr(answer, "state", None) == {}, "nothing of it is sent"
    return at.own(client.id)


def upload(k: str, n: int, A: list[list[float]], B: list[list[float]]) -> Sent:
    return Client(k, n, 1), {"A": {"s": torch.tensor(A)}, "B": {"s": torch.tensor(B)}}


def error(sent: list[Sent], state: State) -> float:
    """(13) of these uploads."""
    return float(product_error([Upload(client, x, client.examples) for client, x in sent], state))


ZERO: State = {"A": {"s": torch.zeros(1, 2)}, "B": {"s": torch.zeros(2, 1)}}


# aggregates


def test_components_by_hand() -> None:
    """(12a), `rank`: A lengths 5 and 10 (weights 3/4, 1/4) and directions [.6 .8] and [1 0], B lengths 2 and 4."""
    every = [upload("a", 3, [[3.0, 4.0]], [[2.0], [0.0]]), upload("b", 1, [[10.0, 0.0]], [[0.0], [4.0]])]
    raw = after(method(rank=1, convention="rank", renorm_after_average=False), ZERO, every)
    torch.testing.assert_close(raw["A"]["s"], 6.25 * torch.tensor([[0.7, 0.6]]))
    torch.testing.assert_close(raw["B"]["s"], 2.5 * torch.tensor([[0.75], [0.25]]))
    unit = after(method(rank=1, convention="rank"), ZERO, every)
    torch.testing.assert_close(unit["A"]["s"], 6.25 * torch.tensor([[0.7, 0.6]]) / math.hypot(0.7, 0.6))
    torch.testing.assert_close(unit["B"]["s"], 2.5 * torch.tensor([[0.75], [0.25]]) / math.hypot(0.75, 0.25))


def test_factors_by_hand() -> None:
    every = [upload("a", 3, [[3.0, 4.0]], [[2.0], [0.0]]), upload("b", 1, [[10.0, 0.0]], [[0.0], [4.0]])]
    report: dict[str, float] = {}
    new = after(method(rank=1, average="factors"), ZERO, every, report=report)
    torch.testing.assert_close(new["A"]["s"], torch.tensor([[4.75, 3.0]]))
    torch.testing.assert_close(new["B"]["s"], torch.tensor([[1.5], [1.0]]))
    #  sum p B A = [4.5 6; 10 0], mean(B) mean(A) = [7.125 4.5; 4.75 3]
    want = torch.tensor([[4.5 - 7.125, 6 - 4.5], [10 - 4.75, -3.0]]).norm() / torch.tensor([4.5, 6, 10]).norm()
    assert report["product_error"] == pytest.approx(want.item(), rel=1e-6)
    assert error(every, new) == pytest.approx(want.item(), rel=1e-6)


def test_two_clients_at_a_right_angle() -> None:
    """Without renormalisation the mean direction has length sqrt(1/2), with it one."""
    every = [upload("a", 1, [[1.0, 0.0]], [[1.0], [0.0]]), upload("b", 1, [[0.0, 1.0]], [[0.0], [1.0]])]
    for renorm, length in ((False, math.sqrt(0.5)), (True, 1.0)):
        new = after(method(rank=1, convention="rank", renorm_after_average=renorm), ZERO, every)
        assert new["A"]["s"].norm().item() == pytest.approx(length, rel=1e-6)
        assert new["B"]["s"].norm().item() == pytest.approx(length, rel=1e-6)


@conventions
@pytest.mark.parametrize("fields", [{}, {"renorm_after_average": False}, {"average": "factors"}], ids=str)
def test_identical_clients_and_one_client_give_the_common_adapter(convention: str, fields: dict[str, Any]) -> None:
    m, state = method(convention=convention, **fields), server()
    for count in (1, 3):
        every: list[Sent] = [(Client(str(i), 3 + i, 4), state) for i in range(count)]
        report: dict[str, float] = {}
        new = after(m, state, every, report=report)
        for role in "AB":
            for site in SITES:
                torch.testing.assert_close(new[role][site], state[role][site], rtol=1e-12, atol=1e-14)
        assert report["product_error"] < 1e-6


# the two phases


@conventions
def test_nothing_moves_at_the_start_of_a_phase(convention: str) -> None:
    m, state = method(convention=convention), server()
    plain = update(work(m, state, 1))
    for made in (work(m, state, 2), local(m, state)):
        for site, delta in update(made).items():
            torch.testing.assert_close(delta, plain[site], rtol=1e-12, atol=1e-12)


SIZES = {
    "col": (4 * 13, 8),
    "row": (4 * 13, 12),
    "rank": (4 * 13, 8),
    "feature": (4 * 13, 12),
}
"""Convention -> numbers that the global and the local phase train: r (6 + 7); r a site, or the outputs 7 + 5."""


@conventions
def test_phases_train_what_they_say_and_nothing_else(convention: str) -> None:
    m, state = method(convention=convention), server()
    turn, gain = work(m, state, 2), local(m, state)
    assert set(turn.train) == {"turn"} and set(gain.train) == {"gain"}
    sizes = tuple(sum(x.numel() for g in made.train.values() for x in g.values()) for made in (turn, gain))
    assert sizes == SIZES[convention]
    assert turn.lr == 0.33 and gain.lr == 3.3 and work(m, state, 1).lr == 1.0
    at = engine()
    for t, roles in ((2, {"turn"}), (3, {"A", "B", "head"})):
        _, record = one_round(m, at, state, [CLIENT], t)
        assert set(record.up.by_role) == roles and set(record.down.by_role) == {"A", "B", "head"}


@conventions
def test_global_phase_turns_A_and_leaves_the_rest(convention: str) -> None:
    m, state = method(convention=convention), server()
    dim = AXES[convention][0]
    new, _ = one_round(m, engine(ToyTrainer(steps=5)), state, [CLIENT], 2)
    for site in SITES:
        assert torch.equal(new["B"][site], state["B"][site])
        assert not torch.allclose(new["A"][site], state["A"][site], atol=1e-4)
        got, was = (dora.split(x["A"][site], dim) for x in (new, state))
        torch.testing.assert_close(got.magnitude, was.magnitude, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(got.direction, was.direction, atol=1e-4)
    assert all(torch.equal(new["head"][k], x) for k, x in state["head"].items())
    free = method(convention=convention, renorm_direction=False)
    moved, _ = one_round(free, engine(ToyTrainer(steps=5)), state, [CLIENT], 2)
    assert not torch.allclose(dora.norm(moved["A"]["layers.0.in"], dim), dora.norm(state["A"]["layers.0.in"], dim))


@conventions
def test_local_phase_changes_lengths_of_B_alone(convention: str) -> None:
    m, state = method(convention=convention), server()
    kept = personal(m, state, ToyTrainer(steps=5))
    assert set(kept) == {"gain"}
    mine = model(m, state, kept)
    A, B, _ = mine.adapter(mine.train, mine.fixed)
    dim = AXES[convention][1]
    for site in SITES:
        assert torch.equal(A[site], state["A"][site]) and not torch.allclose(B[site], state["B"][site], atol=1e-4)
        cos = torch.nn.functional.cosine_similarity(B[site], state["B"][site], dim=dim)
        torch.testing.assert_close(cos.abs(), torch.ones_like(cos))
    again = local(m, state, own=kept)
    assert all((x == 0).all() for x in again.train["gain"].values()), "starts at zero each time"
    assert m.personal_phase and not method(local_phase=False).personal_phase
    assert set(work(m, state, 3).train) == {"A", "B", "head"}


def test_gain_may_flip_a_component_unless_it_must_not() -> None:
    state = server()
    for nonneg, sign in ((False, -1), (True, 0)):
        m = method(nonneg_magnitude=nonneg)
        made = local(m, state)
        gain: State = {"gain": {s: -2 * dora.norm(x, 0) for s, x in state["B"].items()}}
        _, B, _ = made.adapter(gain, made.fixed)
        torch.testing.assert_close(B["layers.0.in"], sign * state["B"]["layers.0.in"], rtol=1e-12, atol=1e-12)


@conventions
@pytest.mark.parametrize("renorm", [True, False])
def test_gradients_of_both_phases(convention: str, renorm: bool) -> None:
    """Finite differences, and the closed forms: (A_M / |v|) (I - v v^T) g, or A_M g; and <b, dL/dB>."""
    m, state = method(convention=convention, renorm_direction=renorm), server()
    for made, role in ((work(m, state, 2), "turn"), (local(m, state), "gain")):
        site = "layers.0.in"
        C = torch.randn(7, 6, generator=generator(3), dtype=DOUBLE)
        start_at = torch.randn(made.train[role][site].shape, generator=generator(4), dtype=DOUBLE) * 0.1

        def loss(x: Tensor, made: Work = made, role: str = role, site: str = site, C: Tensor = C) -> Tensor:
            return (update(made, {role: made.train[role] | {site: x}})[site] * C).square().sum()

        x = start_at.clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (x,))
        loss(x).backward()
        A, B, _ = made.adapter({role: made.train[role] | {site: x.detach()}}, made.fixed)
        leaf = (A if role == "turn" else B)[site].clone().requires_grad_()
        pair = (B[site], leaf) if role == "turn" else (leaf, A[site])
        ((1.5 * pair[0] @ pair[1]) * C).square().sum().backward()
        g, dim = leaf.grad, AXES[convention][0 if role == "turn" else 1]
        assert g is not None and x.grad is not None
        if role == "gain":
            want = (g * made.fixed["B_D"][site]).sum(dim, keepdim=True)
        else:
            v, M = made.fixed["A_D"][site] + x.detach(), made.fixed["A_M"][site]
            unit = v / v.norm(dim=dim, keepdim=True)
            pure = M / v.norm(dim=dim, keepdim=True) * (g - unit * (unit * g).sum(dim, keepdim=True))
            want = pure if renorm else M * g
        torch.testing.assert_close(x.grad, want, rtol=1e-10, atol=1e-10)


def test_penalties_by_hand() -> None:
    m, state = method(lambda_global=0.5, lambda_local=2.0), server()
    two = {"s": torch.tensor([[1.0, 2.0]]), "t": torch.tensor([3.0])}
    (turn,), (gain,) = work(m, state, 2).penalties, local(m, state).penalties
    assert turn({"turn": two}, {}).item() == 7.0 and gain({"gain": two}, {}).item() == 28.0
    assert work(m, state, 1).penalties == () == work(method(), state, 2).penalties == local(method(), state).penalties


def test_without_learning_in_its_phases_it_is_fedit_bit_for_bit() -> None:
    """Odd rounds are FedIT's; even ones, at a zero rate, leave every byte."""
    plain = PLAIN.method()
    m = method(average="factors", lr_global=0.0)
    first = start(plain)
    clients = PLAIN.clients()
    at = engine()
    want = first
    for t in (1, 3):
        want, _ = one_round(plain, at, want, clients, t)
    got = federate(m, engine(), start(m) | first, clients, 4)
    assert all(torch.equal(got[role][site], x) for role in ("A", "B", "head") for site, x in want[role].items())


def test_dead_vectors_stay_dead_and_finite() -> None:
    m = method()
    state = server()
    state["A"]["layers.0.in"][:, 2] = 0
    state["B"]["layers.0.in"][:, 1] = 0
    new, _ = one_round(m, engine(ToyTrainer(steps=3)), state, [CLIENT], 2)
    assert (new["A"]["layers.0.in"][:, 2] == 0).all() and new["A"]["layers.0.in"].isfinite().all()
    mine = model(m, state, personal(m, state, ToyTrainer(steps=3)))
    assert (mine.adapter(mine.train, mine.fixed).B["layers.0.in"][:, 1] == 0).all()


# schedule


@pytest.mark.parametrize(
    "phase, stages",
    [("federated", ["clients"] * 4), ("server_proxy", ["clients", "server"] * 2), ("none", ["clients"] * 4)],
)
def test_schedule(phase: str, stages: list[str]) -> None:
    m, seen = method(global_phase=phase), []
    trainer = ToyTrainer(record=True)
    federate(m, engine(trainer), start(m), PLAIN.clients(), 4, on_round=lambda s, record: seen.append(record.stage))
    assert seen == stages and m.needs_proxy_data == (phase == "server_proxy")
    turns = {"turn"} if phase != "none" else {"A", "B", "head"}
    per_round = [set(w.train) for c, w, _ in trainer.seen if c.id in ("a", "server")]
    assert per_round == [{"A", "B", "head"}, turns] * 2
    assert set(model(m, server()).train) == {"A", "B", "head"}


# learning, on the toy's tasks


def loss(made: Work, k: str) -> float:
    return ToyTrainer().loss(made, made.train, rows(k)).item()


@pytest.mark.parametrize("phase", ["federated", "server_proxy"])
def test_phases_lower_the_losses_that_they_are_for(phase: str) -> None:
    m = method(global_phase=phase, average="factors")
    clients = PLAIN.clients()
    trainer = ToyTrainer(steps=20, batch=20, lr=0.01)
    at = engine(trainer)
    first, _ = one_round(m, at, start(m), clients, 1)
    turned = federate(m, at, first, clients, 2, start=2)
    who = ["server"] if phase == "server_proxy" else list(EXAMPLES)
    n = {k: EXAMPLES.get(k, 1) for k in who}
    before, after = (sum(n[k] * loss(model(m, s), k) for k in who) for s in (first, turned))
    assert after < before
    for client in clients:
        mine = model(m, turned, personal(m, turned, trainer, client), client)
        assert loss(mine, client.id) < loss(model(m, turned), client.id)


def fitted(target: Tensor, state: State, m: FedLoRAOptimizer) -> float:
    """Relative error left after the local phase fitted one layer's update to a target, by least squares."""
    made = local(m, state)
    site = "layers.0.in"
    gain = made.train["gain"][site].clone().requires_grad_()
    step = torch.optim.LBFGS([gain], lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        delta = update(made, {"gain": made.train["gain"] | {site: gain}})[site]
        return (delta - target).square().sum() / target.square().sum()

    def closure() -> Tensor:
        step.zero_grad()
        e = error()
        e.backward()
        return e.detach()

    step.step(closure)
    return error().sqrt().item()


def test_lengths_of_B_solve_tasks_that_weigh_shared_components_and_no_others() -> None:
    """The positive and the negative control for what the local phase can learn under `col`."""
    m, state, site = method(), server(), "layers.0.in"
    weights = torch.tensor([0.2, -1.0, 3.0, 1.5], dtype=DOUBLE)
    known = 1.5 * (state["B"][site] * weights) @ state["A"][site]
    new = known + torch.randn(7, 6, generator=generator("new"), dtype=DOUBLE)
    assert fitted(known, state, m) < 1e-4
    assert fitted(new, state, m) > 0.1


def test_global_phase_recovers_a_turn_that_all_clients_share() -> None:
    """Clients hold A turned away from the truth in the same way; the federated phase, a round at a time, turns it back."""
    m, site = method(), "layers.0.in"
    truth = server()
    wrong = {r: dict(g) for r, g in truth.items()}
    noise = torch.randn(4, 6, generator=generator("wrong"), dtype=DOUBLE)
    wrong["A"][site] = dora.norm(truth["A"][site], 0) * dora.unit(truth["A"][site] + 0.3 * noise, 0)
    goal = 1.5 * truth["B"][site] @ truth["A"][site]

    def distance(state: State) -> float:
        return float((state["A"][site] - truth["A"][site]).norm() / truth["A"][site].norm())

    state, begin = wrong, distance(wrong)
    assert begin > 0.2
    for _ in range(40):
        uploads: list[Sent] = []
        for k in range(3):
            made = work(m, state, 2)
            x = torch.randn(6, 40, generator=generator("x", k), dtype=DOUBLE)
            turn = made.train["turn"][site].clone().requires_grad_()
            step = torch.optim.SGD([turn], lr=0.05)
            for _ in range(5):
                step.zero_grad()
                delta = update(made, {"turn": made.train["turn"] | {site: turn}})[site]
                ((delta - goal) @ x).square().mean().backward()
                step.step()
            uploads.append((Client(str(k), 1, 4), {"turn": made.train["turn"] | {site: turn.detach()}}))
        state = after(m, state, uploads, 2)
    assert distance(state) < 0.05 * begin


@pytest.mark.parametrize(
    "fields",
    [{"convention": "x"}, {"average": "x"}, {"global_phase": "x"}, {"lambda_local": -1.0}, {"lr_global": -1.0}],
    ids=str,
)
def test_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fedlora_optimizer"):
        method(**fields)
