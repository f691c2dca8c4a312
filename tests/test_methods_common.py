"""Every method and composition on a real (tiny) transformer, through the real trainer and engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom import checkpoint
from fedloom.checkpoint import ClientStates
from fedloom.core import Client, State, Work
from fedloom.loop import federate
from fedloom.runs.experiment import Experiment, experiment
from fedloom.simulation import Simulation

from .methods.cases import CASES, EXAMPLES, RANK, Case

Settings = Callable[..., dict[str, Any]]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])


def made(
    case: Case, settings: Settings, questions: Path, steps: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> Experiment:
    """An experiment: four clients of unequal size with the case's budgets, in float32."""
    clients: dict[str, Any] = {"count": 4, "partition": "dirichlet", "alpha": 2.0}
    if case.ranks:
        clients["ranks"] = [case.ranks.get(k, RANK) for k in EXAMPLES]
    if case.keeps:
        clients["keep"] = [case.keeps.get(k, 1.0) for k in EXAMPLES]
    values = settings(
        clients=clients,
        lora={"rank": case.rank, "alpha": 6.0, "rslora": case.rslora},
        task={"proxy_data": str(questions)} if case.method().needs_proxy_data else {},
        # Gradients of these models are above 0.01: the clip is in force.
        train={"lr": 3e-3, "batch_size": 4, "weight_decay": 0.01, "clip": 0.01, **(steps or {})},
        **sections,
    )
    return experiment(fedloom.RunConfig.model_validate(values | {"method": dict(case.table)}))


def wide(state: State) -> State:
    """The state in float64, in which the trainer then computes."""
    return {
        role: {site: x.double() if x.is_floating_point() else x for site, x in group.items()}
        for role, group in state.items()
    }


def train(
    e: Experiment,
    cohort: int,
    state: State,
    rounds: int = 3,
    client_states: ClientStates | None = None,
    first: int = 1,
) -> State:
    """Rounds of the experiment, in one process."""
    engine = Simulation(
        e.trainer,
        e.sites,
        e.rows_of,
        client_states=client_states,
        fresh=wide(e.head) if is_wide(state) else e.head,
        cohort=cohort,
        proxy=e.server,
        secret=0,
    )
    return federate(e.method, engine, state, e.clients, rounds, start=first)


def is_wide(state: State) -> bool:
    """Whether the state is in float64."""
    return any(x.dtype == torch.float64 for group in state.values() for x in group.values())


def assert_close(a: State, b: State, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for role, group in a.items():
        for site, x in group.items():
            where = f"{role}/{site}: "
            torch.testing.assert_close(x, b[role][site], atol=tolerance, rtol=tolerance, msg=where.__add__)


@every_case
def test_together_equals_one_by_one(case: Case, settings: Settings, questions: Path) -> None:
    e = made(case, settings, questions)
    state = wide(e.initial_state())
    assert_close(train(e, 4, state), train(e, 1, state), 1e-9)


@every_case
def test_resumed_equals_uninterrupted_and_nothing_given_is_changed(
    case: Case, settings: Settings, questions: Path, tmp_path: Path
) -> None:
    e = made(case, settings, questions)
    start = e.initial_state()
    before = {key: x.clone() for key, x in checkpoint.flatten(start).items()}
    whole = train(e, 4, start)
    assert all(torch.equal(x, before[key]) for key, x in checkpoint.flatten(start).items())

    states = ClientStates(tmp_path / "kept")
    checkpoint.save(tmp_path, 2, train(e, 4, start, rounds=2, client_states=states), states)
    t, state, states, _ = checkpoint.load(tmp_path)
    resumed = train(e, 4, state, client_states=states, first=t + 1)
    flat = checkpoint.flatten(whole)
    assert flat.keys() == checkpoint.flatten(resumed).keys()
    assert all(torch.equal(x, flat[key]) for key, x in checkpoint.flatten(resumed).items())


@every_case
def test_resumed_is_bit_equal_on_twelve_layers_with_clipping(
    case: Case, settings: Settings, questions: Path, deep_encoder: Path, tmp_path: Path
) -> None:
    """Names of layers sort in another order than the model's, and the norm that clips is a sum over them all."""
    dtype = "bfloat16" if CASES.index(case) % 2 else "float32"
    e = made(case, settings, questions, model={"name": str(deep_encoder), "dtype": dtype}, steps={"local_steps": 2})
    start = e.initial_state()
    torch.set_num_threads(2)
    try:
        whole = train(e, 4, start, rounds=2)
        states = ClientStates(tmp_path / "kept")
        checkpoint.save(tmp_path, 1, train(e, 4, start, rounds=1, client_states=states), states)
        t, state, states, _ = checkpoint.load(tmp_path)
        resumed = train(e, 4, state, rounds=2, client_states=states, first=t + 1)
    finally:
        torch.set_num_threads(1)
    assert [*whole] == [*resumed]
    for role, group in whole.items():
        assert [*group] == [*resumed[role]]
        assert all(torch.equal(x, resumed[role][site]) for site, x in group.items()), role


@every_case
def test_a_round_changes_what_the_model_says(case: Case, settings: Settings, questions: Path) -> None:
    """What was trained is what is evaluated: B or the offset is not left at zero, nor is the head alone trained."""
    e = made(case, settings, questions)
    if e.method.personal_models:
        pytest.skip("the model is with the clients: see the test of its file")
    state = train(e, 4, e.initial_state(), rounds=2)
    work = e.global_model(state)
    adapter = work.adapter(work.train, work.fixed)
    left = work.base.get("left", {})
    assert all(max(x[site].abs().max() for x in (adapter.B, left) if site in x) > 0 for site in e.sites)
    assert all(x.abs().max() > 0 for x in adapter.A.values())
    plain = e.trainer.evaluate(work, e.rows.eval).logits
    head = work.train.get("head") or work.fixed["head"]
    no_adapter = {site: torch.zeros_like(x) for site, x in adapter.B.items()}
    silent = Work(train={"A": adapter.A, "B": no_adapter, "head": head})
    without = e.trainer.evaluate(silent, e.rows.eval).logits
    assert plain is not None and without is not None and not torch.allclose(plain, without, atol=1e-6)
    found: list[Work] = []
    engine = Simulation(
        e.trainer, e.sites, e.rows_of, fresh=e.head, score=lambda works: [found.append(works[0][1]) or {}]
    )
    engine.cohort = 1
    served = e.method.serve(state, Client("server", 0, e.method.rank))
    engine.scores(e.method, [(client, served) for client in e.clients], 2, common=True)
    assert len(found) == len(e.clients)
    for same in found:  # whatever the budgets of whose rows it is scored on
        again = same.adapter(same.train, same.fixed)
        assert same.scale == work.scale
        assert same.base.keys() == work.base.keys()
        # A product: FLoRA draws another A for everybody, beside B = 0.
        assert all(torch.equal(again.B[x] @ again.A[x], adapter.B[x] @ adapter.A[x]) for x in e.sites)


def test_cohort_size_in_float32_is_within_its_stated_tolerance(settings: Settings, questions: Path) -> None:
    e = made(CASES[0], settings, questions)
    state = e.initial_state()
    assert_close(train(e, 4, state), train(e, 1, state), 1e-4)


def test_training_leaves_no_graph_behind(settings: Settings, questions: Path) -> None:
    """A step's graph that outlives the step costs its activations for every cohort: 1,000 clients would not fit."""
    import gc

    e = made(CASES[0], settings, questions)
    train(e, 2, e.initial_state(), rounds=2)
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.grad_fn is not None]
    assert alive == []
