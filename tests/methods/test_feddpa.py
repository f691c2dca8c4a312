from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.core import Client, State, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate, one_round
from fedloom.methods import build
from fedloom.methods.feddpa import side_by_side
from fedloom.state import only

from .cases import EXAMPLES, ONE, SITES, TWO, Case, ToyTrainer, engine, flat, rows, start, update

PLAIN = Case("", {"name": "fedit"})
CLIENT = Client("a", EXAMPLES["a"], 4)


def case(**fields: Any) -> Case:
    return Case("", {"name": "feddpa", **fields})


def test_side_by_side_is_the_weighted_sum_of_products() -> None:
    """0.25 [3 6; 5 10; 0 0] + 0.75 [35 42; 5 6; 20 24] as one adapter of rank 2."""
    made = side_by_side((ONE["A"], ONE["B"], 0.25), (TWO["A"], TWO["B"], 0.75))
    assert made.A["s"].shape == (2, 2) and made.B["s"].shape == (3, 2) and made.gate is None
    assert (made.B["s"] @ made.A["s"]).tolist() == [[27.0, 33.0], [5.0, 7.0], [15.0, 18.0]]


def test_the_model_is_a_mix_of_both_adapters() -> None:
    method = case(mix=0.3).method()
    own: State = {"local_A": {"s": TWO["A"]["s"]}, "local_B": {"s": TWO["B"]["s"]}}
    work = method.model(ONE, own, Visit(1, Client("a", 1, 1), {"s": (3, 2)}))
    want = 1.5 * (0.7 * ONE["B"]["s"] @ ONE["A"]["s"] + 0.3 * TWO["B"]["s"] @ TWO["A"]["s"])
    torch.testing.assert_close(update(work)["s"], want)
    assert set(work.train) == {"local_A", "local_B"} and set(work.fixed) == {"A", "B"}
    new = method.model(ONE, {}, Visit(1, Client("b", 1, 1), {"s": (3, 2)}))
    (
        torch.testing.assert_close(update(new)["s"], 1.5 * ONE["B"]["s"] @ ONE["A"]["s"]),
        "a copy of the global one at first",
    )


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_the_shared_adapter_is_fedits_bit_for_bit(mix: float) -> None:
    method, plain = case(mix=mix).method(), PLAIN.method()
    first = start(plain)
    want = federate(plain, engine(), first, PLAIN.clients(), 4)
    got = federate(method, engine(), first, PLAIN.clients(), 4)
    assert flat(got) == flat(want)


def test_a_cohort_trains_in_two_lock_step_passes() -> None:
    trainer = ToyTrainer(record=True)
    method = case().method()
    federate(method, engine(trainer, cohort=3), start(method), PLAIN.clients(), 2)
    a, b = ("a", "b", "c"), ("d",)
    assert trainer.passes == [(t, part, ids) for t in (1, 2) for ids in (a, b) for part in (0, 1)]
    assert all(set(work.train) == {"A", "B", "head"} for _, work, _ in trainer.seen[:3])
    assert all(set(work.train) == {"local_A", "local_B"} for _, work, _ in trainer.seen[3:6])


def test_the_second_work_stands_on_what_the_first_trained_and_starts_where_it_ended() -> None:
    trainer = ToyTrainer(record=True)
    method, at = case().method(), engine(trainer)
    state, record = one_round(method, at, start(method), [CLIENT], 1)
    (_, _, shared), (_, local, mine) = trainer.seen
    assert flat(local.fixed) == flat(shared) == flat(only(state, "A", "B", "head"))
    assert flat({"A": local.train["local_A"], "B": local.train["local_B"]}) == flat(only(shared, "A", "B"))
    assert flat(at.own("a")) == flat(mine)
    assert set(record.up.by_role) == {"A", "B", "head"}, "what is local stays"
    one_round(method, at, state, [CLIENT], 2)
    assert flat(trainer.seen[3][1].train) == flat(mine), "and is taken up again"


def test_mix_of_zero_is_the_shared_model_and_teaches_the_local_one_nothing() -> None:
    method, at = case(mix=0.0).method(), engine(ToyTrainer(optimizer="sgd"))
    state, _ = one_round(method, at, start(method), [CLIENT], 1)
    own = at.own("a")
    assert flat({"A": own["local_A"], "B": own["local_B"]}) == flat(only(state, "A", "B"))
    model = update(method.model(method.serve(state, CLIENT), own, Visit(1, CLIENT, SITES)))
    for site in SITES:
        torch.testing.assert_close(model[site], 1.5 * state["B"][site] @ state["A"][site])


def test_mix_of_one_is_the_local_adapter_alone() -> None:
    trainer = ToyTrainer(optimizer="sgd", record=True)
    method, at = case(mix=1.0).method(), engine(trainer)
    state, _ = one_round(method, at, start(method), [CLIENT], 1)
    shared, own = trainer.seen[0][2], at.own("a")
    alone = Work(train=only(shared, "A", "B"), fixed=only(shared, "head"), scale=1.5)
    want = ToyTrainer(optimizer="sgd").fit([(CLIENT, alone)], [rows("a")], 1, 1)[0].state
    for site in SITES:
        torch.testing.assert_close(own["local_A"][site], want["A"][site], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own["local_B"][site], want["B"][site], rtol=1e-5, atol=1e-7)
    moved = {role: {site: x + 9 for site, x in group.items()} for role, group in only(state, "A", "B").items()}
    for received in (state, state | moved):
        model = update(method.model(only(received, "A", "B", "head"), own, Visit(1, CLIENT, SITES)))
        for site in SITES:
            torch.testing.assert_close(model[site], 1.5 * own["local_B"][site] @ own["local_A"][site])


def test_clients_end_with_models_of_their_own() -> None:
    method, at = case().method(), engine()
    state = federate(method, at, start(method), PLAIN.clients(), 2)
    assert method.personal_models
    made = [update(at.model(method, (c, method.serve(state, c)), 2))["layers.0.in"] for c in PLAIN.clients()]
    assert all(not torch.equal(x, y) for i, x in enumerate(made) for y in made[:i])


@pytest.mark.parametrize("mix", [-0.1, 1.1])
def test_refused(mix: float) -> None:
    with pytest.raises(ConfigError, match="feddpa: mix is"):
        build({"name": "feddpa", "mix": mix})


def test_feddpa_f_is_fedit_until_the_last_round() -> None:
    plain, method, at = PLAIN.method(), build({"name": "feddpa_f"}, PLAIN.lora()), engine()
    want = federate(plain, engine(), start(plain), PLAIN.clients(), 3)
    assert flat(federate(method, at, start(method), PLAIN.clients(), 3)) == flat(want)
    assert at.client_states.clients() == [], "nothing is kept before the personal phase"


def test_feddpa_f_trains_a_copy_of_the_global_adapter_alone_and_then_mixes() -> None:
    """The local adapter is trained with its whole weight: the mix is for use."""
    method, at = build({"name": "feddpa_f", "mix": 0.3}, PLAIN.lora()), engine(ToyTrainer(optimizer="sgd"))
    state = federate(method, at, start(method), PLAIN.clients(), 2)
    jobs = [(client, method.serve(state, client)) for client in PLAIN.clients()]
    assert [answer.client for answer in at.personal(method, jobs, 3)] == PLAIN.clients()
    for client, served in jobs:
        copy = Work(train=only(served, "A", "B"), fixed=only(served, "head"), scale=1.5)
        alone = ToyTrainer(optimizer="sgd").fit([(client, copy)], [rows(client.id)], 3)[0].state
        model = update(at.model(method, (client, served), 3))
        for site in SITES:
            shared, local = (x["B"][site] @ x["A"][site] for x in (served, alone))
            torch.testing.assert_close(model[site], 1.5 * (0.7 * shared + 0.3 * local))
            assert not torch.equal(shared, local)
