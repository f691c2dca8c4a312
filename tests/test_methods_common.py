"""Every method and composition on a real (tiny) transformer, through the real trainer and engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom import checkpoint
from fedloom.checkpoint import Kept
from fedloom.core import State, Work
from fedloom.engines.inprocess import InProcess
from fedloom.loop import federate
from fedloom.runs import evaluate
from fedloom.runs.assemble import Parts

from .methods.cases import CASES, EXAMPLES, RANK, Case

Settings = Callable[..., dict[str, Any]]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])


def parts(case: Case, settings: Settings, questions: Path, **sections: dict[str, Any]) -> Parts:
    """A run's parts: four clients of unequal size with the case's budgets, in float32."""
    clients: dict[str, Any] = {"count": 4, "partition": "dirichlet", "alpha": 2.0}
    if case.ranks:
        clients["ranks"] = [case.ranks.get(k, RANK) for k in EXAMPLES]
    if case.keeps:
        clients["keep"] = [case.keeps.get(k, 1.0) for k in EXAMPLES]
    fields = dict(case.fields)
    low_rank = {"rank": fields.pop("rank", RANK), "alpha": 6.0, "rslora": fields.pop("rslora", False)}
    values = settings(
        clients=clients,
        lora=low_rank,
        method={"name": case.name, **fields},
        task={"proxy_data": str(questions)} if fields.get("global_phase") == "server_proxy" else {},
        train={"lr": 3e-3, "batch_size": 4, "weight_decay": 0.01},
        **sections,
    )
    return Parts(fedloom.RunConfig.model_validate(values))


def wide(state: State) -> State:
    """The state in float64, in which the trainer then computes."""
    return {
        role: {site: x.double() if x.is_floating_point() else x for site, x in group.items()}
        for role, group in state.items()
    }


def train(p: Parts, cohort: int, state: State, rounds: int = 3, kept: Kept | None = None, first: int = 1) -> State:
    engine = InProcess(
        p.trainer, p.sites, p.rows_of, kept=kept, fresh=wide(p.head) if _is_wide(state) else p.head, cohort=cohort
    )
    return federate(p.method, engine, state, p.clients, rounds, start=first, server=p.server)


def _is_wide(state: State) -> bool:
    return next(iter(state["B"].values())).dtype == torch.float64


def assert_close(a: State, b: State, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for role, group in a.items():
        for site, x in group.items():
            where = f"{role}/{site}: "
            torch.testing.assert_close(x, b[role][site], atol=tolerance, rtol=tolerance, msg=where.__add__)


@every_case
def test_together_equals_one_by_one(case: Case, settings: Settings, questions: Path) -> None:
    p = parts(case, settings, questions)
    state = wide(p.initial_state())
    assert_close(train(p, 4, state), train(p, 1, state), 1e-9)


@every_case
def test_resumed_equals_uninterrupted_and_nothing_given_is_changed(
    case: Case, settings: Settings, questions: Path, tmp_path: Path
) -> None:
    p = parts(case, settings, questions)
    start = p.initial_state()
    before = {key: x.clone() for key, x in checkpoint.flatten(start).items()}
    whole = train(p, 4, start)
    assert all(torch.equal(x, before[key]) for key, x in checkpoint.flatten(start).items())

    kept = Kept(tmp_path / "kept")
    checkpoint.save(tmp_path, 2, train(p, 4, start, rounds=2, kept=kept), kept)
    t, state, kept, _ = checkpoint.load(tmp_path)
    resumed = train(p, 4, state, kept=kept, first=t + 1)
    flat = checkpoint.flatten(whole)
    assert flat.keys() == checkpoint.flatten(resumed).keys()
    assert all(torch.equal(x, flat[key]) for key, x in checkpoint.flatten(resumed).items())


@every_case
def test_a_round_changes_what_the_model_says(case: Case, settings: Settings, questions: Path) -> None:
    """The adapter that was trained is the one that is evaluated: B is not left at zero, nor is the head alone trained."""
    p = parts(case, settings, questions)
    if p.method.personal:
        pytest.skip("the model is with the clients: see the test of its file")
    state = train(p, 4, p.initial_state(), rounds=2)
    work = evaluate.global_work(p, state)
    A, B = p.method.adapter(work.train, work.fixed)
    assert all(B[site].abs().max() > 0 and A[site].abs().max() > 0 for site in p.sites)
    plain = p.trainer.evaluate(p.method, work, p.eval_rows).logits
    no_adapter = {site: torch.zeros_like(x) for site, x in B.items()}
    from fedloom.methods.fedit import FedIT

    head = work.train.get("head") or work.fixed["head"]
    silent = Work(train={"A": A, "B": no_adapter, "head": head})
    without = p.trainer.evaluate(FedIT(), silent, p.eval_rows).logits
    assert plain is not None and without is not None and not torch.allclose(plain, without, atol=1e-6)


def test_cohort_size_in_float32_is_within_its_stated_tolerance(settings: Settings, questions: Path) -> None:
    p = parts(CASES[0], settings, questions)
    state = p.initial_state()
    assert_close(train(p, 4, state), train(p, 1, state), 1e-4)


def test_training_leaves_no_graph_behind(settings: Settings, questions: Path) -> None:
    """A step's graph that outlives the step costs its activations for every cohort: 1,000 clients would not fit."""
    import gc

    p = parts(CASES[0], settings, questions)
    train(p, 2, p.initial_state(), rounds=2)
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.grad_fn is not None]
    assert alive == []
