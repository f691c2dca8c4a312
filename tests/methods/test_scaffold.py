from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.core import Client, State
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.simulation import Simulation
from fedloom.state import only

from .cases import EXAMPLES, Case, Rows, ToyTrainer, cast, engine, first_head, flat, rows, start, update

CASE = Case("", {"name": "scaffold", "variate": "steps"})
ROLES = ("A", "B", "head")


def wide(trainer: ToyTrainer) -> Simulation[Rows]:
    """The toy in float64."""
    return engine(trainer, fresh=cast({"head": first_head()}, torch.float64))


def sgd(steps: int = 3, lr: float = 0.05) -> ToyTrainer:
    return ToyTrainer(optimizer="sgd", lr=lr, steps=steps, record=True)


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_round_one_by_hand() -> None:
    """c = c_k = 0: plain SGD, a mean in which clients count alike, c_k = (x - y_k) / (steps lr), c = their mean."""
    method, trainer = CASE.method(), sgd()
    at, first = wide(trainer), start(CASE.method(), dtype=torch.float64)
    new, _ = one_round(method, at, first, CASE.clients(), 1)
    plain = build({"name": "fedit"}, CASE.lora())
    alone = {c.id: one_round(plain, wide(sgd()), first, [c], 1)[0] for c in CASE.clients()}
    for role in ROLES:
        for site, x in first[role].items():
            y = {k: state[role][site] for k, state in alone.items()}
            close(new[role][site], sum(y.values()) / 4)  # type: ignore[arg-type]
            gradients = {k: (x - v) / (3 * 0.05) for k, v in y.items()}
            for k, gradient in gradients.items():
                close(at.own(k)["c_" + role][site], gradient)
            close(new["c_" + role][site], sum(gradients.values()) / 4)  # type: ignore[arg-type]


def test_round_two_shifts_every_gradient_by_c_minus_c_k() -> None:
    """y <- y - lr (g(y) + c - c_k), then c_k <- c_k - c + (x - y) / (steps lr), by a loop of our own."""
    method, trainer = CASE.method(), sgd(steps=1)
    at, first = wide(trainer), start(CASE.method(), dtype=torch.float64)
    state, _ = one_round(method, at, first, CASE.clients(), 1)
    before = {k: at.own(k) for k in EXAMPLES}
    trainer.batch, trainer.steps = 20, 4  # all rows, so that batches do not matter
    trainer.seen.clear()
    new, _ = one_round(method, at, state, CASE.clients(), 2)
    assert any(before[k]["c_B"]["layers.0.in"].abs().max() > 1e-3 for k in EXAMPLES)
    changes: list[State] = []
    for client, work, done in trainer.seen:
        y = {role: {s: x.clone().requires_grad_() for s, x in state[role].items()} for role in ROLES}
        plain = replace(work, penalties=())
        for _ in range(4):
            leaves = [x for group in y.values() for x in group.values()]
            gradients = iter(torch.autograd.grad(trainer.loss(plain, y, rows(client.id)), leaves))
            y = {
                role: {
                    s: (x - 0.05 * (next(gradients) + state["c_" + role][s] - before[client.id]["c_" + role][s]))
                    .detach()
                    .requires_grad_()
                    for s, x in group.items()
                }
                for role, group in y.items()
            }
        change: State = {}
        for role in ROLES:
            change[role] = {}
            for s, x in state[role].items():
                close(done[role][s], y[role][s].detach())
                c, c_k = state["c_" + role][s], before[client.id]["c_" + role][s]
                c_new = c_k - c + (x - y[role][s].detach()) / (4 * 0.05)
                close(at.own(client.id)["c_" + role][s], c_new)
                change[role][s] = c_new - c_k
        changes.append(change)
    for role in ROLES:
        for s, c in state["c_" + role].items():
            close(new["c_" + role][s], c + sum(change[role][s] for change in changes) / 4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_gradient_at_the_servers_model_whatever_the_optimiser(optimizer: str) -> None:
    """Option I: c_k is the gradient of the client's loss at the state it was sent, also in the second round."""
    method = build({"name": "scaffold", "batches": 1}, CASE.lora())
    trainer = ToyTrainer(optimizer=optimizer, lr=0.05, steps=3, record=True, batch=20)
    at, state = wide(trainer), start(method, dtype=torch.float64)
    for t in (1, 2):
        trainer.seen.clear()
        new, _ = one_round(method, at, state, CASE.clients(), t)
        works = {client.id: replace(work, penalties=()) for client, work, _ in trainer.seen}
        for k, work in works.items():
            leaves = {role: {s: x.clone().requires_grad_() for s, x in state[role].items()} for role in ROLES}
            flat_leaves = [x for group in leaves.values() for x in group.values()]
            gradients = iter(torch.autograd.grad(trainer.loss(work, leaves, rows(k)), flat_leaves))
            for role in ROLES:
                for s in leaves[role]:
                    close(at.own(k)["c_" + role][s], next(gradients))
        for role in ROLES:
            for s, c in new["c_" + role].items():
                close(c, sum(at.own(k)["c_" + role][s] for k in EXAMPLES) / 4)  # type: ignore[arg-type]
        state = new


def test_both_options_agree_on_one_step_of_sgd() -> None:
    """Over all rows the step's gradient is the one at the server's model."""
    ends = []
    for variate in ("gradient", "steps"):
        method = build({"name": "scaffold", "variate": variate, "batches": 1}, CASE.lora())
        trainer = sgd(steps=1)
        trainer.batch = 20
        ends.append(federate(method, wide(trainer), start(method, dtype=torch.float64), CASE.clients(), 3))
    for role, group in ends[0].items():
        for site, x in group.items():
            close(x, ends[1][role][site])


@pytest.mark.parametrize("partial", [False, True], ids=["all", "half"])
@pytest.mark.parametrize("over", ["fedit", "fedex_lora", "ffa_lora"])
def test_the_servers_variate_is_the_mean_of_the_clients(over: str, partial: bool) -> None:
    """sum_k c_k = N c after every round, with those that never took part at zero."""
    method = build({"name": "scaffold", "variate": "steps", "over": {"name": over}}, CASE.lora())
    at, first = wide(sgd()), start(method, dtype=torch.float64)
    clients, rounds = CASE.clients(), 0

    def holds(state: State, record: object) -> None:
        nonlocal rounds
        rounds += 1
        variates = {role: group for role, group in state.items() if role.startswith("c_")}
        assert variates
        for role, group in variates.items():
            for site, c in group.items():
                kept = [at.own(k)[role][site] for k in EXAMPLES if role in at.own(k)]
                if kept:
                    close(sum(kept), 4 * c)  # type: ignore[arg-type]
                else:
                    assert (c == 0).all(), "what no work trains has no variate"

    sample = (lambda some, t: [some[t % 4], some[(t + 1) % 4]]) if partial else (lambda some, t: some)
    state = federate(method, at, first, clients, 4, sample=sample, on_round=holds)
    assert rounds == 4 and any(x.abs().max() > 1e-3 for x in state["c_B"].values())


def test_one_client_is_plain_sgd() -> None:
    """With N = 1, c = c_1: the correction is zero in every round."""
    client = Client("b", EXAMPLES["b"], 4)
    method, plain = CASE.method(), build({"name": "fedit"}, CASE.lora())
    first = start(method, dtype=torch.float64)
    got = federate(method, wide(sgd()), first, [client], 3)
    want = federate(plain, wide(sgd()), first, [client], 3)
    for role in ROLES:
        for site, x in want[role].items():
            close(got[role][site], x)


def test_clients_that_drift_apart_are_held_together() -> None:
    """Many local steps over different data: the variates lower the spread of what clients train."""

    def spread(name: str) -> float:
        trainer = sgd(steps=20)
        trainer.batch = 20
        method = build({"name": name}, CASE.lora())
        federate(method, wide(trainer), start(method, dtype=torch.float64), CASE.clients(), 6)
        last = [update(work, done)["layers.0.in"] for _, work, done in trainer.seen[-4:]]
        return float(torch.stack(last).var(0).sum())

    assert spread("scaffold") < 0.7 * spread("fedit")


def test_variates_cross_and_the_rest_is_the_inner_methods() -> None:
    method, at = CASE.method(), engine()
    state, record = one_round(method, at, start(method), CASE.clients(), 1)
    roles = {"A", "B", "head", "c_A", "c_B", "c_head"}
    assert set(record.up.by_role) == set(record.down.by_role) == set(state) == roles
    assert set(at.own("a")) == {"c_A", "c_B", "c_head"}
    assert set(method.serve(state, CASE.clients()[0])) == {"A", "B", "head"}


def test_a_round_without_a_learning_rate_moves_nothing() -> None:
    method, at = CASE.method(), engine(sgd(lr=0.0))
    first = start(method)
    state, _ = one_round(method, at, first, CASE.clients(), 1)
    assert flat(only(state, *ROLES)) == flat(only(first, *ROLES))
    assert all((x == 0).all() for role in ROLES for x in state["c_" + role].values())


@pytest.mark.parametrize("over", ["fslora", "flexlora", "ffa_lora"])
def test_clients_of_different_ranks_are_refused(over: str) -> None:
    method = build({"name": "scaffold", "variate": "steps", "over": {"name": over}}, {"rank": 4})
    method.check(Client("a", 1, 4))
    with pytest.raises(
        ConfigError,
        match="scaffold needs clients that train the same tensors in every round, got rank 2",
    ):
        method.check(Client("a", 1, 2))


def test_a_dropped_part_is_refused() -> None:
    method = build({"name": "scaffold", "over": {"name": "fedlodrop"}}, {"rank": 4})
    with pytest.raises(ConfigError, match=r"got keep 0\.5"):
        method.check(Client("a", 1, 4, keep=0.5))
